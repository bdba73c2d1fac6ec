"""One slice as it is on the disk: what it says it holds, and whether that can be believed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from meshnode.config import human_bytes
from meshnode.errors import DiskFull, HomeError, ModelError
from meshnode.models.facts import ModelFacts, TensorFacts, model_name, read_facts, shown_name
from meshnode.models.identity import Identity
from meshnode.models.manifest import (
    Manifest,
    Progress,
    digest_tensors,
    entry_of,
    root_of,
    stamp,
)
from meshnode.models.slice_mark import SLICE_DOCUMENT, IsASlice, slice_folder
from meshnode.models.store.document import (
    MAX_DOCUMENT_BYTES,
    BadDocument,
    SliceDocument,
    Stamps,
    parse_untrusted,
    to_bytes,
)
from meshnode.models.store.journal import JOURNAL_NAME
from meshnode.models.store.locks import USE_LOCK, WRITER_LOCK, Lock, SliceInUse
from meshnode.state import read_file, write_durably

Cancelled = Callable[[], bool]
_LAYOUT_CONTEXT = "mesh slice layout 1"


class SliceDamaged(ModelError):
    """The slice's document or its files cannot be used any more."""


@dataclass(frozen=True)
class Slice:
    """A model of which some tensors are here. `facts` are the whole model's."""

    folder: Path
    document: SliceDocument
    facts: ModelFacts

    @property
    def name(self) -> str:
        return shown_name(model_name(self.facts.path))

    @property
    def identity(self) -> Identity:
        return self.document.identity

    @property
    def complete(self) -> bool:
        """Whether the whole model is here, and its root known."""
        return self.document.complete

    @property
    def held(self) -> tuple[TensorFacts, ...]:
        """What it says it holds; `held_manifest` says what it does hold."""
        return tuple(t for t in self.facts.tensors if t.name in self.document.held)

    @property
    def held_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.held)

    def use(self) -> AbstractContextManager[None]:
        """It is neither removed nor made smaller meanwhile. Raises `SliceInUse`, `SliceGone`."""
        return in_use([self.facts.path])


@contextmanager
def in_use(paths: Iterable[Path]) -> Iterator[None]:
    """The slices that these files belong to, where they do, are neither removed nor made smaller
    meanwhile. Raises `SliceInUse` where that is being done now, `SliceGone`."""
    with ExitStack() as held:
        for folder in {found for path in paths if (found := slice_folder(path))}:
            with suppress(OSError):  # that nobody here can write: nobody removes it either
                lock = Lock(folder, USE_LOCK, shared=True)
                held.callback(lock.close)
                lock.touch()
        yield


def slice_of(path: Path) -> Slice | None:
    """The slice that a model's file belongs to, or None where it belongs to none. Raises
    `ModelError` for one that is damaged."""
    folder = slice_folder(path)
    return open_slice(folder) if folder else None


def refuse_part(path: Path) -> None:
    """Raises `IsASlice` where only a part of the model of this file is here: whoever reads the file
    as it is would read zeros."""
    found = slice_of(path)
    if found is not None and not found.complete:
        raise IsASlice(
            f"only {human_bytes(found.held_bytes)} of the {human_bytes(found.facts.weight_bytes)} "
            f"of {found.name} are here: pull the rest, or name a file that is whole"
        )


def read_document(folder: Path) -> SliceDocument:
    """Raises `SliceDamaged`."""
    path = folder / SLICE_DOCUMENT
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise BadDocument
        return parse_untrusted(read_file(path))
    except (OSError, BadDocument) as error:
        raise SliceDamaged(
            f"{path} cannot be read or is damaged, so what {folder.name} holds is not known: "
            f"remove it (`mesh models rm {folder.name}`) and pull it again"
        ) from error


def is_bare(folder: Path) -> bool:
    """Whether no byte of any tensor has come: neither a whole one, nor a part. A slice that is
    damaged may have some."""
    with suppress(SliceDamaged, OSError):
        journal = folder / JOURNAL_NAME
        return not read_document(folder).held and not (journal.exists() and journal.stat().st_size)
    return False


def open_slice(folder: Path) -> Slice:
    """Blocks for the headers. Raises `ModelError`, mostly `SliceDamaged`."""
    document = read_document(folder)
    facts = read_facts(folder / document.files[0][0])
    found = tuple((path.name, os.path.getsize(path)) for path in facts.files)
    described = facts.header_digest, layout_of(facts)
    if found != document.files or described != (document.header_digest, document.layout):
        raise SliceDamaged(
            f"the files in {folder} are not those that its {SLICE_DOCUMENT} tells of: remove it "
            f"(`mesh models rm {folder.name}`) and pull it again"
        )
    names = {tensor.name for tensor in facts.tensors}
    digests = {name: value for name, value in document.digests.items() if name in names}
    document = replace(document, digests=digests, held=document.held & digests.keys())
    return Slice(folder, document, facts)


def layout_of(facts: ModelFacts) -> bytes:
    """Changes with a damaged header that would have weights read from elsewhere."""
    digest = blake3(derive_key_context=_LAYOUT_CONTEXT)
    for tensor in facts.tensors:
        place = (tensor.file_index, tensor.offset, tensor.nbytes, tensor.type, *tensor.ne)
        digest.update(f"{tensor.name} {place}\n".encode())
    return digest.digest()


def save(folder: Path, document: SliceDocument) -> None:
    """Replaces the document, durably. Raises what `write_durably` does."""
    write_durably(folder / SLICE_DOCUMENT, to_bytes(document))


def restated(
    slice_: Slice,
    held: frozenset[str],
    digests: Mapping[str, bytes],
    proven_root: str | None = None,
) -> SliceDocument:
    """The document of a slice that holds these tensors now, as its files are now.

    `proven_root`: made of digests that all that comes is held against. What others tell counts no
    more of tensors whose digests are known here.
    """
    facts = slice_.facts
    root, needed = slice_.document.root or proven_root, slice_.document.needed
    if needed is not None:  # nobody has planned anew since these came
        needed |= held - slice_.document.held
    if all(tensor.name in digests for tensor in facts.tensors):
        root = root_of(facts.header_digest, [entry_of(t, digests[t.name]) for t in facts.tensors])
    return replace(
        slice_.document,
        root=root,
        digests=dict(digests),
        held=held,
        needed=needed,
        told={name: told for name, told in slice_.document.told.items() if name not in digests},
        held_bytes=sum(tensor.nbytes for tensor in facts.tensors if tensor.name in held),
        stamps=stamps_of(facts),
        sealed=True,
    )


def stamps_of(facts: ModelFacts) -> Stamps:
    """Raises `ModelError`."""
    found = (stamp(path) for path in facts.files)
    return tuple((one.mtime_ns, one.inode) for one in found)


def is_as_told(slice_: Slice) -> bool:
    """Whether nobody has written to the files since the document told of them."""
    return slice_.document.sealed and slice_.document.stamps == stamps_of(slice_.facts)


def read_again(
    slice_: Slice, progress: Progress | None = None, cancelled: Cancelled | None = None
) -> tuple[TensorFacts, ...]:
    """Reads all it says it holds; the tensors whose bytes are others than it says.

    Raises `ModelError` or `DigestCancelled`.
    """
    digests = slice_.document.digests
    entries = digest_tensors(slice_.facts, slice_.held, progress, cancelled)
    wrong = {entry.name for entry in entries if entry.digest != digests[entry.name]}
    return tuple(tensor for tensor in slice_.held if tensor.name in wrong)


def confirmed(
    slice_: Slice,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    *,
    anyway: bool = False,
) -> Slice:
    """The slice with nothing among what it holds that is not so: after a kill, a power cut or
    anybody's writing all is read again, else nothing is, but `anyway`. Raises as `read_again`."""
    if is_as_told(slice_) and not anyway:
        return slice_
    wrong = {tensor.name for tensor in read_again(slice_, progress, cancelled)}
    held = slice_.document.held - wrong
    return replace(slice_, document=restated(slice_, held, slice_.document.digests))


def held_manifest(
    slice_: Slice, progress: Progress | None = None, cancelled: Cancelled | None = None
) -> Manifest:
    """What the slice holds, with its kept digests: nothing of it is read, unless its files were
    written to without being told of. `root` is provisional until the real one is known.

    Raises `ModelError` or `DigestCancelled`.
    """
    if not is_as_told(slice_):
        slice_ = _confirmed_now(slice_, progress, cancelled)
    digests = slice_.document.digests
    entries = [entry_of(tensor, digests[tensor.name]) for tensor in slice_.held]
    return Manifest(
        root=str(slice_.identity),
        header_digest=slice_.facts.header_digest,
        files=tuple(stamp(path) for path in slice_.facts.files),
        tensors=tuple(sorted(entries, key=lambda entry: entry.name)),
    )


def _confirmed_now(slice_: Slice, progress: Progress | None, cancelled: Cancelled | None) -> Slice:
    try:
        lock = Lock(slice_.folder, WRITER_LOCK)
    except SliceInUse:
        return slice_  # a writer explains the new times; it looked at what is held before it began
    except OSError:
        return confirmed(slice_, progress, cancelled)  # somebody else's folder: believed for now
    try:
        again = confirmed(open_slice(slice_.folder), progress, cancelled)
        with suppress(DiskFull, HomeError):
            save(slice_.folder, again.document)
        return again
    finally:
        lock.close()
