"""Folders that other programs keep models in, read as they are: nothing is copied or written.

- Ollama: `manifests/<host>/<namespace>/<model>/<tag>` is JSON that names a file in `blobs/`, by its
  sha256, without any `.gguf`.
- Hugging Face hub: `models--<org>--<repo>/snapshots/<revision>/…` are links into `blobs/`;
  `refs/main` says which revision is the newest.
- LM Studio: `<publisher>/<repo>/<file>.gguf`, which needs no more than its place as a further name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from meshnode.state import read_file

OLLAMA, HUB = "ollama", "huggingface"
MAX_MANIFESTS = 2_000
MAX_MANIFEST_BYTES = 1 << 20
_MODEL_LAYER = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_BLOB = re.compile(r"(?:sha256[-:])?([0-9a-f]{64})")
_HUB_REPO = re.compile(r"models--(?P<org>[^/]+?)--(?P<repo>[^/]+)")
_LATEST = ":latest"
_OWN_HOST, _OWN_NAMESPACE = "registry.ollama.ai", "library"


@dataclass(frozen=True)
class Named:
    """A file that a cache has names for, one or several."""

    path: Path
    names: tuple[str, ...]


def sha256_of_name(path: Path) -> str | None:
    """What Ollama and the Hugging Face hub name their blobs after: the sha256 of such a file, in
    hex, as its name has it."""
    real = path.resolve()
    found = _BLOB.fullmatch(real.name)
    return found[1] if found and real.parent.name == "blobs" else None


def is_ollama(children: set[str]) -> bool:
    return {"blobs", "manifests"} <= children


def ollama_models(folder: Path) -> Iterator[Named]:
    """The models in an Ollama folder, by the names that `ollama list` has. What is damaged or was
    removed meanwhile is passed over."""
    manifests = folder / "manifests"
    names: dict[Path, list[str]] = {}
    for manifest in islice(sorted(manifests.glob("*/*/*/*")), MAX_MANIFESTS):
        blob = _model_blob(folder / "blobs", manifest)
        if blob is not None:
            names.setdefault(blob, []).append(_ollama_name(manifest.relative_to(manifests)))
    for blob, found in names.items():
        yield Named(blob, (*found, *(n.removesuffix(_LATEST) for n in found if _LATEST in n)))


def _ollama_name(place: Path) -> str:
    host, namespace, model, tag = place.parts
    if host != _OWN_HOST:
        return f"{host}/{namespace}/{model}:{tag}"
    return f"{model}:{tag}" if namespace == _OWN_NAMESPACE else f"{namespace}/{model}:{tag}"


def _model_blob(blobs: Path, manifest: Path) -> Path | None:
    """The one file of weights that a manifest names, if it is there."""
    try:
        if manifest.stat().st_size > MAX_MANIFEST_BYTES:
            return None
        layers = json.loads(read_file(manifest))["layers"]
        digests = [layer["digest"] for layer in layers if layer["mediaType"] == _MODEL_LAYER]
        (found,) = (_DIGEST.fullmatch(digest) for digest in digests)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if found is None:
        return None
    names = (f"sha256-{found[1]}", f"sha256:{found[1]}")  # the latter until Ollama 0.1.3x
    return next((blobs / name for name in names if (blobs / name).is_file()), None)


def hub_repo(folder: Path) -> str | None:
    """`org/repo` of a repository's folder in a Hugging Face cache, else None."""
    found = _HUB_REPO.fullmatch(folder.name)
    if not found or not (folder / "snapshots").is_dir():
        return None
    return f"{found['org']}/{found['repo']}"


def hub_snapshots(folder: Path) -> list[Path]:
    """Its revisions: the one that `main` is first, then the newest first."""
    try:
        main = read_file(folder / "refs" / "main")[:100].decode("ascii", "replace").strip()
    except OSError:
        main = ""
    try:
        found = [entry for entry in os.scandir(folder / "snapshots") if entry.is_dir()]
        found.sort(key=lambda entry: (entry.name != main, -entry.stat().st_mtime_ns))
    except OSError:
        return []
    return [Path(entry.path) for entry in found]
