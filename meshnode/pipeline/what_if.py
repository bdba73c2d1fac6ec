"""Imagined machines, described in TOML: what `mesh plan --what-if` plans for. Sans-IO.

    [[node]]                    # the first is the orchestrator
    name = "laptop"
    memory = "16G"              # of its CPU, or else give devices
    decode_gb_s = 60            # weights read in a second while one token is computed
    prefill_tok_s = 90          # of a prompt, were the whole model on it

    [[node]]
    name = "tower"
    memory = "32G"
    has_model = false           # nothing of the model is on its disk (default: all is)
    pull_mbit_s = 200
    disk_mb_s = 500
    [[node.device]]
    name = "CUDA0"
    memory = "24G"
    decode_gb_s = 700
    prefill_tok_s = 2500
    token_ms = 0.3              # for each batch, whatever its size

    [[link]]                    # both ways; or from = "a", to = "b", one way
    between = ["laptop", "tower"]
    rtt_ms = 3
    mbit_s = 400

`ring = false` at the top: workers do not hand results to each other. Speeds and links that are left
out are assumed, as for machines that nobody measured. Errors name the line.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshnode.config import parse_size
from meshnode.errors import UsageError
from meshnode.models.spans import Span
from meshnode.pipeline.plan import PlanDevice, PlanNode
from meshnode.pipeline.speeds import (
    ASSUMED_CPU,
    ASSUMED_GPU,
    ASSUMED_LINK,
    DISK_BYTES_PER_S,
    PULL_BYTES_PER_S,
    Link,
    Links,
    Speed,
    Storage,
)

MAX_NODES = 256
MIN_NUMBER, MAX_NUMBER = 1e-6, 1e12
MAX_NAME_CHARS = 64
CPU = "CPU"
_TOP = ("node", "link", "ring")
_SPEED = ("decode_gb_s", "prefill_tok_s", "token_ms")
_DEVICE = ("name", "memory", *_SPEED)
_NODE = ("name", "memory", *_SPEED, "device", "has_model", "disk_mb_s", "pull_mbit_s")
_LINK = ("between", "from", "to", "rtt_ms", "mbit_s")
_HEADING = re.compile(r"\s*\[\[\s*([\w.]+)\s*\]\]")
_AT_LINE = re.compile(r"(.*) \(at line (\d+), column \d+\)")


@dataclass(frozen=True)
class WhatIf:
    """`storage`: by node; those without the model miss all of their share. `held`: of nodes that
    were asked, which bytes of the model they hold."""

    nodes: tuple[PlanNode, ...]
    links: Links
    storage: Mapping[str, Storage]
    without_model: frozenset[str]
    held: Mapping[str, Sequence[Span]] = field(default_factory=dict)


def parse_what_if(text: str, what: str, token_bytes: float) -> WhatIf:
    """`what`: the file's name, for errors; `token_bytes`: weights that one token of a prompt is
    multiplied with. Raises `UsageError`."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a bare ValueError
        found = _AT_LINE.fullmatch(str(error))
        where, told = (f"line {found[2]}", found[1]) if found else ("its end", _reason(error))
        raise UsageError(f"{what}, {where}: this is no TOML: {told}") from None
    return _Reader(text, what, token_bytes).read(document)


def _reason(error: Exception) -> str:
    if isinstance(error, tomllib.TOMLDecodeError):
        return str(error)
    return "brackets too deep" if isinstance(error, RecursionError) else "a number too long"


class _Reader:
    """One file being read. Tables go by heading and number, which is how their lines are found."""

    def __init__(self, text: str, what: str, token_bytes: float) -> None:
        self._lines = text.splitlines()
        self._what = what
        self._token_bytes = max(1.0, token_bytes)
        self._headings: dict[str, list[int]] = {}
        for number, line in enumerate(self._lines, 1):
            if heading := _HEADING.match(line):
                self._headings.setdefault(heading[1], []).append(number)
        self._n_devices = 0

    def read(self, document: Mapping[str, Any]) -> WhatIf:
        self._check_keys(document, _TOP, 1)
        rows = self._tables(document, "node")
        if not rows:
            raise self._error(1, "it describes no node: write [[node]] for each")
        if len(rows) > MAX_NODES:
            line = self._line("node", MAX_NODES)
            raise self._error(line, f"it describes {len(rows)} nodes: {MAX_NODES} at most")
        nodes = [self._node(row, index) for index, row in enumerate(rows)]
        names = [node.name for node in nodes]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise self._error(self._line("node", index, "name"), f"two nodes are named {name}")
        storage, without = {}, set()
        for index, (row, name) in enumerate(zip(rows, names, strict=True)):
            line = self._line("node", index)
            storage[name] = Storage(
                disk_bytes_per_s=self._number(row, "disk_mb_s", line, DISK_BYTES_PER_S / 1e6) * 1e6,
                pull_bytes_per_s=self._number(row, "pull_mbit_s", line, PULL_BYTES_PER_S / 125e3)
                * 125e3,
            )
            if not self._flag(row, "has_model", line):
                without.add(name)
        ring = self._flag(document, "ring", 1)
        links = Links(self._links(self._tables(document, "link"), names), ring=ring)
        return WhatIf(tuple(nodes), links, storage, frozenset(without))

    # -- nodes --------------------------------------------------------------------------------

    def _node(self, row: Mapping[str, Any], index: int) -> PlanNode:
        line = self._line("node", index)
        self._check_keys(row, _NODE, line)
        is_local = index == 0
        devices = []
        for given in self._tables(row, "device"):
            where = self._line("node.device", self._n_devices)
            self._n_devices += 1
            self._check_keys(given, _DEVICE, where)
            devices.append(self._device(given, where, is_gpu=True))
        taken = [device.name for device in devices]
        if len(set(taken)) < len(taken) or CPU in taken:
            raise self._error(line, f"devices need names of their own, and other than {CPU}")
        if "memory" in row or is_local or not devices:
            devices.append(self._device(row, line, is_gpu=False))
        return PlanNode(self._name(row, line), is_local, tuple(devices))

    def _device(self, row: Mapping[str, Any], line: int, *, is_gpu: bool) -> PlanDevice:
        text = self._text(row, "memory", line)
        try:
            usable_bytes = parse_size(text)
        except UsageError as error:
            raise self._error(self._after(line, "memory"), str(error)) from None
        name = self._name(row, line) if is_gpu else CPU
        return PlanDevice(name, usable_bytes, is_gpu, self._speed(row, line, is_gpu))

    def _speed(self, row: Mapping[str, Any], line: int, is_gpu: bool) -> Speed | None:
        if not any(key in row for key in _SPEED):
            return None
        usual = ASSUMED_GPU if is_gpu else ASSUMED_CPU
        decode = self._number(row, "decode_gb_s", line, usual.decode_bytes_per_s / 1e9) * 1e9
        factor = usual.prefill_bytes_per_s / usual.decode_bytes_per_s
        prefill = decode * factor
        if "prefill_tok_s" in row:
            prefill = self._number(row, "prefill_tok_s", line, 0.0) * self._token_bytes
        token_s = self._number(row, "token_ms", line, 0.0, zero=True) / 1000
        return Speed(decode, prefill, token_s)

    # -- links --------------------------------------------------------------------------------

    def _links(
        self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]
    ) -> dict[tuple[str, str], Link]:
        links = {}
        for index, row in enumerate(rows):
            line = self._line("link", index)
            self._check_keys(row, _LINK, line)
            ends = row.get("between", [row.get("from"), row.get("to")])
            both = "between" in row
            one_way = [key for key in ("from", "to") if key in row]
            if len(one_way) != (0 if both else 2) or not isinstance(ends, list):
                raise self._error(line, 'a link needs between = ["a", "b"], or from and to')
            if len(ends) != 2 or ends[0] == ends[1] or not all(end in names for end in ends):
                shown = " and ".join(map(str, ends))
                raise self._error(
                    self._after(line, "between" if both else "from"),
                    f"a link is between two of the nodes described, not {shown}",
                )
            link = Link(
                self._number(row, "rtt_ms", line, ASSUMED_LINK.rtt_s * 1000, zero=True) / 1000,
                self._number(row, "mbit_s", line, ASSUMED_LINK.bytes_per_s / 125e3) * 125e3,
            )
            for pair in ((ends[0], ends[1]), (ends[1], ends[0]))[: 1 + both]:
                if pair in links:
                    told = f"a second link from {pair[0]} to {pair[1]}: write one"
                    raise self._error(line, told)
                links[pair] = link
        return links

    # -- values -------------------------------------------------------------------------------

    def _tables(self, row: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
        found = row.get(key, [])
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise self._error(self._after(1, key), f"write [[{key}]] for each {key}")
        return found

    def _check_keys(self, row: Mapping[str, Any], known: Sequence[str], line: int) -> None:
        for key in row:
            if key not in known:
                names = ", ".join(known)
                raise self._error(self._after(line, key), f"{key!r} is unknown: there are {names}")

    def _text(self, row: Mapping[str, Any], key: str, line: int) -> str:
        value = row.get(key, "")
        if not isinstance(value, str):
            where = self._after(line, key)
            raise self._error(where, f'{key} is text, not {value!r:.40}: write {key} = "…"')
        if not value.strip():
            raise self._error(self._after(line, key), f'{key} is missing: write {key} = "…"')
        return value.strip()

    def _name(self, row: Mapping[str, Any], line: int) -> str:
        """One that can be shown, and written in `--layers`."""
        name = self._text(row, "name", line)
        if len(name) > MAX_NAME_CHARS or not name.isprintable() or set(name) & set(",="):
            told = (
                f"{name!a:.40} is no name: {MAX_NAME_CHARS} visible characters at most, no , or ="
            )
            raise self._error(self._after(line, "name"), told)
        return name

    def _number(
        self, row: Mapping[str, Any], key: str, line: int, default: float, *, zero: bool = False
    ) -> float:
        value = row.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        least = 0.0 if zero else MIN_NUMBER
        if not is_number or not least <= value <= MAX_NUMBER:
            told = f"{key} is a number from {least:g} to {MAX_NUMBER:g}, not {value!r:.40}"
            raise self._error(self._after(line, key), told)
        return float(value)

    def _flag(self, row: Mapping[str, Any], key: str, line: int) -> bool:
        value = row.get(key, True)
        if not isinstance(value, bool):
            raise self._error(self._after(line, key), f"{key} is true or false, not {value!r}")
        return value

    # -- lines --------------------------------------------------------------------------------

    def _line(self, heading: str, index: int, key: str = "") -> int:
        """The line of a table's heading, or of a key in it; the first where it has none."""
        found = self._headings.get(heading, ())
        line = found[index] if index < len(found) else 1
        return self._after(line, key) if key else line

    def _after(self, line: int, key: str) -> int:
        """The line of a key at or after this one, or this one."""
        named = re.compile(rf'(^|[\s,{{\[."\']){re.escape(key)}["\']?\s*[=\].]')
        for number, text in enumerate(self._lines[line - 1 :], line):
            if named.search(text):
                return number
        return line

    def _error(self, line: int, told: str) -> UsageError:
        return UsageError(f"{self._what}, line {line}: {told}")
