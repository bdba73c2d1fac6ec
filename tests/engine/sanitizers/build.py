"""The whole engine under AddressSanitizer with UndefinedBehaviorSanitizer, or ThreadSanitizer.

ggml and the programs are compiled alike, by clang, since a race is only seen between two that are
watched; with a client of its own all of llama.cpp is too. What is made lies beside the engines in
the cache.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from meshnode.engine import cache
from tests.engine.compiling import (
    CMAKE_FLAGS,
    OPS_SOURCE,
    Compilers,
    compile_backend_ops,
    compile_rpc_test,
    compile_targets,
    engine_key,
    lay_out,
)
from tests.engine.fuzz.build import SANITIZERS as ADDRESS_FLAGS
from tests.engine.fuzz.build import clang

_THREAD_FLAGS = ("-fsanitize=thread", "-fno-omit-frame-pointer", "-g1", "-O1", "-DNDEBUG")


class Sanitizer(Enum):
    ADDRESS = "address"
    THREAD = "thread"


FLAGS = {Sanitizer.ADDRESS: ADDRESS_FLAGS, Sanitizer.THREAD: _THREAD_FLAGS}


@dataclass(frozen=True)
class SanitizedEngine:
    """`folder` holds the programs and llama.cpp's tests; `engine_key` names source and patches.
    Without a client of its own its llama-server is the one that nodes run."""

    folder: Path
    engine_key: str
    own_client: bool


def build_sanitized(sanitizer: Sanitizer, *, own_client: bool, shipped: Path) -> SanitizedEngine:
    """Compiled now unless the cache has it. Blocks for a few minutes on two cores, with
    `own_client` (all of llama.cpp) for a quarter of an hour.

    Raises `NotBuilt`, and `MeshError` where the source cannot be had or patched.
    """
    c, cxx = clang()
    key = engine_key()
    kind = "whole" if own_client else "server"
    name = f"{sanitizer.value}-{kind}-{_key(sanitizer, cxx)}"
    folder = cache.engine_cache_dir() / "sanitized" / name
    if (folder / "llama-server").exists():
        return SanitizedEngine(folder, key, own_client)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".build-") as scratch:
        laid = lay_out(Path(scratch), Compilers(c, cxx, FLAGS[sanitizer]))
        programs = ["ggml-rpc-server", *(["llama-server"] if own_client else [])]
        compile_targets(laid, *programs)
        out = Path(scratch) / "out"
        out.mkdir()
        compile_backend_ops(laid, out)
        compile_rpc_test(laid, out)
        for name in programs:
            shutil.copy(laid.binaries / name, out)
        if not own_client:
            (out / "llama-server").symlink_to(shipped / "llama-server")
        shutil.rmtree(folder, ignore_errors=True)
        out.rename(folder)
    return SanitizedEngine(folder, key, own_client)


def _key(sanitizer: Sanitizer, cxx: str) -> str:
    version = subprocess.run([cxx, "--version"], capture_output=True, check=True).stdout
    facts = [engine_key(), repr(FLAGS[sanitizer]), repr(CMAKE_FLAGS)]
    digest = hashlib.sha256(version + "\n".join(facts).encode() + OPS_SOURCE.read_bytes())
    return digest.hexdigest()[:16]
