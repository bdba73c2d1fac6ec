"""What a model needs and has, from its headers alone: layers, bytes a layer, KV cache a token.

A model is one GGUF file, or the shards `NAME-00001-of-000NN.gguf` … beside one another
(llama.cpp's split_path). Names of tensors and keys: gguf-py constants, llama-arch.cpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meshnode.errors import ModelError
from meshnode.models.classes import read_bytes
from meshnode.models.gguf_constants import file_type_name
from meshnode.models.header import (
    ArrayValue,
    DamagedGguf,
    Header,
    HeaderTensor,
    NotGguf,
)
from meshnode.models.header_bounds import read_headers
from meshnode.models.intermediates import NO_INTERMEDIATES, Intermediates, intermediates
from meshnode.models.kv import LayerMemory
from meshnode.models.layer_memory import layer_memory, read_heads
from meshnode.models.metadata import Metadata, template_of
from meshnode.models.needs import TensorClass, classify, layer_of

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_SHARDS = 999
MAX_NAME_CHARS = 256  # as long as a file's name may be
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_WITH_EMPTY_LAYERS = ("deci", "hrm_text")
"""Architectures whose last layers may have no weights: skipped, or those of others once more."""
_NEXTN = re.compile(r"^blk\.\d+\.nextn\.eh_proj\.weight$")
_EMBEDDING = ("token_embd", "token_types", "position_embd", "per_layer_token_embd")
_RECURRENT = re.compile(r"^blk\.\d+\.(ssm_|time_mix_|shortconv\.)")


class MissingShard(ModelError):
    """A model's shards are not all there."""


@dataclass(frozen=True)
class TensorFacts:
    """One tensor: `ne` innermost first, `offset` in the file `ModelFacts.files[file_index]`."""

    name: str
    type: int
    ne: tuple[int, int, int, int]
    nbytes: int
    offset: int
    file_index: int


@dataclass(frozen=True)
class ModelFacts:
    """A model as its headers describe it.

    `layer_bytes`: weights of each layer, of which one token reads `read_bytes`. `embedding_bytes`:
    what the input needs, on the local CPU always. `output_bytes`: what the output needs, the
    embedding counted again where it serves as output too (the engine loads it twice when the output
    lies on another device): that part is `tied_bytes`. `other_bytes`: tensors of neither. `n_attn`:
    numbers a token's queries have; `n_ff`: those in the middle of its feed-forward part, of all the
    experts used. `memory`: what each layer keeps of conversations. `has_nextn`: its last layers,
    `n_nextn`, predict further tokens (MTP). `is_recurrent`: a state is carried from token to token
    that cannot be taken back. `chat_template`: None without one, empty where it is longer than any.
    `quantization`: the file's word for its mixture of types, like `Q4_K_M`, if it has one.
    `intermediates`: what computing takes besides the widths.
    """

    path: Path
    files: tuple[Path, ...]
    arch: str
    name: str
    n_layers: int
    n_embd: int
    n_attn: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    n_head_kv: tuple[int, ...]
    head_dim_k: int
    head_dim_v: int
    n_expert: int
    tensors: tuple[TensorFacts, ...]
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    output_bytes: int
    other_bytes: int
    memory: tuple[LayerMemory, ...]
    tied_bytes: int
    header_digest: bytes
    has_nextn: bool = False
    n_nextn: int = 0
    is_recurrent: bool = False
    n_expert_used: int = 0
    read_bytes: tuple[int, ...] = ()
    chat_template: str | None = None
    quantization: str = ""
    intermediates: Intermediates = NO_INTERMEDIATES

    @property
    def weight_bytes(self) -> int:
        """Every tensor in the files, once."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(tensor.ne) for tensor in self.tensors)

    @property
    def kv_bytes_per_token_per_layer(self) -> tuple[int, ...]:
        """At f16, of a conversation without end: windows and states do not grow with it."""
        return tuple(memory.bytes_per_token for memory in self.memory)


def shard_paths(path: Path) -> tuple[Path, ...]:
    """Every shard of the model that `path` belongs to, the first one first; (path,) for one
    file. They need not exist."""
    found = _SHARD.fullmatch(path.name)
    if not found:
        return (path,)
    count = int(found["count"])
    if not 1 <= int(found["number"]) <= count <= MAX_SHARDS:
        raise NotGguf(f"{path} is named like a shard that cannot be: check its name")
    return tuple(
        path.with_name(f"{found['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    )


def read_facts(path: Path) -> ModelFacts:
    """The facts of the model at `path`, which may be any of its shards. Blocks for the headers.

    Raises `ModelError` or one of its kinds (`NotGguf`, `TruncatedGguf`, `DamagedGguf`,
    `MissingShard`), nothing else.
    """
    files = shard_paths(path)
    if len(files) > 1:
        missing = [shard.name for shard in files if not shard.is_file()]
        if missing:
            raise MissingShard(
                f"{files[0].parent} lacks {len(missing)} of the model's {len(files)} files, first "
                f"{missing[0]}: put them beside one another"
            )
    return facts_of(read_headers(files))


def facts_of(headers: Sequence[Header]) -> ModelFacts:
    """The facts of a model from the headers of all its files, in order. Raises as `read_facts`."""
    _check_shards(headers)
    metadata = Metadata(headers[0])
    tensors = tuple(
        _tensor(tensor, index) for index, header in enumerate(headers) for tensor in header.tensors
    )
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise DamagedGguf(
            f"{headers[0].path} has a tensor in two of its files: download them again"
        )
    return _facts(headers, metadata, tensors)


def _facts(
    headers: Sequence[Header], metadata: Metadata, tensors: tuple[TensorFacts, ...]
) -> ModelFacts:
    n_layers = metadata.number("block_count", most=MAX_LAYERS)
    if not n_layers:
        raise NotGguf(f"{headers[0].path} has no layers: it is not a language model")
    n_embd = metadata.number("embedding_length")
    heads = read_heads(metadata, n_layers, n_embd)
    n_nextn = min(n_layers, metadata.number("nextn_predict_layers", default=0))
    has_nextn = any(_NEXTN.search(tensor.name) for tensor in tensors)
    n_expert = metadata.number("expert_count", default=0)
    used = metadata.each_layer("expert_used_count", n_layers, default=0)
    memory = layer_memory(metadata, heads, n_embd=n_embd, n_nextn=n_nextn, has_nextn=has_nextn)
    _check_counts(headers[0].path, n_expert, used)
    sizes = _Sizes(tensors, metadata.arch, n_expert, used, headers[0].path)
    if metadata.arch not in _WITH_EMPTY_LAYERS:
        sizes.check_last_layer(n_layers - n_nextn, headers[0].path)
    return ModelFacts(
        path=headers[0].path,
        files=tuple(header.path for header in headers),
        arch=metadata.arch,
        name=_name(metadata, headers[0].path),
        n_layers=n_layers,
        n_embd=n_embd,
        n_attn=max(heads.n_head) * max(heads.k, heads.k_swa),
        n_ff=_feed_forward_width(metadata, n_layers),
        n_vocab=_vocabulary_size(metadata, tensors),
        n_ctx_train=metadata.number("context_length", default=0, most=1 << 32),
        n_head_kv=heads.n_head_kv,
        head_dim_k=heads.k,
        head_dim_v=heads.v,
        n_expert=n_expert,
        tensors=tensors,
        layer_bytes=tuple(sizes.layers),
        embedding_bytes=sizes.embedding,
        output_bytes=sizes.output,
        other_bytes=sizes.other,
        memory=memory,
        tied_bytes=sizes.tied,
        header_digest=headers[0].digest,
        n_nextn=n_nextn,
        has_nextn=has_nextn,
        is_recurrent=any(layer.state_bytes for layer in memory)
        or any(_RECURRENT.search(tensor.name) for tensor in tensors),
        n_expert_used=max(used),
        read_bytes=tuple(sizes.read),
        chat_template=template_of(metadata),
        quantization=file_type_name(metadata.get("general.file_type")),
        intermediates=intermediates(metadata, heads, n_embd),
    )


def _check_counts(path: Path, n_expert: int, n_expert_used: tuple[int, ...]) -> None:
    if n_expert and max(n_expert_used) > n_expert:
        raise DamagedGguf(
            f"{path} is damaged: a token is to use {max(n_expert_used)} of its {n_expert} experts; "
            "download it again"
        )


def _name(metadata: Metadata, path: Path) -> str:
    """`general.name`, else the file's name without its shard number; fit to be shown."""
    name = metadata.get("general.name")
    return shown_name(name if isinstance(name, str) and name.strip() else model_name(path))


def _feed_forward_width(metadata: Metadata, n_layers: int) -> int:
    """The widest layer's, over all the experts a token uses."""
    dense = max(metadata.each_layer("feed_forward_length", n_layers, default=0))
    used = max(metadata.each_layer("expert_used_count", n_layers, default=0))
    each = max(metadata.each_layer("expert_feed_forward_length", n_layers, default=0)) or dense
    shared = metadata.number("expert_shared_feed_forward_length", default=0)
    return max(dense, used * each + shared)


def _vocabulary_size(metadata: Metadata, tensors: tuple[TensorFacts, ...]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, ArrayValue):
        return tokens.count
    if metadata.has("vocab_size"):
        return metadata.number("vocab_size")
    return next((t.ne[1] for t in tensors if t.name == "token_embd.weight"), 0)


class _Sizes:
    """Bytes by where the engine puts them."""

    def __init__(
        self,
        tensors: tuple[TensorFacts, ...],
        arch: str,
        n_expert: int,
        n_expert_used: tuple[int, ...],
        path: Path,
    ) -> None:
        n_layers = len(n_expert_used)
        self.layers = [0] * n_layers
        self.read = [0] * n_layers
        self.embedding = self.output = self.other = 0
        self.last_layer = -1
        token_embedding = 0
        tied = True
        for tensor in tensors:
            layer = layer_of(tensor.name)
            self.last_layer = max(self.last_layer, -1 if layer is None else layer)
            kind = classify(tensor.name, arch) if layer is None else None
            if kind is TensorClass.FIRST_LAYER:
                layer = 0
            if layer is not None:
                if layer >= n_layers:
                    raise DamagedGguf(f"{path} is damaged: {tensor.name} is of a layer too many")
                self.layers[layer] += tensor.nbytes
                self.read[layer] += read_bytes(tensor, n_expert, n_expert_used[layer])
            elif kind is TensorClass.OUTPUT:
                self.output += tensor.nbytes
                tied = tied and tensor.name != "output.weight"
            elif tensor.name.startswith(_EMBEDDING):
                self.embedding += tensor.nbytes
                if tensor.name == "token_embd.weight":
                    token_embedding = tensor.nbytes
            else:
                self.other += tensor.nbytes
        tied = tied and "bert" not in arch and arch != "bitnet"
        self.tied = token_embedding if tied else 0
        self.output += self.tied

    def check_last_layer(self, n_layers: int, path: Path) -> None:
        """A model that has layers has all that it announces, to the last one."""
        found = self.last_layer + 1
        if 0 < found < n_layers:
            raise DamagedGguf(
                f"{path} is damaged: it announces {n_layers} layers and holds the first {found}; "
                "download it again"
            )


def model_name(path: Path) -> str:
    """The file's name without `.gguf` and shard number."""
    found = _SHARD.fullmatch(path.name)
    return found["stem"] if found else path.name.removesuffix(".gguf")


def shown_name(name: str) -> str:
    """A name out of a file that others made: one line, and nothing that commands a terminal."""
    clipped = name[:MAX_NAME_CHARS]
    return "".join(char if char.isprintable() else "?" for char in clipped)


def _check_shards(headers: Sequence[Header]) -> None:
    """The headers agree with the files' names on how many there are, and on their order."""
    first = headers[0]
    for index, header in enumerate(headers):
        count = header.metadata.get("split.count", 1)
        number = header.metadata.get("split.no", 0)
        if count in (0, 1) and len(headers) == 1:
            return  # a model in one file, whatever its name
        if count != len(headers) or number != index:
            raise MissingShard(
                f"{header.path} says it is file {number} (from 0) of {count}, which its name does "
                f"not: give the files back their names, like {model_name(header.path)}"
                "-00001-of-00002.gguf"
            )
    announced = first.metadata.get("split.tensors.count")
    held = sum(len(header.tensors) for header in headers)
    if announced is not None and announced != held:
        raise MissingShard(
            f"{first.path} announces {announced} tensors and the files hold {held}: they are not "
            "of one model; download them again"
        )


def _tensor(tensor: HeaderTensor, file_index: int) -> TensorFacts:
    return TensorFacts(
        tensor.name, tensor.type, tensor.ne, tensor.nbytes, tensor.offset, file_index
    )
