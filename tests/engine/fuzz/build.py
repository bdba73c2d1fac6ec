"""The fuzzer and a server, both under AddressSanitizer and UndefinedBehaviorSanitizer, made once.

Only ggml (CPU, RPC) is compiled, by clang, out of the pinned source with the patches applied; what
is made lies beside the engines in the cache, under a key of source, patches, fuzzer and compiler.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from meshnode.engine import cache
from meshnode.engine.patches import apply_series, engine_key_of, read_series
from meshnode.engine.source import named_source, open_source, source_digest, tree_files
from meshnode.engine.toolchain import default_jobs, tool_paths

SOURCES = Path(__file__).parent
INPUTS = {".cpp", ".h", ".ignore"}
UNITS = ("rpc_fuzzer", "mutator", "one_node")
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
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=None",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DGGML_RPC=ON",
    "-DGGML_METAL=OFF",
    "-DGGML_OPENMP=OFF",
    "-DGGML_CPU_REPACK=OFF",
    "-DGGML_CCACHE=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_NUMBER=0",
    "-DLLAMA_BUILD_COMMIT=sanitized",
    "-DFETCHCONTENT_FULLY_DISCONNECTED=ON",
)
LIBRARIES = ("ggml-rpc/libggml-rpc.a", "libggml-cpu.a", "libggml-base.a")


@dataclass(frozen=True)
class Sanitized:
    """`folder` holds `rpc_fuzzer` and `ggml-rpc-server`; `engine_key` names source and patches."""

    folder: Path
    engine_key: str


class NoFuzzer(Exception):
    """It cannot be built here, and why."""


def clang() -> tuple[str, str]:
    """A C and a C++ compiler that know libFuzzer. Raises `NoFuzzer`."""
    for suffix in ("", *(f"-{version}" for version in range(21, 13, -1))):
        c, cxx = shutil.which(f"clang{suffix}"), shutil.which(f"clang++{suffix}")
        if c and cxx and _knows_libfuzzer(cxx):
            return c, cxx
    raise NoFuzzer("no clang 14 or later with libFuzzer: ./just setup (clang, libclang-rt-*-dev)")


def _knows_libfuzzer(cxx: str) -> bool:
    code = b'extern "C" int LLVMFuzzerTestOneInput(const char *, unsigned long) { return 0; }'
    with tempfile.TemporaryDirectory() as folder:
        command = [cxx, "-fsanitize=fuzzer,address", "-x", "c++", "-", "-o", f"{folder}/probe"]
        return subprocess.run(command, input=code, capture_output=True, check=False).returncode == 0


def build() -> Sanitized:
    """Both programs, compiled now unless the cache has them. Blocks for minutes.

    Raises `NoFuzzer`, and `MeshError` where the source cannot be had or patched.
    """
    c, cxx = clang()
    series = read_series()
    named = named_source(None)
    engine_key = engine_key_of(source_digest(named, series.upstream), series, stock=False)
    folder = cache.engine_cache_dir() / "sanitized" / _key(engine_key, cxx)
    if (folder / "rpc_fuzzer").is_file():
        return Sanitized(folder, engine_key)
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = open_source(named, series.upstream, lambda _done, _total, _line: None)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".build-") as scratch:
        tree, built = Path(scratch) / "src", Path(scratch) / "build"
        for path in tree_files(source.tree):
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source.tree / path, tree / path)
        if not any((tree / name).exists() for name in series.new_files()):
            apply_series(series, tree)
        _compile_ggml(c, cxx, tree, built)
        out = Path(scratch) / "out"
        out.mkdir()
        _compile_fuzzer(cxx, tree, built, out)
        shutil.copy(built / "bin" / "ggml-rpc-server", out)
        shutil.rmtree(folder, ignore_errors=True)
        out.rename(folder)
    return Sanitized(folder, engine_key)


def _key(engine_key: str, cxx: str) -> str:
    version = subprocess.run([cxx, "--version"], capture_output=True, check=True).stdout
    flags = [flag.replace(str(SOURCES), "") for flag in (*SANITIZERS, *CMAKE_FLAGS)]
    digest = hashlib.sha256(version + repr(flags).encode())
    for path in sorted(path for path in SOURCES.iterdir() if path.suffix in INPUTS):
        digest.update(path.read_bytes())
    return f"{engine_key}-{digest.hexdigest()[:16]}"


def _run(command: list[str], log: Path) -> None:
    with log.open("ab") as output:
        run = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if run.returncode != 0:
        raise NoFuzzer(f"{command[0]} failed:\n{log.read_text(errors='replace')[-2000:]}")


def _compile_ggml(c: str, cxx: str, tree: Path, built: Path) -> None:
    cmake, ninja = tool_paths()
    flags = " ".join([*SANITIZERS, "-fsanitize=fuzzer-no-link"])
    command = [str(cmake), "-S", str(tree), "-B", str(built), "-G", "Ninja", *CMAKE_FLAGS]
    command += [f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += [f"-DCMAKE_C_COMPILER={c}", f"-DCMAKE_CXX_COMPILER={cxx}"]
    command += [f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}"]
    log = tree.parent / "log"
    _run(command, log)
    jobs = str(os.environ.get("MESH_BUILD_JOBS") or default_jobs())
    _run([str(ninja), "-C", str(built), "-j", jobs, "ggml-rpc-server"], log)


def _compile_fuzzer(cxx: str, tree: Path, built: Path, out: Path) -> None:
    ggml = tree / "ggml"
    includes = [f"-I{path}" for path in (SOURCES, ggml / "include", ggml / "src")]
    includes.append(f"-I{ggml / 'src' / 'ggml-rpc'}")
    command = [cxx, "-std=c++17", *SANITIZERS, "-fsanitize=fuzzer", *includes]
    command += [str(SOURCES / f"{unit}.cpp") for unit in UNITS]
    command += [str(built / "ggml" / "src" / library) for library in LIBRARIES]
    _run([*command, "-lpthread", "-ldl", "-o", str(out / "rpc_fuzzer")], tree.parent / "log")
