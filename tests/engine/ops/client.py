"""llama.cpp's test-backend-ops, built as the engine is, once; it lies beside the engines."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from meshnode.engine import cache
from meshnode.engine.toolchain import Backend, cpu_identity, find_toolchain
from tests.engine.compiling import (
    CMAKE_FLAGS,
    OPS_SOURCE,
    Compilers,
    compile_backend_ops,
    compile_targets,
    engine_key,
    lay_out,
)


def build_client() -> Path:
    """The program. Blocks for two minutes the first time. Raises `NotBuilt` and `MeshError`."""
    toolchain = find_toolchain(Backend.CPU)
    facts = [engine_key(), toolchain.identity, cpu_identity(), repr(CMAKE_FLAGS)]
    key = hashlib.sha256("\n".join(facts).encode() + OPS_SOURCE.read_bytes()).hexdigest()[:16]
    folder = cache.engine_cache_dir() / "ops" / key
    program = folder / "test-backend-ops"
    if program.is_file():
        return program
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".build-") as scratch:
        laid = lay_out(Path(scratch), Compilers(toolchain.cc, toolchain.cxx, (), "Release"))
        compile_targets(laid, "ggml", "ggml-rpc", "ggml-cpu")
        out = Path(scratch) / "out"
        out.mkdir()
        compile_backend_ops(laid, out)
        shutil.rmtree(folder, ignore_errors=True)
        out.rename(folder)
    return program
