"""What becomes of headers that lie: one sentence, whatever the bytes."""

import math
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshnode.errors import ModelError
from meshnode.models.facts import read_facts
from meshnode.models.header import DamagedGguf, NotGguf, TruncatedGguf, read_header
from tests.engine.synthetic import make_model
from tests.meshnode.models.headers_by_hand import (
    GEMMA,
    MAMBA,
    PAIRS,
    U32,
    U64,
    float_pair,
    gguf_bytes,
    number_pair,
    signed_pair,
    string_pair,
    tensor,
    text,
    written,
)

ARRAY = text("x") + U32.pack(9)
HOSTILE = {
    "version-1": (gguf_bytes(version=1), NotGguf),
    "version-9": (gguf_bytes(version=9), NotGguf),
    "big-endian": (gguf_bytes(version=3 << 24), NotGguf),
    "absurd-tensor-count": (gguf_bytes(counts=(2**63, 0)), DamagedGguf),
    "absurd-key-count": (gguf_bytes(counts=(0, 2**63)), DamagedGguf),
    "key-past-the-end": (gguf_bytes((U64.pack(60000),)), TruncatedGguf),
    "absurd-key": (gguf_bytes((U64.pack(2**62),)), DamagedGguf),
    "key-of-no-text": (gguf_bytes((text(b"\xff") + U32.pack(0) + b"\0",)), DamagedGguf),
    "text-past-the-end": (gguf_bytes((text("x") + U32.pack(8) + U64.pack(2**62),)), TruncatedGguf),
    "unknown-value-type": (gguf_bytes((text("x") + U32.pack(13),)), DamagedGguf),
    "array-of-arrays": (gguf_bytes((ARRAY + U32.pack(9) + U64.pack(1),)), DamagedGguf),
    "absurd-array": (gguf_bytes((ARRAY + U32.pack(0) + U64.pack(2**60),)), DamagedGguf),
    "array-past-the-end": (gguf_bytes((ARRAY + U32.pack(10) + U64.pack(2**23),)), TruncatedGguf),
    "key-twice": (gguf_bytes((*PAIRS, PAIRS[0])), DamagedGguf),
    "no-architecture": (gguf_bytes(()), NotGguf),
    "number-for-architecture": (gguf_bytes((number_pair("general.architecture", 1),)), NotGguf),
    "no-layers": (gguf_bytes((PAIRS[0], number_pair("llama.block_count", 0))), NotGguf),
    "layers-missing": (gguf_bytes(PAIRS[:1]), DamagedGguf),
    "layers-absurd": (
        gguf_bytes((PAIRS[0], number_pair("llama.block_count", 2**31))),
        DamagedGguf,
    ),
    "layers-text": (gguf_bytes((PAIRS[0], string_pair("llama.block_count", "1"))), DamagedGguf),
    "alignment-0": (gguf_bytes((*PAIRS, number_pair("general.alignment", 0))), DamagedGguf),
    "alignment-24": (gguf_bytes((*PAIRS, number_pair("general.alignment", 24))), DamagedGguf),
    "alignment-text": (gguf_bytes((*PAIRS, string_pair("general.alignment", "a"))), DamagedGguf),
    "heads-too-few": (
        gguf_bytes(
            (
                *PAIRS,
                text("llama.attention.head_count_kv") + U32.pack(9) + U32.pack(4) + U64.pack(0),
            )
        ),
        DamagedGguf,
    ),
    "unnamed-tensor": (gguf_bytes(tensors=(tensor("", [4]),)), DamagedGguf),
    "long-named-tensor": (gguf_bytes(tensors=(tensor("n" * 64, [4]),)), DamagedGguf),
    "tensor-named-in-two-lines": (gguf_bytes(tensors=(tensor("a\nb", [4]),)), DamagedGguf),
    "tensor-named-in-no-text": (gguf_bytes(tensors=(tensor(b"\xff\xfe", [4]),)), DamagedGguf),
    "five-dimensions": (gguf_bytes(tensors=(tensor("t", [1] * 5),)), DamagedGguf),
    "unknown-tensor-type": (gguf_bytes(tensors=(tensor("t", [4], type=4),)), NotGguf),
    "half-a-block": (gguf_bytes(tensors=(tensor("t", [4], type=8),)), DamagedGguf),
    "overflowing-shape": (gguf_bytes(tensors=(tensor("t", [2**62, 4]),)), DamagedGguf),
    "data-past-the-end": (gguf_bytes(tensors=(tensor("t", [1000]),)), TruncatedGguf),
    "offset-past-the-end": (
        gguf_bytes(tensors=(tensor("t", [4], offset=2**60),)),
        TruncatedGguf,
    ),
    "unaligned": (gguf_bytes(tensors=(tensor("t", [4], offset=4),)), DamagedGguf),
    "one-over-another": (
        gguf_bytes(tensors=(tensor("t", [12]), tensor("u", [4], offset=32))),
        DamagedGguf,
    ),
    "same-tensor-twice": (
        gguf_bytes(tensors=(tensor("t", [4]), tensor("t", [4], offset=32))),
        DamagedGguf,
    ),
    "no-number": (
        gguf_bytes((*PAIRS, float_pair("llama.rope.freq_base", math.nan))),
        DamagedGguf,
    ),
    "negative-heads": (
        gguf_bytes((*PAIRS, signed_pair("llama.attention.key_length", -1))),
        DamagedGguf,
    ),
    "negative-window": (
        gguf_bytes(
            (
                string_pair("general.architecture", "gemma3"),
                *GEMMA,
                signed_pair("gemma3.attention.sliding_window", -4),
            )
        ),
        DamagedGguf,
    ),
    "more-experts-than-there-are": (
        gguf_bytes(
            (
                *PAIRS,
                number_pair("llama.expert_count", 4),
                number_pair("llama.expert_used_count", 5),
            )
        ),
        DamagedGguf,
    ),
    "layers-that-are-not-there": (
        gguf_bytes(
            (*PAIRS[:1], *PAIRS[2:], number_pair("llama.block_count", 3)), (tensor("blk.1.x", [4]),)
        ),
        DamagedGguf,
    ),
    "state-without-a-size": (
        gguf_bytes((string_pair("general.architecture", "mamba"), *MAMBA)),
        DamagedGguf,
    ),
    "too-many-keys": (gguf_bytes(counts=(0, (1 << 14) + 1)), DamagedGguf),
    "too-many-strings": (gguf_bytes((ARRAY + U32.pack(8) + U64.pack((1 << 22) + 1),)), DamagedGguf),
    "layer-too-many": (gguf_bytes(tensors=(tensor("blk.1.x", [4]),)), DamagedGguf),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    content, kind = HOSTILE[name]
    with pytest.raises(kind) as refused:
        read_facts(written(tmp_path, content))
    assert str(tmp_path) in str(refused.value)
    assert str(refused.value).isprintable(), "one sentence"


def test_an_architecture_s_name_commands_no_terminal(tmp_path: Path) -> None:
    content = gguf_bytes((string_pair("general.architecture", "\x1b]0;x\x07" + "y" * 999),))
    with pytest.raises(DamagedGguf) as refused:
        read_facts(written(tmp_path, content))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300


def test_a_header_larger_than_any_models_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnode.models.cursor.MAX_HEADER_BYTES", 100)
    monkeypatch.setattr("meshnode.models.cursor.WINDOW_BYTES", 10)
    with pytest.raises(DamagedGguf, match="larger than any"):
        read_header(written(tmp_path, gguf_bytes()))


def test_a_file_that_shrinks_while_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, gguf_bytes())
    real = os.fstat

    def larger(fd: int) -> os.stat_result:
        found = real(fd)
        return os.stat_result([*found[:6], 10**6, *found[7:10]])

    monkeypatch.setattr("meshnode.models.header.os.fstat", larger)
    head = path.read_bytes()[:40]
    path.write_bytes(head)
    with pytest.raises(TruncatedGguf, match="shrank"):
        read_header(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    return make_model(folder / "a.gguf", layers=2, width=32, vocab=260, heads=1, ffn=32)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.sampled_from([1, 4, 8]),
            st.binary(min_size=8, max_size=8),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_mutated_header_gives_facts_or_a_sentence(
    small: Path, changes: list[tuple[float, int, bytes]]
) -> None:
    content = bytearray(small.read_bytes())
    header_end = min(t.offset for t in read_facts(small).tensors)
    for place, width, value in changes:
        # Vocabularies are most of the header and dull: aim at both ends of it.
        at = int(place * 2 * 3000)
        at = at if at < 3000 else header_end - 6000 + at
        content[at : at + width] = value[:width]
    path = written(small.parent, bytes(content), "mutated.gguf")
    try:
        read_facts(path)
    except ModelError:
        return


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=400))
def test_no_bytes_upset_the_reader(small: Path, rest: bytes) -> None:
    for content in (rest, gguf_bytes((*PAIRS, rest), counts=(1, len(PAIRS) + 1))):
        try:
            read_facts(written(small.parent, content, "noise.gguf"))
        except ModelError:
            continue
