"""Every digest of a model read again: a disk may have changed a byte since."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from meshnode.errors import DiskFull, HomeError, ModelError
from meshnode.models.cache import ManifestCache
from meshnode.models.caches import sha256_of_name
from meshnode.models.facts import ModelFacts
from meshnode.models.manifest import READ_BYTES, Progress, digest_model
from meshnode.models.store.locks import SliceInUse
from meshnode.models.store.slice import Slice
from meshnode.models.store.writer import SliceWriter

_SHA256 = re.compile(r"(?:sha256[-:])?([0-9a-f]{64})")


@dataclass(frozen=True)
class Verdict:
    """`tensors`, `size_bytes`: what was read. `wrong`: tensors that are not what they were, or
    files that are not what they are named after. `by`: what they were compared with."""

    tensors: int
    size_bytes: int
    wrong: tuple[str, ...]
    by: str
    root: str | None


KEPT, NAMED, NOTHING = "digests kept", "sha256 in the file's name", "nothing"


def verify_slice(found: Slice, progress: Progress | None = None) -> Verdict:
    """Reads all it holds; tensors that are wrong are held no more, and pulled again at the next
    need. Raises `SliceInUse` while somebody writes to it."""
    with SliceWriter(found.folder, progress=progress, verify=True) as writer:
        wrong = tuple(tensor.name for tensor in writer.lost)
        root = writer.identity.root
    return Verdict(len(found.held), found.held_bytes, wrong, KEPT, root)


def check_against_source(writer: SliceWriter, progress: Progress | None = None) -> None:
    """Whether a slice that is all there is what its source says by sha256, where it says so: once,
    and what is not is thrown away, or the next time where something reads it now.

    Bytes between tensors, which nobody needs, are zeros in a file as all programs write it; one
    that has others there fails too. Raises `ModelError`, `DiskFull`.
    """
    found = writer.save()
    validators = found.document.validator.split("\n")
    if not found.complete or found.document.vouched or len(validators) != len(found.facts.files):
        return
    told = [match[1] if match else None for match in map(_SHA256.fullmatch, validators)]
    sizes = [size_bytes for _, size_bytes in found.document.files]
    files = found.facts.files
    wrong = [
        index
        for index, expected in enumerate(told)
        if expected is not None
        and _sha256(files[index], progress, sum(sizes[:index]), sum(sizes)) != expected
    ]
    if wrong:
        names = ", ".join(files[index].name for index in wrong)
        what = f"{names} came whole and is not what its source says it is (sha256)"
        try:
            writer.disown(wrong)
        except SliceInUse as error:
            raise ModelError(
                f"{what}, and is still here, as something reads it: pull it again when that has "
                "ended, which throws it away"
            ) from error
        raise ModelError(
            f"{what}, so it was thrown away: pull it again, over another network if it happens "
            "again"
        )
    if None not in told:
        writer.vouch()


def verify_files(
    facts: ModelFacts, cache: ManifestCache, progress: Progress | None = None
) -> Verdict:
    """Reads a whole model; compares it with the digests kept of it, and its files with the sha256
    that caches name them after. What is found is kept. Raises `ModelError`."""
    kept = cache.get(facts)
    names = {path: name for path in facts.files if (name := sha256_of_name(path))}
    total_bytes = facts.weight_bytes + sum(path.stat().st_size for path in names)
    wrong: list[str] = []
    before_bytes = 0
    for path, expected in names.items():
        if _sha256(path, progress, before_bytes, total_bytes) != expected:
            wrong.append(path.name)
        before_bytes += path.stat().st_size

    def tell(done_bytes: int, _: int) -> None:
        if progress is not None:
            progress(before_bytes + done_bytes, total_bytes)

    manifest = digest_model(facts, tell)
    if kept is not None:
        known = {tensor.name: tensor.digest for tensor in kept.tensors}
        wrong += [one.name for one in manifest.tensors if one.digest != known[one.name]]
    # Also where they differ: nobody is to be offered bytes by digests that they have no more.
    with suppress(DiskFull, HomeError):
        cache.put(manifest)
    by = KEPT if kept else NAMED if names else NOTHING
    return Verdict(len(facts.tensors), total_bytes, tuple(wrong), by, manifest.root)


def _sha256(path: Path, progress: Progress | None, before_bytes: int, total_bytes: int) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while data := file.read(READ_BYTES):
                digest.update(data)
                before_bytes += len(data)
                if progress is not None:
                    progress(before_bytes, total_bytes)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
