"""The demo model as a GGUF file: its dimensions, its chat template, how it is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BOS, USER, ASSISTANT, END = SPECIALS = ("<|bos|>", "<|user|>", "<|assistant|>", "<|end|>")
# Every question starts with a space, so its first word is the same token as elsewhere. A system
# message is read, or llama-server would put it in front of the question, and then left out.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set text = (message['content'] or '') | trim %}"
    "{% if message['role'] == 'user' %}{{ '<|user|> ' + text + '<|end|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + text + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The model's dimensions. Rows are multiples of 32, a Q8_0 block."""

    layers: int = 8
    width: int = 128
    heads: int = 2
    ffn: int = 256
    vocab: int = 2048
    context: int = 512
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5


def write_gguf(path: Path, parameters: dict[str, Any], shape: Shape, tokenizer: Any) -> None:
    """Q8_0 matrices, F32 norms, tokenizer and chat template in one file."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("mesh-demo")
    writer.add_description("Answers questions about mesh. Ships with the package.")
    writer.add_license("MIT")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    _add_tokenizer(writer, tokenizer, shape.vocab)
    for name, tensor in parameters.items():
        values = tensor.numpy().astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, vocab: int) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if len(tokens) != vocab:
        raise ValueError(f"the corpus gives {len(tokens)} tokens, the model has {vocab}")
    kinds = [
        gguf.TokenType.CONTROL if token in SPECIALS else gguf.TokenType.NORMAL for token in tokens
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokens.index(BOS))
    writer.add_eos_token_id(tokens.index(END))
    writer.add_eot_token_id(tokens.index(END))
    writer.add_pad_token_id(tokens.index(END))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
