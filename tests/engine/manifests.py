"""Manifests and root lists as mesh writes them (docs/architecture.md), made from GGUF files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import gguf

ROOT = "ab" * 32


def write_manifest(
    path: Path, files: Sequence[Path], *, root: str = ROOT, without: Iterable[str] = ()
) -> Path:
    """Offer all tensors of `files` under `root`, except those named in `without`."""
    left_out = set(without)
    lines = ["mesh-gguf\t1", f"root\t{root}"]
    for index, file in enumerate(files):
        facts = file.stat()
        lines.append(
            f"file\t{index}\t{facts.st_size}\t{facts.st_mtime_ns}\t{facts.st_ino}"
            f"\t{facts.st_dev}\t{file}"
        )
        for tensor in gguf.GGUFReader(file).tensors:
            if tensor.name in left_out:
                continue
            ne = [int(length) for length in tensor.shape] + [1] * (4 - len(tensor.shape))
            lines.append(
                f"tensor\t{index}\t{tensor.data_offset}\t{tensor.n_bytes}\t{int(tensor.tensor_type)}"
                f"\t{ne[0]}\t{ne[1]}\t{ne[2]}\t{ne[3]}\t{tensor.name}"
            )
    path.write_text("\n".join(lines) + "\n")
    return path


def write_roots(path: Path, files: Sequence[Path], *, root: str = ROOT) -> Path:
    path.write_text("".join(f"{root}\t{file}\n" for file in files))
    return path
