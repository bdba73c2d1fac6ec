"""What lies beside models on a disk: slices' own files, and other programs' caches."""

from __future__ import annotations

import json
from pathlib import Path

from blake3 import blake3

from meshnode.models.caches import ollama_models
from meshnode.models.spans import Span
from meshnode.models.store.document import (
    DIGEST_BYTES,
    BadDocument,
    SliceDocument,
    parse_untrusted,
    to_bytes,
)
from meshnode.models.store.journal import parse_records_untrusted, to_record
from tests.fuzz.mutation import CborFormat, JsonFormat
from tests.fuzz.parser import REJECTED, Parser, check
from tests.fuzz.script import scratch_folder

MAGIC = b"mesh-slice 1\n"
KEY = b"slice"
BLOB = "sha256-" + "a" * 64
LAYER = {"mediaType": "application/vnd.ollama.image.model", "digest": BLOB.replace("-", ":")}
DOCUMENT = SliceDocument(
    files=(("m-00001-of-00002.gguf", 100), ("m-00002-of-00002.gguf", 50)),
    source="https://example.org/m.gguf",
    validator="etag:1",
    header_digest=b"h" * 32,
    layout=b"l" * 32,
    root="ab" * 32,
    tensor_count=2,
    weight_bytes=120,
    digests={"a": b"a" * 32, "blk.0.x": b"b" * 32},
    held=frozenset(("a",)),
    stamps=((1, 2), (3, 4)),
    needed=frozenset(("a", "blk.0.x")),
    told={"blk.1.x": (b"t" * 32, "ben (abcdefgh)")},
)


def run_document(body: bytes) -> object:
    found = parse_untrusted(MAGIC + blake3(body).digest() + body)
    check(parse_untrusted(to_bytes(found)) == found, "a document reads back")
    for name, _ in found.files:
        check(Path("/models/m", name).resolve().parent == Path("/models/m"), "files stay inside")
    check(found.held <= found.digests.keys(), "what is held has a digest")
    claim = parse_untrusted(MAGIC + bytes(DIGEST_BYTES) + body)
    check(not claim.sealed and claim.source is None and claim.root is None, "a claim is told apart")
    check(not claim.told, "what a disk has damaged is nobody's word")
    return found


def run_journal(data: bytes) -> object:
    spans = list(parse_records_untrusted(KEY, data))
    check(all(span.start < span.stop for span in spans), "no range is empty")
    return spans or REJECTED


def run_ollama(data: bytes) -> object:
    folder = scratch_folder() / "ollama"
    manifest = folder / "manifests" / "registry.ollama.ai" / "library" / "m" / "latest"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    (folder / "blobs").mkdir(exist_ok=True)
    (folder / "blobs" / BLOB).touch()
    manifest.write_bytes(data)
    found = list(ollama_models(folder))
    check(all(named.path == folder / "blobs" / BLOB for named in found), "blobs alone are named")
    return found or REJECTED


PARSERS = (
    Parser(
        *("slice document", (BadDocument,)),
        lambda: [to_bytes(DOCUMENT)[len(MAGIC) + DIGEST_BYTES :]],
        run_document,
        format=CborFormat(),
    ),
    Parser(
        *("slice journal", ()),
        lambda: [to_record(KEY, Span(0, 1, 2)) + to_record(KEY, Span(1, 2**40, 2**41))],
        run_journal,
    ),
    Parser(
        *("Ollama's manifest", ()),
        lambda: [json.dumps({"schemaVersion": 2, "layers": [LAYER]}).encode()],
        run_ollama,
        format=JsonFormat(),
    ),
)
