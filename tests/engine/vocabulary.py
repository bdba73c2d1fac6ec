"""A tokenizer of words of our own, which both kinds of models that tests write have."""

from __future__ import annotations

from collections.abc import Iterable

import gguf

FIRST_WORD = 259


def add_vocabulary(writer: gguf.GGUFWriter, words: Iterable[str]) -> None:
    """Control tokens, one for each byte, then `words`, from `FIRST_WORD` on."""
    normal = list(words)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *normal]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types += [gguf.TokenType.BYTE] * 256
    types += [gguf.TokenType.NORMAL] * len(normal)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types([int(kind) for kind in types])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(False)
