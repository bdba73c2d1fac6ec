"""What a client of the gateway sends besides a body for the model."""

from __future__ import annotations

import json

from meshnode.gateway.body import check_json
from meshnode.gateway.pull_request import MAX_NODE_CHARS, MAX_NODES, parse_pull_untrusted
from meshnode.gateway.ranges import (
    MAX_RANGES,
    NoSuchBytes,
    Parts,
    TooManyRanges,
    parse_ranges_untrusted,
)
from meshnode.gateway.refusal import Refusal
from meshnode.models.spans import joined, size_of
from tests.fuzz.mutation import JsonFormat
from tests.fuzz.parser import REJECTED, Parser, check

FILE_INDEX = 3
SIZES = (1, 1000, 2**40)
RANGES = (
    "bytes=0-1023",
    "bytes=-500",
    "bytes=100-",
    "bytes=0-9,20-29, 5-7,990-",
    ",".join(("bytes=0-0", *(f"{at}-{at}" for at in range(2, 2 * MAX_RANGES, 2)))),
)
PULLS: tuple[dict[str, object], ...] = (
    {"layers": "27:output", "nodes": ["attic", "tower"]},
    {"layers": None, "nodes": None},
    {"nodes": ["attic", "attic"]},
    {},
)


def run_ranges(data: bytes) -> object:
    header = data.decode("latin-1")  # as headers reach the gateway
    found = [_ranges(header, size_bytes) for size_bytes in SIZES]
    return any(found) or REJECTED


def _ranges(header: str, size_bytes: int) -> bool:
    try:
        spans = parse_ranges_untrusted(header, FILE_INDEX, size_bytes)
    except (NoSuchBytes, TooManyRanges):
        return False
    check(all(0 <= one.start < one.stop <= size_bytes for one in spans), "ranges are in the file")
    check(all(one.file_index == FILE_INDEX for one in spans), "ranges are of the file")
    check(len(spans) <= MAX_RANGES, "ranges are few")
    check(size_of(spans) == size_of(joined(spans)), "no byte is sent twice")
    if len(spans) > 1:
        parts = Parts(spans, size_bytes, "b")
        frame_bytes = sum(map(len, parts.heads())) + len(parts.tail)
        check(parts.content_bytes == frame_bytes + size_of(spans), "the length is the body's")
    return bool(spans)


def run_pull(data: bytes) -> object:
    check_json(data)
    found = parse_pull_untrusted(data)
    check(found.layers is None or isinstance(found.layers, str), "layers are text")
    check(len(set(found.nodes)) == len(found.nodes) <= MAX_NODES, "a node is named once")
    check(all(len(node) <= MAX_NODE_CHARS for node in found.nodes), "names are short")
    return found


PARSERS = (
    Parser("Range header", (), lambda: [text.encode() for text in RANGES], run_ranges),
    Parser(
        *("request for a pull", (Refusal,)),
        lambda: [json.dumps(one).encode() for one in PULLS],
        run_pull,
        format=JsonFormat(),
    ),
)
