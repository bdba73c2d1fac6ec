"""Builds of the patched source that no node runs: instrumented ones, and llama.cpp's own tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meshnode.engine.patches import apply_series, engine_key_of, read_series
from meshnode.engine.source import named_source, open_source, source_digest, tree_files
from meshnode.engine.toolchain import default_jobs, tool_paths

CMAKE_FLAGS = (
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
    "-DLLAMA_BUILD_COMMIT=tests",
    "-DFETCHCONTENT_FULLY_DISCONNECTED=ON",
)
GGML_LIBRARIES = ("libggml.a", "ggml-rpc/libggml-rpc.a", "libggml-cpu.a", "libggml-base.a")
OPS_SOURCE = Path(__file__).parent / "ops" / "remote.cpp"


class NotBuilt(Exception):
    """It cannot be built here, and why."""


@dataclass(frozen=True)
class Compilers:
    """`flags` are for C and C++ alike; an empty `build_type` leaves optimising to them."""

    c: str
    cxx: str
    flags: tuple[str, ...] = ()
    build_type: str = "None"


@dataclass(frozen=True)
class Laid:
    """The patched tree in `scratch`, ninja's folder beside it, and the key of the engine's own
    build of this source."""

    scratch: Path
    compilers: Compilers

    @property
    def tree(self) -> Path:
        return self.scratch / "src"

    @property
    def built(self) -> Path:
        return self.scratch / "build"

    @property
    def binaries(self) -> Path:
        return self.built / "bin"

    def libraries(self) -> list[str]:
        return [str(self.built / "ggml" / "src" / name) for name in GGML_LIBRARIES]

    def run(self, command: Sequence[str]) -> None:
        log = self.scratch / "log"
        with log.open("ab") as output:
            run = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
        if run.returncode != 0:
            raise NotBuilt(f"{command[0]} failed:\n{log.read_text(errors='replace')[-2000:]}")


def engine_key() -> str:
    """Raises `MeshError` where the named source is none."""
    series = read_series()
    return engine_key_of(source_digest(named_source(None), series.upstream), series, stock=False)


def lay_out(scratch: Path, compilers: Compilers) -> Laid:
    """Raises `MeshError` where the source cannot be had or patched."""
    series = read_series()
    source = open_source(named_source(None), series.upstream, lambda _done, _total, _line: None)
    laid = Laid(scratch, compilers)
    for path in tree_files(source.tree):
        (laid.tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source.tree / path, laid.tree / path)
    if not any((laid.tree / name).exists() for name in series.new_files()):
        apply_series(series, laid.tree)
    return laid


def compile_targets(laid: Laid, *targets: str) -> None:
    """Blocks for minutes. MESH_BUILD_JOBS: compilers at once. Raises `NotBuilt`."""
    cmake, ninja = tool_paths()
    flags = " ".join(laid.compilers.flags)
    command = [str(cmake), "-S", str(laid.tree), "-B", str(laid.built), "-G", "Ninja"]
    command += [*CMAKE_FLAGS, f"-DCMAKE_BUILD_TYPE={laid.compilers.build_type}"]
    command += [f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += [f"-DCMAKE_C_COMPILER={laid.compilers.c}"]
    command += [f"-DCMAKE_CXX_COMPILER={laid.compilers.cxx}"]
    command += [f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}"]
    laid.run(command)
    jobs = str(os.environ.get("MESH_BUILD_JOBS") or default_jobs())
    laid.run([str(ninja), "-C", str(laid.built), "-j", jobs, *targets])


def compile_backend_ops(laid: Laid, out: Path) -> None:
    """llama.cpp's own test of operations, made to know RPC servers; after ggml's targets."""
    # It keeps flags in an enumeration that has no name for their sum.
    _compile_test(laid, out, "test-backend-ops", "-fno-sanitize=enum", str(OPS_SOURCE))


def compile_rpc_test(laid: Laid, out: Path) -> None:
    """llama.cpp's own test of a client with two servers; after ggml's targets."""
    _compile_test(laid, out, "test-rpc-multi-server")


def _compile_test(laid: Laid, out: Path, name: str, *more: str) -> None:
    ggml = laid.tree / "ggml"
    command = [laid.compilers.cxx, "-std=c++17", *laid.compilers.flags]
    command += ["-O2"] if laid.compilers.build_type == "Release" else []
    command += [f"-I{ggml / 'include'}", f"-I{ggml / 'src'}"]
    command += [str(laid.tree / "tests" / f"{name}.cpp"), *more]
    command += [*laid.libraries(), "-lpthread", "-ldl", "-o", str(out / name)]
    laid.run(command)
