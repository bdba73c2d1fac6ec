"""What headers say, and what becomes of headers that lie."""

import math
import os
import random
from pathlib import Path

import gguf
import numpy as np
import pytest

from meshnode.errors import ModelError
from meshnode.models.catalog import Catalog
from meshnode.models.facts import MAX_NAME_CHARS, MissingShard, read_facts, shard_paths
from meshnode.models.header import (
    ArrayValue,
    DamagedGguf,
    Header,
    NotGguf,
    TruncatedGguf,
    read_header,
)
from tests.engine.synthetic import make_model
from tests.meshnode.models.headers_by_hand import (
    PAIRS,
    U32,
    U64,
    float_pair,
    gguf_bytes,
    number_pair,
    string_pair,
    tensor,
    text,
    written,
)


def array(header: Header, key: str) -> ArrayValue:
    value = header.metadata[key]
    assert isinstance(value, ArrayValue)
    return value


def test_the_facts_of_a_model_are_those_it_was_made_with(tmp_path: Path) -> None:
    facts = read_facts(make_model(tmp_path / "a.gguf", layers=3, width=256, vocab=512, heads=4))
    assert (facts.arch, facts.name, facts.n_layers) == ("llama", "synthetic", 3)
    assert (facts.n_embd, facts.n_vocab, facts.n_ctx_train) == (256, 512, 4096)
    assert (facts.n_head_kv, facts.head_dim_k, facts.head_dim_v) == ((4, 4, 4), 64, 64)
    assert facts.kv_bytes_per_token_per_layer == (4 * (64 + 64) * 2,) * 3
    assert (facts.n_ff, facts.tied_bytes) == (512, 0)
    assert len(set(facts.layer_bytes)) == 1
    total = sum(facts.layer_bytes) + facts.embedding_bytes + facts.output_bytes
    assert total + facts.other_bytes == facts.weight_bytes
    assert facts.files == (tmp_path / "a.gguf",)


def test_every_tensor_lies_where_the_gguf_package_says(tmp_path: Path) -> None:
    path = make_model(tmp_path / "a.gguf", layers=2, experts=4)
    ours = {t.name: (t.type, t.ne, t.nbytes, t.offset) for t in read_facts(path).tensors}
    theirs = {
        t.name: (
            int(t.tensor_type),
            tuple([*map(int, t.shape), 1, 1, 1][:4]),
            int(t.n_bytes),
            int(t.data_offset),
        )
        for t in gguf.GGUFReader(str(path)).tensors
    }
    assert ours == theirs


def test_a_tied_output_is_counted_again(tmp_path: Path) -> None:
    tied = read_facts(make_model(tmp_path / "t.gguf", tied=True))
    apart = read_facts(make_model(tmp_path / "a.gguf"))
    assert tied.tied_bytes == tied.embedding_bytes
    assert tied.weight_bytes == sum(tied.layer_bytes) + tied.output_bytes + tied.other_bytes
    assert apart.output_bytes == apart.weight_bytes - sum(apart.layer_bytes) - apart.embedding_bytes


def test_a_mixture_is_as_wide_as_the_experts_a_token_uses(tmp_path: Path) -> None:
    facts = read_facts(make_model(tmp_path / "a.gguf", experts=4, ffn=512))
    assert (facts.n_expert, facts.n_ff, facts.n_attn) == (4, 2 * 512, 256)


def test_shards_are_found_from_any_of_them_and_read_as_one(tmp_path: Path) -> None:
    first = make_model(tmp_path / "s.gguf", shards=3)
    whole = read_facts(make_model(tmp_path / "w.gguf"))
    facts = read_facts(shard_paths(first)[1])
    assert facts.path == first
    assert [path.name for path in facts.files] == [f"s-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert {t.file_index for t in facts.tensors} == {0, 1, 2}
    assert facts.layer_bytes == whole.layer_bytes
    assert facts.header_digest == whole.header_digest


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    first = make_model(tmp_path / "s.gguf", shards=3)
    shard_paths(first)[1].unlink()
    with pytest.raises(MissingShard, match=r"lacks 1 of the model's 3 files, first s-00002-of"):
        read_facts(first)


def test_shards_under_wrong_names_are_told(tmp_path: Path) -> None:
    one, two = shard_paths(make_model(tmp_path / "s.gguf", shards=2))
    two.rename(tmp_path / "t")
    one.rename(two)
    (tmp_path / "t").rename(one)
    with pytest.raises(MissingShard, match="give the files back their names"):
        read_facts(one)
    alone = written(tmp_path, two.read_bytes(), "alone.gguf")
    with pytest.raises(MissingShard, match="says it is file 0"):
        read_facts(alone)


def test_shards_of_two_models_are_told(tmp_path: Path) -> None:
    one, two = shard_paths(make_model(tmp_path / "s.gguf", shards=2))
    shard_paths(make_model(tmp_path / "o.gguf", shards=2, layers=6))[1].rename(two)
    with pytest.raises(MissingShard, match="they are not of one model"):
        read_facts(one)


def test_a_tensor_in_two_shards_is_told(tmp_path: Path) -> None:
    for number in (0, 1):
        split = (number_pair("split.count", 2), number_pair("split.no", number))
        content = gguf_bytes((*PAIRS, *split), (tensor("t", [4]),))
        written(tmp_path, content, f"s-0000{number + 1}-of-00002.gguf")
    with pytest.raises(DamagedGguf, match="in two of its files"):
        read_facts(tmp_path / "s-00001-of-00002.gguf")


@pytest.mark.parametrize("name", ["a-00000-of-00002.gguf", "a-00003-of-00002.gguf"])
def test_an_impossible_shard_name_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotGguf, match="shard that cannot be"):
        read_facts(tmp_path / name)


def test_a_numbered_name_on_a_whole_model_is_no_harm(tmp_path: Path) -> None:
    path = make_model(tmp_path / "a.gguf").rename(tmp_path / "a-00001-of-00001.gguf")
    assert read_facts(path).n_layers == 4


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        read_facts(tmp_path / "gone.gguf")
    with pytest.raises(NotGguf, match="is not a file"):
        read_facts(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(NotGguf, match="is not a file"):
        read_facts(tmp_path / "pipe.gguf")
    with pytest.raises(ModelError, match="cannot be read"):
        read_facts(tmp_path / ("n" * 300))


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04" + bytes(100), b"<html>"])
def test_what_is_no_gguf_is_told(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(NotGguf, match="is not a GGUF file"):
        read_facts(written(tmp_path, content))


def test_a_model_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = make_model(tmp_path / "a.gguf", layers=1, width=32, vocab=260, heads=1, ffn=32)
    content = whole.read_bytes()
    header_end = min(t.offset for t in read_facts(whole).tensors)
    rng = random.Random(1)
    for kept in [*range(4, header_end, 37), *rng.sample(range(header_end, len(content) - 32), 20)]:
        with pytest.raises(TruncatedGguf, match="truncated"):
            read_facts(written(tmp_path, content[:kept], "cut.gguf"))


def test_a_header_that_only_looks_odd_is_read(tmp_path: Path) -> None:
    per_layer = text("llama.attention.head_count_kv") + U32.pack(9) + U32.pack(4)
    pairs = (
        *PAIRS,
        per_layer + U64.pack(1) + U32.pack(1),
        number_pair("llama.vocab_size", 77),
        text("scores") + U32.pack(9) + U32.pack(6) + U64.pack(20000) + bytes(80000),
        text("flags") + U32.pack(9) + U32.pack(7) + U64.pack(2) + b"\x01\x02",
        text("general.name") + U32.pack(8) + text(b"\xff name"),
    )
    tensors = (tensor("empty", [0]), tensor("rope_freqs.weight", [4]))
    facts = read_facts(written(tmp_path, gguf_bytes(pairs, tensors)))
    assert (facts.n_head_kv, facts.n_vocab, facts.other_bytes) == ((1,), 77, 16)
    assert facts.name == "\\xff name"
    header = read_header(tmp_path / "m.gguf")
    assert array(header, "scores").count == 20000
    assert array(header, "flags").items == (True, True)


def test_an_infinity_is_a_number(tmp_path: Path) -> None:
    """llama.cpp writes one where a bound is none."""
    pair = float_pair("llama.kda.gate_lower_bound", -math.inf)
    assert read_facts(written(tmp_path, gguf_bytes((*PAIRS, pair)))).n_layers == 1


def test_a_template_is_kept_if_it_is_not_endless(tmp_path: Path) -> None:
    def template(value: str) -> str | None:
        pair = string_pair("tokenizer.chat_template", value)
        return read_facts(written(tmp_path, gguf_bytes((*PAIRS, pair)))).chat_template

    assert template("{{ messages }}") == "{{ messages }}"
    assert template("x" * (1 << 20) + "y") == "", "there is one, too long to be shown"
    assert read_facts(written(tmp_path, gguf_bytes())).chat_template is None


def test_the_word_for_a_quantization_is_the_files(tmp_path: Path) -> None:
    def word(*pairs: bytes) -> str:
        return read_facts(written(tmp_path, gguf_bytes((*PAIRS, *pairs)))).quantization

    assert word(number_pair("general.file_type", 15)) == "Q4_K_M"
    assert word(number_pair("general.file_type", 0)) == "F32"
    assert word(number_pair("general.file_type", 99999)) == word() == ""


def test_a_name_commands_no_terminal(tmp_path: Path) -> None:
    hostile = "\x1b]0;owned\x07\nready\u202e" + "x" * 1000
    pair = text("general.name") + U32.pack(8) + text(hostile.encode())
    facts = read_facts(written(tmp_path, gguf_bytes((*PAIRS, pair), (tensor("empty", [0]),))))
    assert facts.name.startswith("?]0;owned??ready?xxx")
    assert len(facts.name) == MAX_NAME_CHARS
    (tmp_path / "m.gguf").rename(tmp_path / "a\nb.gguf")
    catalog = Catalog((tmp_path,))
    catalog.scan()
    assert [entry.name for entry in catalog.models()] == ["a?b"]
    assert catalog.resolve(facts.name) == tmp_path / "a\nb.gguf", "found by what is shown"


def test_a_model_without_a_vocabulary_is_measured_by_its_embedding(tmp_path: Path) -> None:
    embedding = tensor("token_embd.weight", [4, 3])
    positions = tensor("position_embd.weight", [4], offset=64)
    content = gguf_bytes(tensors=(embedding, positions), data=bytes(96))
    facts = read_facts(written(tmp_path, content))
    assert (facts.n_vocab, facts.name) == (3, "m")
    assert (facts.embedding_bytes, facts.tied_bytes) == (48 + 16, 48)


def test_a_big_vocabulary_is_walked_over_in_bounded_memory(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "v.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_token_list([f"token {n}" for n in range(150_000)])
    writer.add_tensor("token_embd.weight", np.zeros((4, 64), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "v.gguf")
    assert array(header, "tokenizer.ggml.tokens").count == 150_000
    assert array(header, "tokenizer.ggml.tokens").items == ()
    assert read_facts(tmp_path / "v.gguf").n_vocab == 150_000
