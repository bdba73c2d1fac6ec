"""Models whose weights are all zero: large enough to be read from memory, and no bytes on a disk.

What a device takes for a token depends on how many bytes it reads, not on which. So a file is a
header and a hole, which a file system keeps in a few kilobytes; read into memory (never mapped, or
all of it would be one page of zeros) it is as large as any other. Sans-IO. •
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

VOCAB, CONTEXT = 256, 2048
ALIGNMENT = 32
F32, Q8_0 = 0, 8
BLOCK, BLOCK_BYTES = 32, 34
_UINT32, _FLOAT32, _STRING = 4, 6, 8


@dataclass(frozen=True)
class Shape:
    """A llama of so many layers."""

    name: str
    layers: int
    width: int
    ffn: int
    heads: int

    @property
    def token_bytes(self) -> int:
        """Of the weights that one token reads: all but the embedding, of which it reads a row."""
        names = (one for one in _tensors(self) if one[0] != "token_embd.weight")
        return sum(_nbytes(shape) for _, shape in names)

    @property
    def layer_bytes(self) -> int:
        """Of one layer's weights."""
        names = (one for one in _tensors(self) if one[0].startswith("blk.0."))
        return sum(_nbytes(shape) for _, shape in names)

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return len(header(self)) + sum(_padded(_nbytes(shape)) for _, shape in _tensors(self))


WIDE = Shape("wide", layers=4, width=2048, ffn=5632, heads=16)
"""220 MB: more than processors keep near them."""
NARROW = Shape("narrow", layers=2, width=1024, ffn=2816, heads=8)
"""Beside the wide one it shows what depends on widths and not on weights."""
TINY = Shape("tiny", layers=16, width=64, ffn=192, heads=1)
"""Hardly anything to compute: it takes what any layer takes."""
SHAPES = (WIDE, NARROW, TINY)


def header(model: Shape) -> bytes:
    """Everything before the weights."""
    pairs = [
        _pair("general.architecture", _text("llama"), _STRING),
        _pair("llama.vocab_size", struct.pack("<I", VOCAB), _UINT32),
        _pair("llama.context_length", struct.pack("<I", CONTEXT), _UINT32),
        _pair("llama.embedding_length", struct.pack("<I", model.width), _UINT32),
        _pair("llama.block_count", struct.pack("<I", model.layers), _UINT32),
        _pair("llama.feed_forward_length", struct.pack("<I", model.ffn), _UINT32),
        _pair("llama.attention.head_count", struct.pack("<I", model.heads), _UINT32),
        _pair("llama.rope.dimension_count", struct.pack("<I", model.width // model.heads), _UINT32),
        _pair("llama.attention.layer_norm_rms_epsilon", struct.pack("<f", 1e-5), _FLOAT32),
        _pair("tokenizer.ggml.model", _text("no_vocab"), _STRING),
    ]
    infos, offset = [], 0
    tensors = list(_tensors(model))
    for name, shape in tensors:
        kind = F32 if len(shape) == 1 else Q8_0
        infos.append(
            _text(name)
            + struct.pack("<I", len(shape))
            + b"".join(struct.pack("<Q", size) for size in shape)
            + struct.pack("<IQ", kind, offset)
        )
        offset += _padded(_nbytes(shape))
    counts = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs))
    text = counts + b"".join(pairs) + b"".join(infos)
    return text + bytes(_padded(len(text)) - len(text))


def _tensors(model: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, innermost first."""
    width, ffn = model.width, model.ffn
    yield "token_embd.weight", (width, VOCAB)
    for layer in range(model.layers):
        yield f"blk.{layer}.attn_norm.weight", (width,)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"blk.{layer}.{part}.weight", (width, width)
        yield f"blk.{layer}.ffn_norm.weight", (width,)
        yield f"blk.{layer}.ffn_gate.weight", (width, ffn)
        yield f"blk.{layer}.ffn_up.weight", (width, ffn)
        yield f"blk.{layer}.ffn_down.weight", (ffn, width)
    yield "output_norm.weight", (width,)
    yield "output.weight", (width, VOCAB)


def _nbytes(shape: tuple[int, ...]) -> int:
    if len(shape) == 1:
        return shape[0] * 4
    return shape[0] * shape[1] // BLOCK * BLOCK_BYTES


def _padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pair(key: str, value: bytes, kind: int) -> bytes:
    return _text(key) + struct.pack("<I", kind) + value
