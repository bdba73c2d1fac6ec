"""Which model may guess for which, told by their headers alone."""

from pathlib import Path

import gguf
import pytest

from meshnode.errors import ModelError
from meshnode.models.vocabulary import Vocabulary, difference, read_vocabulary

TOKENS = tuple(f"token {index}".encode() for index in range(300))
FULL = Vocabulary("gpt2", TOKENS)


def write(path: Path, tokens: list[str], kind: str = "gpt2") -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_the_tokens_are_read_from_the_header(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", ["<s>", "the", "schöne", ""])
    assert read_vocabulary(path) == Vocabulary("gpt2", (b"<s>", b"the", "schöne".encode(), b""))


def test_a_file_without_tokens_has_an_empty_vocabulary(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_uint32("tokenizer.ggml.tokens", 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_vocabulary(tmp_path / "m.gguf") == Vocabulary("", ())


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PNG")
    with pytest.raises(ModelError, match=r"m\.gguf is not a GGUF file"):
        read_vocabulary(tmp_path / "m.gguf")


def test_a_few_tokens_more_at_the_end_do_not_matter() -> None:
    assert difference(FULL, FULL) is None
    assert difference(FULL, Vocabulary("gpt2", TOKENS[:-128])) is None
    assert difference(FULL, Vocabulary("gpt2", TOKENS[:-129])) == "they have 300 and 171 tokens"


def test_control_tokens_at_the_start_may_differ_and_no_other() -> None:
    assert difference(FULL, Vocabulary("gpt2", (b"<|x|>",) * 5 + TOKENS[5:])) is None
    odd = Vocabulary("gpt2", (*TOKENS[:7], b"sept\xff", *TOKENS[8:]))
    assert difference(FULL, odd) == r"token 7 is 'token 7' and 'sept\\xff'"


def test_other_kinds_of_tokenizers_are_told() -> None:
    assert difference(FULL, Vocabulary("llama", TOKENS)) == "their tokenizers are gpt2 and llama"
    assert difference(FULL, Vocabulary("", ())) == "their tokenizers are gpt2 and none"
