"""Whether two models speak of the same tokens: one may guess for the other only then.

The rule is llama.cpp's (`common_speculative_are_compatible`, common/speculative.cpp): one kind of
tokenizer, sizes that differ by a few at most, the same texts. It is applied to the headers, before
anything is deployed; llama-server applies it again, to what it has loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meshnode.models.facts import shard_paths
from meshnode.models.header import read_strings

MAX_SIZE_DIFFERENCE = 128  # SPEC_VOCAB_MAX_SIZE_DIFFERENCE
FIRST_COMPARED = 5  # SPEC_VOCAB_CHECK_START_TOKEN_ID: the first few are control tokens


@dataclass(frozen=True)
class Vocabulary:
    """`kind`: the tokenizer's, like `gpt2`; `tokens`: their texts as the file has them."""

    kind: str
    tokens: tuple[bytes, ...]


def read_vocabulary(path: Path) -> Vocabulary:
    """Blocks for the header, which holds all of it. Raises `ModelError`."""
    header, tokens = read_strings(shard_paths(path)[0], "tokenizer.ggml.tokens")
    return Vocabulary(str(header.metadata.get("tokenizer.ggml.model", "")), tokens)


def difference(one: Vocabulary, other: Vocabulary) -> str | None:
    """What keeps `other` from guessing for `one`, in words that complete "they differ: …"."""
    if one.kind != other.kind:
        return f"their tokenizers are {one.kind or 'none'} and {other.kind or 'none'}"
    sizes = len(one.tokens), len(other.tokens)
    if abs(sizes[0] - sizes[1]) > MAX_SIZE_DIFFERENCE:
        return f"they have {sizes[0]} and {sizes[1]} tokens"
    pairs = zip(one.tokens, other.tokens, strict=False)
    for index, (text, other_text) in enumerate(pairs):
        if index >= FIRST_COMPARED and text != other_text:
            return f"token {index} is {_shown(text)} and {_shown(other_text)}"
    return None


def _shown(text: bytes) -> str:
    return repr(text.decode("utf-8", "backslashreplace")[:40])
