"""What a model's files hold, by digest: which weights are the same wherever they lie.

Root = BLAKE3 over the header digest and every tensor's (name, type, ne, BLAKE3 of its bytes),
sorted by name: the same for a model in one file or in shards, another after one flipped byte.
Digesting reads every weight once, at the disk's speed or BLAKE3's (about 1 GB/s a core), so it is
done once and kept (`meshnode.models.cache`).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cbor2
from blake3 import blake3

from meshnode.cbor import BadCbor, loads_untrusted
from meshnode.errors import ModelError
from meshnode.models.facts import ModelFacts, TensorFacts
from meshnode.models.header import MAX_NAME_BYTES, MAX_TENSORS, TruncatedGguf
from meshnode.models.slice_mark import IsASlice, hole_in, is_slice

DIGEST_BYTES = 32
READ_BYTES = 4 << 20
_ROOT_CONTEXT = "mesh model root 1"
_ENTRY = struct.Struct("<I4Q32s")
_MAX_BYTES = 2**63 - 1

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class FileChanged(ModelError):
    """A model's file was written to while it was being read."""


class DigestCancelled(Exception):
    """The caller's `cancelled` said so."""


class BadManifest(Exception):
    """A manifest from elsewhere that cannot be read."""


@dataclass(frozen=True)
class FileStamp:
    """A file as it was when it was read; any change of it shows in one of these."""

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int
    device: int


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: `ne` innermost first, `offset` in the file with this index, digest BLAKE3."""

    name: str
    type: int
    ne: tuple[int, int, int, int]
    nbytes: int
    offset: int
    file_index: int
    digest: bytes


def entry_of(tensor: TensorFacts, digest: bytes) -> TensorEntry:
    """The tensor with what its bytes are."""
    return TensorEntry(
        name=tensor.name,
        type=tensor.type,
        ne=tensor.ne,
        nbytes=tensor.nbytes,
        offset=tensor.offset,
        file_index=tensor.file_index,
        digest=digest,
    )


@dataclass(frozen=True)
class Manifest:
    """A model on this machine's disk. `tensors` are sorted by name."""

    root: str
    header_digest: bytes
    files: tuple[FileStamp, ...]
    tensors: tuple[TensorEntry, ...]


class Wanted(Protocol):
    """What a load asks for: a `TensorEntry`, or a `WantedTensor` from the wire."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> int: ...
    @property
    def ne(self) -> tuple[int, int, int, int]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def digest(self) -> bytes | None: ...


@dataclass(frozen=True)
class WantedTensor:
    """A tensor some other node wants loaded: no place in a file, only what it is. `digest` None:
    nobody has digested it yet, and the source that the model comes from stands for it."""

    name: str
    type: int
    ne: tuple[int, int, int, int]
    nbytes: int
    digest: bytes | None


@dataclass(frozen=True)
class WantedModel:
    """A model some other node wants loaded. `root`: a provisional one while digests lack."""

    root: str
    tensors: tuple[WantedTensor, ...]


@dataclass(frozen=True)
class Match:
    """Wanted tensors against a local file: the same, there but other, not there."""

    usable: tuple[TensorEntry, ...]
    differing: tuple[str, ...]
    missing: tuple[str, ...]


def stamp(path: Path) -> FileStamp:
    """The file's stamp now. Raises `ModelError`."""
    try:
        found = path.stat()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    return FileStamp(
        str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev
    )


def digest_model(
    facts: ModelFacts,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Manifest:
    """Reads every weight and digests it. Blocks for as long as that takes: call it in a thread.

    `progress` and `cancelled` are called about every 4 MiB, in that thread. Raises `ModelError`
    (`FileChanged` when a file is written to meanwhile; `IsASlice` where weights are missing, which
    would be digested as zeros) or `DigestCancelled`.
    """
    for path in facts.files:
        if is_slice(path):
            raise IsASlice(
                f"{path} is a part of a model: what it holds is known without reading it anew"
            )
    _refuse_holes(facts)
    stamps = tuple(stamp(path) for path in facts.files)
    entries = digest_tensors(facts, facts.tensors, progress, cancelled)
    if tuple(stamp(path) for path in facts.files) != stamps:
        raise FileChanged(f"{facts.path} changed while it was read: try again when it is complete")
    return Manifest(
        root=root_of(facts.header_digest, entries),
        header_digest=facts.header_digest,
        files=stamps,
        tensors=entries,
    )


def digest_tensors(
    facts: ModelFacts,
    tensors: Sequence[TensorFacts],
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> tuple[TensorEntry, ...]:
    """Reads and digests some of a model's tensors, whatever else is there; sorted by name."""
    reading = _Reading(tensors, progress, cancelled)
    entries: list[TensorEntry] = []
    for index in sorted({tensor.file_index for tensor in tensors}):
        entries += reading.digest_file(facts.files[index], index)
    return tuple(sorted(entries, key=lambda entry: entry.name))


def _refuse_holes(facts: ModelFacts) -> None:
    """A slice's file that was moved away from its document, or a download that was cut short."""
    for index, path in enumerate(facts.files):
        try:
            with path.open("rb", buffering=0) as file:
                for tensor in facts.tensors:
                    stop = tensor.offset + tensor.nbytes
                    if tensor.file_index == index and hole_in(file.fileno(), tensor.offset, stop):
                        raise IsASlice(
                            f"{path} has nothing where {tensor.name} should be: it is a part of a "
                            "model, or a download that was cut short; put it back, or pull it again"
                        )
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from error


class _Reading:
    """One pass over weights, in the order they lie in, through one buffer."""

    def __init__(
        self,
        tensors: Sequence[TensorFacts],
        progress: Progress | None,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self._tensors = tensors
        self._progress = progress
        self._cancelled = cancelled
        self._done_bytes = 0
        self._total_bytes = sum(tensor.nbytes for tensor in tensors)
        self._buffer = bytearray(READ_BYTES)

    def digest_file(self, path: Path, index: int) -> list[TensorEntry]:
        mine = [tensor for tensor in self._tensors if tensor.file_index == index]
        try:
            with path.open("rb", buffering=0) as file:
                return [
                    entry_of(tensor, self._digest(path, file.fileno(), tensor))
                    for tensor in sorted(mine, key=lambda tensor: tensor.offset)
                ]
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from error

    def _digest(self, path: Path, fd: int, tensor: TensorFacts) -> bytes:
        digest = blake3()
        view = memoryview(self._buffer)
        at, end = tensor.offset, tensor.offset + tensor.nbytes
        while at < end:
            if self._cancelled is not None and self._cancelled():
                raise DigestCancelled
            count = os.preadv(fd, [view[: min(READ_BYTES, end - at)]], at)
            if not count:
                raise TruncatedGguf(f"{path} ended while it was read: copy or download it again")
            digest.update(view[:count])
            at += count
            self._done_bytes += count
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)
        return digest.digest()


def root_of(header_digest: bytes, tensors: Sequence[Wanted]) -> str:
    """The model's root as 64 hex digits. Every tensor has been digested."""
    root = blake3(header_digest, derive_key_context=_ROOT_CONTEXT)
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        name = tensor.name.encode()
        root.update(struct.pack("<I", len(name)) + name)
        root.update(_ENTRY.pack(tensor.type, *tensor.ne, tensor.digest))
    return root.hexdigest()


def match(wanted: Sequence[Wanted], local: Manifest, *, same_source: bool = False) -> Match:
    """Which of the wanted tensors the local files hold, byte for byte, by name.

    same_source: the local files came from the very bytes that are wanted, which then stand for
    tensors that nobody has digested.
    """
    held = {tensor.name: tensor for tensor in local.tensors}
    usable: list[TensorEntry] = []
    differing: list[str] = []
    missing: list[str] = []
    for tensor in wanted:
        mine = held.get(tensor.name)
        if mine is None:
            missing.append(tensor.name)
        elif _shape(mine) == _shape(tensor) and (
            mine.digest == tensor.digest or (tensor.digest is None and same_source)
        ):
            usable.append(mine)
        else:
            differing.append(tensor.name)
    return Match(tuple(usable), tuple(differing), tuple(missing))


def _shape(tensor: Wanted) -> tuple[int, tuple[int, int, int, int], int]:
    return tensor.type, tensor.ne, tensor.nbytes


def engine_manifest(root: str, local: Manifest, usable: Sequence[TensorEntry]) -> str:
    """The text for `ggml-rpc-server --gguf-manifest`: these tensors of these files, offered under
    `root`, the wanted model's. The format is docs/architecture.md's. A path may hold bytes that
    are no UTF-8 (as surrogates): write the text with `errors="surrogateescape"`.

    Raises `ModelError` for a path the format cannot carry.
    """
    lines = ["mesh-gguf\t1", f"root\t{root}"]
    for index, file in enumerate(local.files):
        if "\n" in file.path:
            raise ModelError(f"{file.path!r} has a line break in its name: rename it")
        fields = (index, file.size_bytes, file.mtime_ns, file.inode, file.device, file.path)
        lines.append("\t".join(("file", *map(str, fields))))
    for tensor in usable:
        numbers = (tensor.file_index, tensor.offset, tensor.nbytes, tensor.type, *tensor.ne)
        lines.append("\t".join(("tensor", *map(str, numbers), tensor.name)))
    return "\n".join(lines) + "\n"


def offered_files(engine_manifest: str) -> tuple[Path, ...]:
    """The files that a text of `engine_manifest` names."""
    lines = (line.split("\t", 6) for line in engine_manifest.split("\n"))
    return tuple(Path(fields[6]) for fields in lines if fields[0] == "file")


def to_wire(model: Manifest | WantedModel) -> bytes:
    """The root and what each tensor is, without places: what a lease sends."""
    rows = [[t.name, t.type, *t.ne, t.nbytes, t.digest] for t in model.tensors]
    return cbor2.dumps([1, bytes.fromhex(model.root), rows])


def from_wire_untrusted(data: bytes) -> WantedModel:
    """What `to_wire` gave; raises `BadManifest` and nothing else."""
    try:
        version, root, rows = loads_untrusted(data)
        if version != 1:
            raise BadManifest("the manifest is in a format this mesh does not know: update it")
        if not isinstance(root, bytes) or len(root) != DIGEST_BYTES or len(rows) > MAX_TENSORS:
            raise BadManifest("the manifest is damaged")
        return WantedModel(root.hex(), tuple(_wanted(*row) for row in rows))
    except (BadCbor, ValueError, TypeError) as error:
        raise BadManifest("the manifest is damaged") from error


def _wanted(
    name: Any, type: Any, ne0: Any, ne1: Any, ne2: Any, ne3: Any, nbytes: Any, digest: Any
) -> WantedTensor:
    ne = (_count(ne0), _count(ne1), _count(ne2), _count(ne3))
    if not isinstance(name, str) or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise ValueError("a bad name")
    if not name.isprintable():
        raise ValueError("a name that could forge a line of the engine's manifest")
    if digest is not None and (not isinstance(digest, bytes) or len(digest) != DIGEST_BYTES):
        raise ValueError("a bad digest")
    if math.prod(ne) > _MAX_BYTES:
        raise ValueError("an impossible shape")
    return WantedTensor(name, _count(type, 0xFFFF), ne, _count(nbytes), digest)


def _count(value: Any, most: int = _MAX_BYTES) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError("a bad number")
    return value
