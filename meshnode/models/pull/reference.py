"""What a user may write to say where a model comes from.

| written | means |
|---|---|
| `hf:org/repo/file.gguf`, with `@revision` at its end or without | a file of Hugging Face |
| `https://…`, `http://…` | a file on the web |
| `ollama:name`, `ollama:name:tag`, `ollama:user/name:tag` | a model of Ollama's registry |
| `mesh:NAME` | a model that peers hold |

A file named like a shard (`NAME-00001-of-00003.gguf`) stands for all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from meshnode.errors import ModelError, UsageError
from meshnode.models.facts import shard_paths
from meshnode.models.pull.url import Url, parse_url

OLLAMA_TAG = "latest"
_OLLAMA = re.compile(
    r"(?:(?P<user>[a-z0-9][\w.-]{0,79})/)?(?P<name>[a-z0-9][\w.-]{0,79})(?::(?P<tag>[\w.-]{1,80}))?",
    re.ASCII | re.IGNORECASE,
)
_HUB_PART = re.compile(r"[\w][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class HubReference:
    """Files of one repository of Hugging Face, the first shard first."""

    repository: str
    files: tuple[str, ...]
    revision: str | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repository}/{self.files[0]}{at}"


@dataclass(frozen=True)
class UrlReference:
    """Files on the web, the first shard first."""

    urls: tuple[Url, ...]

    def __str__(self) -> str:
        return self.urls[0].shown


@dataclass(frozen=True)
class OllamaReference:
    """One model of Ollama's registry. user: `library` for those of Ollama itself."""

    user: str
    name: str
    tag: str

    @property
    def path(self) -> str:
        return f"{self.user}/{self.name}"

    def __str__(self) -> str:
        return f"ollama:{self.path.removeprefix('library/')}:{self.tag}"


@dataclass(frozen=True)
class MeshReference:
    """A model that peers hold."""

    name: str

    def __str__(self) -> str:
        return f"mesh:{self.name}"


Reference = HubReference | UrlReference | OllamaReference | MeshReference
"""`str()` is what to show and to keep: it parses to the same, but for secrets."""


def is_secret(reference: Reference) -> bool:
    """Whether `str()` leaves something out, so that nobody else can fetch by it."""
    return isinstance(reference, UrlReference) and any(url.is_secret for url in reference.urls)


def parse_reference(text: str) -> Reference:
    """Raises `UsageError`, which repeats no secret."""
    kind, colon, rest = text.strip().partition(":")
    match kind.lower() if colon else "":
        case "hf":
            return _hub(rest)
        case "http" | "https":
            return _url(text.strip())
        case "ollama":
            return _ollama(rest)
        case "mesh" if rest and rest.isprintable():
            return MeshReference(rest)
    raise UsageError(
        "a model comes from hf:org/repo/file.gguf, https://host/file.gguf, ollama:name:tag or "
        "mesh:NAME"
    )


def _hub(rest: str) -> HubReference:
    path, _, revision = rest.partition("@")
    parts = path.split("/")
    if (
        len(parts) < 3
        or not all(_HUB_PART.fullmatch(part) for part in parts[:2])
        or not all(part.strip(".") and part.isprintable() for part in parts[2:])
        or not revision.isprintable()
        or (not revision and "@" in rest)
    ):
        raise UsageError(
            "a model of Hugging Face is written hf:org/repo/file.gguf, with @revision where it is "
            "not main"
        )
    return HubReference("/".join(parts[:2]), _shards("/".join(parts[2:])), revision or None)


def _url(text: str) -> UrlReference:
    url = parse_url(text)
    names = _shards(url.file_name)
    if names == (url.file_name,):
        return UrlReference((url,))
    folder = url.path.rpartition("/")[0]
    return UrlReference(tuple(replace(url, path=f"{folder}/{quote(name)}") for name in names))


def _ollama(rest: str) -> OllamaReference:
    found = _OLLAMA.fullmatch(rest)
    if found is None:
        raise UsageError("a model of Ollama is written ollama:name, ollama:name:tag or user/name")
    return OllamaReference(
        (found["user"] or "library").lower(), found["name"].lower(), found["tag"] or OLLAMA_TAG
    )


def _shards(name: str) -> tuple[str, ...]:
    try:
        return tuple(path.as_posix() for path in shard_paths(Path(name)))
    except ModelError as error:
        raise UsageError(str(error)) from None
