"""The fuzzer and a server, both under AddressSanitizer and UndefinedBehaviorSanitizer, made once.

Only ggml (CPU, RPC) is compiled, by clang, out of the pinned source with the patches applied; what
is made lies beside the engines in the cache, under a key of source, patches, fuzzer and compiler.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from meshnode.engine import cache
from tests.engine.compiling import (
    CMAKE_FLAGS,
    OPS_SOURCE,
    Compilers,
    Laid,
    NotBuilt,
    compile_backend_ops,
    compile_targets,
    engine_key,
    lay_out,
)

SOURCES = Path(__file__).parent
INPUTS = {".cpp", ".h", ".ignore"}
UNITS = ("rpc_fuzzer", "mutator", "one_node", "named")
SANITIZERS = (
    "-fsanitize=address,undefined",
    # kernels load vectors from where a block begins, call through a table of one C type, and round
    # what is no number
    "-fno-sanitize=alignment,function,float-cast-overflow",
    f"-fsanitize-ignorelist={SOURCES / 'kernels.ignore'}",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g1",
    "-O1",
    "-DNDEBUG",  # as the engine: what only a debug build asserts is not what is shipped
)
LIBRARIES = ("ggml-rpc/libggml-rpc.a", "libggml-cpu.a", "libggml-base.a")


@dataclass(frozen=True)
class Sanitized:
    """`folder` holds `rpc_fuzzer`, `ggml-rpc-server` and `test-backend-ops`; `engine_key` names
    source and patches."""

    folder: Path
    engine_key: str


def clang() -> tuple[str, str]:
    """A C and a C++ compiler that know libFuzzer. Raises `NotBuilt`."""
    for suffix in ("", *(f"-{version}" for version in range(21, 13, -1))):
        c, cxx = shutil.which(f"clang{suffix}"), shutil.which(f"clang++{suffix}")
        if c and cxx and _knows_libfuzzer(cxx):
            return c, cxx
    raise NotBuilt("no clang 14 or later with libFuzzer: ./just setup (clang, libclang-rt-*-dev)")


def _knows_libfuzzer(cxx: str) -> bool:
    code = b'extern "C" int LLVMFuzzerTestOneInput(const char *, unsigned long) { return 0; }'
    with tempfile.TemporaryDirectory() as folder:
        command = [cxx, "-fsanitize=fuzzer,address", "-x", "c++", "-", "-o", f"{folder}/probe"]
        return subprocess.run(command, input=code, capture_output=True, check=False).returncode == 0


def build() -> Sanitized:
    """All programs, compiled now unless the cache has them. Blocks for minutes.

    Raises `NotBuilt`, and `MeshError` where the source cannot be had or patched.
    """
    c, cxx = clang()
    key = engine_key()
    folder = cache.engine_cache_dir() / "sanitized" / _key(key, cxx)
    if (folder / "rpc_fuzzer").is_file():
        return Sanitized(folder, key)
    folder.parent.mkdir(parents=True, exist_ok=True)
    compilers = Compilers(c, cxx, (*SANITIZERS, "-fsanitize=fuzzer-no-link"))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".build-") as scratch:
        laid = lay_out(Path(scratch), compilers)
        compile_targets(laid, "ggml-rpc-server")
        out = Path(scratch) / "out"
        out.mkdir()
        _compile_fuzzer(laid, out)
        compile_backend_ops(laid, out)
        shutil.copy(laid.binaries / "ggml-rpc-server", out)
        shutil.rmtree(folder, ignore_errors=True)
        out.rename(folder)
    return Sanitized(folder, key)


def _key(engine_key: str, cxx: str) -> str:
    version = subprocess.run([cxx, "--version"], capture_output=True, check=True).stdout
    flags = [flag.replace(str(SOURCES), "") for flag in (*SANITIZERS, *CMAKE_FLAGS)]
    digest = hashlib.sha256(version + repr(flags).encode())
    inputs = sorted(path for path in SOURCES.iterdir() if path.suffix in INPUTS)
    for path in (*inputs, OPS_SOURCE):
        digest.update(path.read_bytes())
    return f"{engine_key}-{digest.hexdigest()[:16]}"


def _compile_fuzzer(laid: Laid, out: Path) -> None:
    ggml = laid.tree / "ggml"
    includes = [f"-I{path}" for path in (SOURCES, ggml / "include", ggml / "src")]
    includes.append(f"-I{ggml / 'src' / 'ggml-rpc'}")
    command = [laid.compilers.cxx, "-std=c++17", *SANITIZERS, "-fsanitize=fuzzer", *includes]
    command += [str(SOURCES / f"{unit}.cpp") for unit in UNITS]
    command += [str(laid.built / "ggml" / "src" / library) for library in LIBRARIES]
    laid.run([*command, "-lpthread", "-ldl", "-o", str(out / "rpc_fuzzer")])
