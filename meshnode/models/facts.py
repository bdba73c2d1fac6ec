"""What a model needs and has, from its headers alone: layers, bytes a layer, KV cache a token.

A model is one GGUF file, or the shards `NAME-00001-of-000NN.gguf` … beside one another
(llama.cpp's split_path). Names of tensors and keys: gguf-py constants, llama-arch.cpp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from meshnode.errors import ModelError
from meshnode.models.header import (
    ArrayValue,
    DamagedGguf,
    Header,
    HeaderTensor,
    NotGguf,
    Value,
    read_header,
)

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_SHARDS = 999
MAX_NAME_CHARS = 256  # as long as a file's name may be
_MAX_DIMENSION = 1 << 24  # wider than any model, small enough for sums to stay sane
_F16_BYTES = 2
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_NEXTN = re.compile(r"^blk\.\d+\.nextn\.eh_proj\.weight$")
_RECURRENT = re.compile(r"^blk\.\d+\.(ssm_|time_mix_|shortconv\.)")
_LAYER = re.compile(r"blk\.(\d{1,4})\.")


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

    `layer_bytes`: weights of each layer. `embedding_bytes`: what the input needs, on the local CPU
    always. `output_bytes`: what the output needs, the embedding counted again where it serves as
    output too (the engine loads it twice when the output lies on another device): that part is
    `tied_bytes`. `other_bytes`: tensors of neither. `n_attn`: numbers a token's queries have;
    `n_ff`: those in the middle of its feed-forward part, of all the experts used.
    `kv_bytes_per_token_per_layer`: keys and values of one token at f16; an upper bound for layers
    with a window or without a cache. `has_nextn`: its last layers, `n_nextn`, predict further
    tokens (MTP). `is_recurrent`: a state is carried from token to token that cannot be taken back.
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
    kv_bytes_per_token_per_layer: tuple[int, ...]
    tied_bytes: int
    header_digest: bytes
    has_nextn: bool = False
    n_nextn: int = 0
    is_recurrent: bool = False

    @property
    def weight_bytes(self) -> int:
        """Every tensor in the files, once."""
        return sum(tensor.nbytes for tensor in self.tensors)


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
    headers = [read_header(shard) for shard in files]
    _check_shards(headers)
    metadata = _Metadata(headers[0])
    tensors = tuple(
        _tensor(tensor, index) for index, header in enumerate(headers) for tensor in header.tensors
    )
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise DamagedGguf(f"{path} has a tensor in two of its files: download them again")
    return _facts(headers, metadata, tensors)


def _facts(
    headers: list[Header], metadata: _Metadata, tensors: tuple[TensorFacts, ...]
) -> ModelFacts:
    n_layers = metadata.number("block_count", most=MAX_LAYERS)
    if not n_layers:
        raise NotGguf(f"{headers[0].path} has no layers: it is not a language model")
    n_embd = metadata.number("embedding_length")
    heads = metadata.each_layer("attention.head_count", n_layers, default=1)
    n_head_kv = metadata.each_layer("attention.head_count_kv", n_layers, default=0)
    if not metadata.has("attention.head_count_kv"):
        n_head_kv = heads
    head_dim = n_embd // max(1, *heads)
    head_dim_k = metadata.number("attention.key_length", default=head_dim)
    head_dim_v = metadata.number("attention.value_length", default=head_dim)
    sizes = _Sizes(tensors, n_layers, headers[0].path)
    return ModelFacts(
        path=headers[0].path,
        files=tuple(header.path for header in headers),
        arch=metadata.arch,
        name=metadata.name(),
        n_layers=n_layers,
        n_embd=n_embd,
        n_attn=max(heads) * head_dim_k,
        n_ff=metadata.feed_forward_width(n_layers),
        n_vocab=metadata.vocabulary(tensors),
        n_ctx_train=metadata.number("context_length", default=0, most=1 << 32),
        n_head_kv=n_head_kv,
        head_dim_k=head_dim_k,
        head_dim_v=head_dim_v,
        n_expert=metadata.number("expert_count", default=0),
        tensors=tensors,
        layer_bytes=tuple(sizes.layers),
        embedding_bytes=sizes.embedding,
        output_bytes=sizes.output,
        other_bytes=sizes.other,
        kv_bytes_per_token_per_layer=tuple(
            heads_kv * (head_dim_k + head_dim_v) * _F16_BYTES for heads_kv in n_head_kv
        ),
        tied_bytes=sizes.tied,
        header_digest=headers[0].digest,
        n_nextn=min(n_layers, metadata.number("nextn_predict_layers", default=0)),
        has_nextn=any(_NEXTN.search(tensor.name) for tensor in tensors),
        is_recurrent=any(_RECURRENT.search(tensor.name) for tensor in tensors),
    )


class _Metadata:
    """Typed look-ups below `{arch}.`; what is missing or odd is a damaged file."""

    def __init__(self, header: Header) -> None:
        self._values = header.metadata
        self._path = header.path
        arch = self._values.get("general.architecture")
        if not isinstance(arch, str) or not arch:
            raise NotGguf(f"{self._path} names no architecture: it is not a language model")
        self.arch = arch

    def name(self) -> str:
        """`general.name`, else the file's name without its shard number; fit to be shown."""
        name = self._values.get("general.name")
        given = isinstance(name, str) and name.strip()
        return shown_name(str(name) if given else model_name(self._path))

    def has(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self._values

    def number(self, key: str, *, default: int | None = None, most: int = _MAX_DIMENSION) -> int:
        value = self._values.get(f"{self.arch}.{key}", default)
        return self._checked(key, value, most)

    def each_layer(self, key: str, n_layers: int, *, default: int) -> tuple[int, ...]:
        """One number a layer, given as an array or as one number for all."""
        value = self._values.get(f"{self.arch}.{key}", default)
        if isinstance(value, ArrayValue):
            if len(value.items) < n_layers:
                raise self._damaged(key)
            return tuple(self._checked(key, item) for item in value.items[:n_layers])
        return (self._checked(key, value),) * n_layers

    def feed_forward_width(self, n_layers: int) -> int:
        """The widest layer's, over all the experts a token uses."""
        dense = max(self.each_layer("feed_forward_length", n_layers, default=0))
        used = max(self.each_layer("expert_used_count", n_layers, default=0))
        each = max(self.each_layer("expert_feed_forward_length", n_layers, default=dense))
        shared = self.number("expert_shared_feed_forward_length", default=0)
        return max(dense, used * each + shared)

    def vocabulary(self, tensors: tuple[TensorFacts, ...]) -> int:
        tokens = self._values.get("tokenizer.ggml.tokens")
        if isinstance(tokens, ArrayValue):
            return tokens.count
        if self.has("vocab_size"):
            return self.number("vocab_size")
        return next((t.ne[1] for t in tensors if t.name == "token_embd.weight"), 0)

    def _checked(self, key: str, value: Value | None, most: int = _MAX_DIMENSION) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise self._damaged(key)
        return value

    def _damaged(self, key: str) -> DamagedGguf:
        return DamagedGguf(
            f"{self._path} is damaged: its {self.arch}.{key} is missing or makes no sense; "
            "download it again"
        )


class _Sizes:
    """Bytes by where the engine puts them (the classes of `LLM_TENSOR_INFOS`, llama-arch.cpp)."""

    _INPUT = ("token_embd", "token_types", "position_embd", "per_layer_token_embd")
    _OUTPUT = ("output", "dense_", "cls", "altup_", "dec.output_norm", "enc.output_norm")

    def __init__(self, tensors: tuple[TensorFacts, ...], n_layers: int, path: Path) -> None:
        self.layers = [0] * n_layers
        self.embedding = self.output = self.other = 0
        token_embedding = 0
        tied = True
        for tensor in tensors:
            layer = _LAYER.match(tensor.name)
            if layer:
                number = int(layer[1])
                if number >= n_layers:
                    raise DamagedGguf(f"{path} is damaged: {tensor.name} is of a layer too many")
                self.layers[number] += tensor.nbytes
            elif tensor.name.startswith(self._INPUT):
                self.embedding += tensor.nbytes
                if tensor.name == "token_embd.weight":
                    token_embedding = tensor.nbytes
            elif tensor.name.startswith(self._OUTPUT):
                self.output += tensor.nbytes
                tied = tied and tensor.name != "output.weight"
            else:
                self.other += tensor.nbytes
        self.tied = token_embedding if tied else 0
        self.output += self.tied


def model_name(path: Path) -> str:
    """The file's name without `.gguf` and shard number."""
    found = _SHARD.fullmatch(path.name)
    return found["stem"] if found else path.name.removesuffix(".gguf")


def shown_name(name: str) -> str:
    """A name out of a file that others made: one line, and nothing that commands a terminal."""
    clipped = name[:MAX_NAME_CHARS]
    return "".join(char if char.isprintable() else "?" for char in clipped)


def _check_shards(headers: list[Header]) -> None:
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
