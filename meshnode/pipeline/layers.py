"""`--layers local=0:3,NAME=4:output` and `--tensor-split 3,1`, as ranges of layers. Sans-IO.

A range names its first and its last layer, both included; `output` is what comes after the last
layer, and the planner's to place unless it is given to somebody by name. `local=output` beside
other ranges puts it on the orchestrator's CPU, whose other layers are the first. Inside, ranges are
half-open over items: layers 0 to n - 1, and n for the output.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from meshnode.errors import UsageError

_RANGE = re.compile(
    r"(?P<node>[^=]+)=(?P<first>[0-9]{1,5}|output)(?::(?P<last>[0-9]{1,5}|output))?"
)
_FORM = "write it like local=0:3,NAME=4:output"


@dataclass(frozen=True)
class LayerRange:
    """What one node is to hold: layers `first` to `last`, both included; None means the output.

    `first` None: the output alone. `last` None: up to the output and with it.
    """

    node: str
    first: int | None
    last: int | None


@dataclass(frozen=True)
class ItemRange:
    """The same for a model of known length: items `start` to `stop`, the latter left out."""

    node: str
    start: int
    stop: int


class OutputWish(Enum):
    """Where the operator wants the output computed."""

    HERE = "here"  # on the local CPU, wherever the last layers are
    THERE = "there"  # where the last layers are
    EITHER = "either"


def take_output_wish(
    ranges: Sequence[LayerRange], local: str, *, has_gpu: bool
) -> tuple[OutputWish, tuple[LayerRange, ...]]:
    """What the ranges say of the output, and the ranges without a `local=output` that puts it on
    the local CPU: an accelerator of the local node holds it as the last of the items."""
    rest = tuple(given for given in ranges if given.node != local or given.first is not None)
    if len(rest) < len(ranges) and (not has_gpu or local in {given.node for given in rest}):
        if any(given.last is None for given in rest):
            raise _given_twice(as_line(ranges), "the output")
        return OutputWish.HERE, rest
    names_it = any(given.last is None for given in ranges)
    return OutputWish.THERE if names_it else OutputWish.EITHER, tuple(ranges)


def parse_layers(text: str) -> tuple[LayerRange, ...]:
    """The ranges of `NAME=FIRST:LAST,…`, in the order given. Raises `UsageError`."""
    ranges = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        if not found:
            raise UsageError(f"--layers: {part.strip()!r} is no range: {_FORM}")
        first, last = found["first"], found["last"] or found["first"]
        ranges.append(
            LayerRange(
                found["node"].strip(),
                None if first == "output" else int(first),
                None if last == "output" else int(last),
            )
        )
    return tuple(ranges)


def parse_tensor_split(text: str) -> tuple[float, ...]:
    """The proportions of `3,1`, one for each node. Raises `UsageError`."""
    parts = [part.strip() for part in text.split(",")]
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError as error:
        raise UsageError(f"--tensor-split {text!r}: write numbers like 3,1") from error
    total = sum(numbers)
    if not all(number >= 0 for number in numbers) or not total or math.isnan(total):
        raise UsageError(f"--tensor-split {text!r}: write numbers from 0 up, not all 0")
    if math.isinf(total):
        raise UsageError(f"--tensor-split {text!r}: these are too large, write numbers like 3,1")
    return numbers


def to_items(
    ranges: Sequence[LayerRange], n_layers: int, nodes: Sequence[str]
) -> tuple[ItemRange, ...]:
    """The ranges in the order of the layers, all of them covered once. Raises `UsageError`."""
    known = set(nodes)
    items = []
    for given in ranges:
        if given.node not in known:
            raise UsageError(
                f"--layers {_marked(ranges, given)}: {given.node!r} is no node here: there are "
                + ", ".join(nodes)
            )
        start = n_layers if given.first is None else given.first
        stop = n_layers + 1 if given.last is None else given.last + 1
        if start >= stop or (stop > n_layers and given.last is not None):
            raise UsageError(
                f"--layers {_marked(ranges, given)}: {given.node} cannot have {_shown(given)}: the "
                f"model's layers are 0 to {n_layers - 1}, then output"
            )
        items.append(ItemRange(given.node, start, stop))
    items.sort(key=lambda item: item.start)
    if len({item.node for item in items}) != len(items):
        raise UsageError(f"--layers {as_line(ranges)} names a node twice: a node holds one range")
    if items and items[-1].stop == n_layers:  # the output goes with the last layer
        items[-1] = ItemRange(items[-1].node, items[-1].start, n_layers + 1)
    _check_cover(items, n_layers, as_line(ranges))
    return tuple(items)


def _check_cover(items: Sequence[ItemRange], n_layers: int, line: str) -> None:
    next_item = 0
    for item in items:
        if item.start > next_item:
            raise UsageError(f"--layers {line} leaves out layer {next_item}: give it to a node")
        if item.start < next_item:
            what = "the output" if item.start == n_layers else f"layer {item.start}"
            raise _given_twice(line, what)
        next_item = item.stop
    if next_item <= n_layers:
        raise UsageError(f"--layers {line} leaves out layer {next_item}: give it to a node")


def _given_twice(line: str, what: str) -> UsageError:
    return UsageError(f"--layers {line} gives {what} to two nodes: give it to one")


def as_line(ranges: Sequence[LayerRange]) -> str:
    """The ranges as they are written."""
    return ",".join(f"{given.node}={_shown(given)}" for given in ranges)


def _marked(ranges: Sequence[LayerRange], wrong: LayerRange) -> str:
    """The same, with the one that is meant in brackets."""
    return ",".join(
        f"[{as_line([given])}]" if given is wrong else as_line([given]) for given in ranges
    )


def _shown(given: LayerRange) -> str:
    first = "output" if given.first is None else given.first
    last = "output" if given.last is None else given.last
    return f"{first}" if first == last else f"{first}:{last}"


def apportion(
    proportions: Sequence[float], n_layers: int, nodes: Sequence[str]
) -> tuple[ItemRange, ...]:
    """Layers in these proportions, one number a node in this order, by largest remainder; the
    output goes with the last layer. Raises `UsageError` for too many or too few numbers."""
    if len(proportions) != len(nodes):
        raise UsageError(
            f"--tensor-split has {len(proportions)} numbers for {len(nodes)} nodes: give one each "
            "for " + ", ".join(nodes)
        )
    exact = [n_layers * number / sum(proportions) for number in proportions]
    counts = [int(share) for share in exact]
    by_remainder = sorted(
        range(len(nodes)), key=lambda index: (counts[index] - exact[index], index)
    )
    for index in by_remainder[: n_layers - sum(counts)]:
        counts[index] += 1
    ends = list(itertools.accumulate(counts))
    return tuple(
        ItemRange(node, end - count, end + (end == n_layers))
        for node, count, end in zip(nodes, counts, ends, strict=True)
        if count
    )
