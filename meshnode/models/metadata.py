"""Typed look-ups in a header's metadata: what is missing or makes no sense is a damaged file."""

from __future__ import annotations

import math

from meshnode.models.header import ArrayValue, DamagedGguf, Header, LongText, NotGguf, Value

MAX_DIMENSION = 1 << 24  # wider than any model, small enough for sums to stay sane


class Metadata:
    """I know what a header says of its own architecture, below `{arch}.`, and in general."""

    def __init__(self, header: Header) -> None:
        self._values = header.metadata
        self._path = header.path
        arch = self._values.get("general.architecture")
        if not isinstance(arch, str) or not arch:
            raise NotGguf(f"{self._path} names no architecture: it is not a language model")
        self.arch = arch
        self._check_no_nan()

    def get(self, key: str) -> Value | None:
        """By the whole key."""
        return self._values.get(key)

    def has(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self._values

    def number(self, key: str, *, default: int | None = None, most: int = MAX_DIMENSION) -> int:
        value = self._values.get(f"{self.arch}.{key}", default)
        return self._checked(key, value, most)

    def each_layer(self, key: str, n_layers: int, *, default: int) -> tuple[int, ...]:
        """One number a layer, given as an array or as one number for all."""
        value = self._values.get(f"{self.arch}.{key}", default)
        if isinstance(value, ArrayValue):
            if len(value.items) < n_layers:
                raise self._damaged(key)
            return tuple(self._checked(key, item) for item in value.items[:n_layers])
        return (self._checked(key, value),) * n_layers

    def flags(self, key: str, n_layers: int) -> tuple[bool, ...] | None:
        """An array of truths or numbers, one a layer, those left out false; None where there is no
        array."""
        value = self._values.get(f"{self.arch}.{key}")
        if not isinstance(value, ArrayValue):
            return None
        found = tuple(bool(item) for item in value.items[:n_layers])
        return found + (False,) * (n_layers - len(found))

    def numbers(self, key: str) -> tuple[int, ...]:
        """A short array of any length; empty where there is none."""
        value = self._values.get(f"{self.arch}.{key}")
        if not isinstance(value, ArrayValue):
            return ()
        return tuple(self._checked(key, item) for item in value.items)

    def _check_no_nan(self) -> None:
        # Infinities are: llama.cpp writes `kda.gate_lower_bound` so where there is no bound.
        for key, value in self._values.items():
            if isinstance(value, float) and math.isnan(value):
                raise DamagedGguf(
                    f"{self._path} is damaged: its {_shown(key)} is no number; download it again"
                )

    def _checked(self, key: str, value: Value | None, most: int = MAX_DIMENSION) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise self._damaged(key)
        return value

    def _damaged(self, key: str) -> DamagedGguf:
        return DamagedGguf(
            f"{self._path} is damaged: its {_shown(self.arch)}.{key} is missing or makes no sense; "
            "download it again"
        )


def template_of(metadata: Metadata) -> str | None:
    """The chat template; empty where it is too long to be kept, None where there is none."""
    value = metadata.get("tokenizer.chat_template")
    if isinstance(value, LongText):
        return ""
    return value if isinstance(value, str) else None


def _shown(text: str) -> str:
    clipped = text[:64]
    return "".join(char if char.isprintable() else "?" for char in clipped)
