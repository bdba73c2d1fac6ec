"""Digests kept from one run to the next: a file is read whole once, until it changes.

One small file a model, named after its path, holding what the model's files looked like (size,
mtime, inode) and each tensor's digest. The device number is not compared: some file systems get
another one at every boot. An entry that is stale, damaged or of another format is as good as none;
it is a cache. Two processes writing the same entry write the same content, each file whole.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import cbor2
from blake3 import blake3

from meshnode.errors import HomeError, ResourceError
from meshnode.models.facts import ModelFacts
from meshnode.models.manifest import (
    FileStamp,
    Manifest,
    Progress,
    digest_model,
    entry_of,
    root_of,
    stamp,
)
from meshnode.state import write_durably

_FORMAT = 1
_NAME_HEX_CHARS = 32
_log = logging.getLogger(__name__)


class ManifestCache:
    """I keep manifests in a folder, which must exist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def manifest(
        self,
        facts: ModelFacts,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Manifest:
        """The kept manifest, or a new one, digested now (see `digest_model`) and kept."""
        kept = self.get(facts)
        if kept is not None:
            return kept
        manifest = digest_model(facts, progress, cancelled)
        try:
            self.put(manifest)
        except (ResourceError, HomeError) as error:
            _log.warning("digests of %s are not kept: %s", facts.name, error)
        return manifest

    def get(self, facts: ModelFacts) -> Manifest | None:
        """The kept manifest of a model whose files are as they were then, else None."""
        stamps = tuple(stamp(path) for path in facts.files)
        try:
            data = self.entry_path(Path(stamps[0].path)).read_bytes()
            version, root, header_digest, kept_stamps, digests = cbor2.loads(data)
            if version != _FORMAT or header_digest != facts.header_digest:
                return None
            if kept_stamps != [_identity(file) for file in stamps]:
                return None
            tensors = tuple(
                entry_of(tensor, digests[tensor.name])
                for tensor in sorted(facts.tensors, key=lambda tensor: tensor.name)
            )
            if root_of(header_digest, tensors) != root:
                return None
        except OSError:
            return None
        except Exception:  # whatever a damaged entry decodes to
            _log.info("the kept digests of %s are damaged and made anew", facts.name)
            return None
        return Manifest(root, facts.header_digest, stamps, tensors)

    def put(self, manifest: Manifest) -> None:
        """Keeps the manifest. Raises what `write_durably` does."""
        entry = [
            _FORMAT,
            manifest.root,
            manifest.header_digest,
            [_identity(file) for file in manifest.files],
            {tensor.name: tensor.digest for tensor in manifest.tensors},
        ]
        write_durably(self.entry_path(Path(manifest.files[0].path)), cbor2.dumps(entry))

    def entry_path(self, first: Path) -> Path:
        """Where the digests of the model with this first file are kept, if they are."""
        name = blake3(os.fsencode(first.absolute())).hexdigest()[:_NAME_HEX_CHARS]
        return self._folder / f"{name}.cbor"


def _identity(file: FileStamp) -> list[object]:
    return [os.fsencode(file.path), file.size_bytes, file.mtime_ns, file.inode]
