"""Headers whose bytes are only partly there, and what large and hostile ones cost."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.models.facts import facts_of, read_facts, shard_paths
from meshnode.models.header import (
    DamagedGguf,
    Header,
    HeaderIncomplete,
    TruncatedGguf,
    parse_header,
    read_header,
)
from tests.engine.synthetic import make_model
from tests.meshnode.models.headers_by_hand import (
    PAIRS,
    gguf_bytes,
    number_pair,
    string_pair,
    tensor,
    text,
)

FETCH_BYTES = 4096


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_model(folder / "m.gguf", layers=2, width=32, vocab=2000, heads=1, ffn=32)


def fetched(data: bytes, path: Path, first_bytes: int) -> tuple[Header, int]:
    """The header as a fetcher gets it that asks for more until it is enough; how much it took."""
    have = first_bytes
    while True:
        try:
            return parse_header(data[:have], len(data), path), have
        except HeaderIncomplete as incomplete:
            more = incomplete.at_least_bytes
        assert have < more <= len(data)
        have = more


@pytest.mark.parametrize("first_bytes", [0, 1, 4, 100, FETCH_BYTES, 1 << 20])
def test_a_header_fetched_in_growing_ranges_is_the_one_of_the_file(
    model: Path, first_bytes: int
) -> None:
    whole = read_header(model)
    header, have = fetched(model.read_bytes(), model, first_bytes)
    assert header == whole
    assert have <= max(first_bytes, whole.data_start), "no byte of the weights is asked for"


def test_facts_come_from_headers_that_are_in_memory_only(tmp_path: Path) -> None:
    first = make_model(tmp_path / "s.gguf", shards=3)
    shards = shard_paths(first)
    expected = read_facts(first)
    contents = [path.read_bytes() for path in shards]
    for path in shards:
        path.unlink()
    headers = [
        fetched(content, path, FETCH_BYTES)[0]
        for path, content in zip(shards, contents, strict=True)
    ]
    assert facts_of(headers) == expected


def test_the_sentence_says_how_much_more_it_takes(model: Path) -> None:
    with pytest.raises(HeaderIncomplete, match=r"m\.gguf goes on to byte 24 at least: fetch more"):
        parse_header(model.read_bytes()[:20], model.stat().st_size, model)


def test_a_file_that_is_too_short_for_its_weights_needs_no_more_bytes(model: Path) -> None:
    data = model.read_bytes()
    with pytest.raises(TruncatedGguf, match="truncated"):
        parse_header(data, len(data) - 32, model)
    with pytest.raises(TruncatedGguf, match="goes on past its last byte"):
        parse_header(data, 1000, model)


def test_a_header_of_absurd_length_is_not_fetched(model: Path) -> None:
    key = struct.pack("<Q1sIQ", 1, b"x", 8, 2**29)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key
    with pytest.raises(DamagedGguf, match="larger than any"):
        parse_header(head, 2**40, model)


# -- what headers cost ------------------------------------------------------------------------


READ = """
import json, sys
from pathlib import Path
from meshnode.models.facts import read_facts

def high_water_kib():  # ru_maxrss counts the parent's pages too
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])

before = high_water_kib()
try:
    facts = read_facts(Path(sys.argv[1]))
    found = [facts.n_vocab, facts.n_layers, facts.weight_bytes]
except Exception as error:
    found = [type(error).__name__, str(error)]
print(json.dumps([before, high_water_kib(), *found]))
"""


def read_apart(path: Path) -> tuple[int, int, list[object]]:
    """KiB of the process at most, before and after it read the facts; what it found."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], check=True, capture_output=True, text=True
    )
    before, after, *found = json.loads(done.stdout)
    return before, after, found


def strings(count: int, size: int) -> bytes:
    each = struct.pack("<Q", size)
    texts = (str(number).encode().ljust(size, b" ") for number in range(count))
    return struct.pack("<IIQ", 9, 8, count) + b"".join(each + one for one in texts)


def test_a_vocabulary_of_a_quarter_million_tokens_costs_a_megabyte_or_two(tmp_path: Path) -> None:
    tokens, merges = strings(256_000, 7), strings(500_000, 11)
    scores = struct.pack("<IIQ", 9, 6, 256_000) + bytes(4 * 256_000)
    pairs = (
        *PAIRS,
        text("tokenizer.ggml.tokens") + tokens,
        text("tokenizer.ggml.merges") + merges,
        text("tokenizer.ggml.scores") + scores,
    )
    path = tmp_path / "v.gguf"
    path.write_bytes(gguf_bytes(pairs, (tensor("token_embd.weight", [4, 4]),)))
    before, after, found = read_apart(path)
    assert found == [256_000, 1, 64]
    assert path.stat().st_size > 14_000_000
    assert after - before < 8 << 10


def test_a_model_of_120_gb_is_known_by_its_header(tmp_path: Path) -> None:
    """A file with holes in the place of the weights."""
    layers, width = 126, 16384
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (width, width),
        "attn_k": (width, 1024),
        "attn_v": (width, 1024),
    }
    shapes |= {"attn_output": (width, width), "attn_norm": (width,), "ffn_norm": (width,)}
    shapes |= {"ffn_up": (width, 8192), "ffn_gate": (width, 8192), "ffn_down": (8192, width)}
    names = {f"blk.{n}.{name}.weight": ne for n in range(layers) for name, ne in shapes.items()}
    names |= {"token_embd.weight": (width, 128_256), "output.weight": (width, 128_256)}
    infos, offset = [], 0
    for name, ne in names.items():
        infos.append(tensor(name, list(ne), type=8, offset=offset))
        offset += -(-math.prod(ne) // 32 * 34 // 32) * 32
    pairs = (
        string_pair("general.architecture", "llama"),
        number_pair("llama.block_count", layers),
        number_pair("llama.embedding_length", width),
        number_pair("llama.attention.head_count", 128),
        number_pair("llama.attention.head_count_kv", 8),
        text("tokenizer.ggml.tokens") + strings(128_256, 8),
        text("tokenizer.ggml.merges") + strings(280_000, 12),
    )
    path = tmp_path / "large.gguf"
    path.write_bytes(gguf_bytes(pairs, tuple(infos), data=b""))
    os.truncate(path, path.stat().st_size + offset)
    assert path.stat().st_size > 120e9
    before, after, found = read_apart(path)
    assert found[:2] == [128_256, layers]
    assert after < 300 << 10
    assert after - before < 16 << 10


@pytest.mark.parametrize("shape", ["keys", "long-keys", "texts", "arrays", "tensors", "strings"])
def test_a_header_that_is_nothing_but_large_is_read_or_refused_in_bounded_memory(
    tmp_path: Path, shape: str
) -> None:
    """Each as large as a header may be, or as full as its kind may be."""
    kib = 1 << 10
    number = struct.pack("<IB", 0, 0)
    pairs: list[bytes] = list(PAIRS)
    tensors: list[bytes] = []
    if shape == "keys":
        pairs += [text(str(n)) + number for n in range((1 << 14) - len(PAIRS))]
    if shape == "long-keys":
        pairs += [text(str(n).rjust(60 * kib, "k")) + number for n in range(4000)]
    if shape == "texts":
        pairs += [text(str(n)) + struct.pack("<I", 8) + text(b"t" * 900 * kib) for n in range(250)]
    if shape == "arrays":
        numbers = struct.pack("<IIQ", 9, 10, 4096) + bytes(8 * 4096)
        pairs += [text(str(n)) + numbers for n in range(7000)]
    if shape == "tensors":
        tensors = [tensor(f"t{n}", [0]) for n in range(1 << 16)]
    if shape == "strings":
        empty = struct.pack("<IIQ", 9, 8, 1 << 21) + bytes(8 << 21)
        pairs += [text(str(n)) + empty for n in range(3)]
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)))
        file.writelines(pairs)
        file.writelines(tensors)
        file.write(bytes(64))
    before, after, found = read_apart(path)
    assert found[0] == ("DamagedGguf" if shape in ("long-keys", "strings") else 0)
    assert after - before < 100 * kib


def test_a_disk_that_gives_less_than_it_is_asked_for_is_asked_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_header(model)
    real = os.pread
    monkeypatch.setattr(
        "meshnode.models.cursor.os.pread", lambda fd, count, at: real(fd, -(-count // 2), at)
    )
    assert read_header(model) == whole
