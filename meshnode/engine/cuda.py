"""What a CUDA build takes beside nvcc: which GPUs it is for, and what a toolkit can lack.

Without a word from us llama.cpp asks for the GPUs of this machine ("native"), and where none is to
be seen nvcc builds for the oldest one it knows. So the architectures are settled here, before
anything compiles, and they are part of what an engine is known by: a program for one GPU does not
start its kernels on another.
"""

from __future__ import annotations

import os
import re
import shutil

from meshnode.engine.errors import NoCompiler
from meshnode.engine.questions import output_of

_NVCC_ELSEWHERE = "/usr/local/cuda/bin/nvcc"  # where CUDA's installer puts it, off the PATH
_NVIDIA_SMI_ELSEWHERE = "/usr/lib/wsl/lib/nvidia-smi"
_CAPABILITY = re.compile(r"(\d+)\.(\d+)")
_LACKING = re.compile(r"links to:\s+CUDA::(\w+)\s+but the target was not found")
_COMPILER_TOO_NEW = re.compile(r"unsupported (?:GNU|clang) version", re.IGNORECASE)
_PARTS = {
    "cublas": "cublas (cublas_v2.h and libcublas.so; NVIDIA's package libcublas-dev)",
    "cuda_driver": "libcuda.so to link with (lib64/stubs; NVIDIA's package cuda-driver-dev)",
}


def nvcc() -> str | None:
    """`CUDACXX`, as cmake has it, before the PATH."""
    named = os.environ.get("CUDACXX")
    if named:
        return shutil.which(named)
    return shutil.which("nvcc") or shutil.which(_NVCC_ELSEWHERE)


def cuda_architectures() -> str:
    """What to build for, as cmake has it: `CUDAARCHS`, or the GPUs of this machine ("86-real").

    Raises `NoCompiler` where neither says.
    """
    named = os.environ.get("CUDAARCHS", "").strip()
    if named:
        return named
    capabilities = {match.groups() for match in map(_CAPABILITY.fullmatch, _gpus()) if match}
    if not capabilities:
        raise NoCompiler(
            "no GPU is to be seen here that the backend cuda could be built for (nvidia-smi names "
            "none): set CUDAARCHS to the compute capability of the one it is to run on (86 for "
            "8.6), or choose another backend with --backend cpu"
        )
    ordered = sorted(capabilities, key=lambda pair: (int(pair[0]), int(pair[1])))
    return ";".join(f"{major}{minor}-real" for major, minor in ordered)


def _gpus() -> list[str]:
    """The compute capability of each GPU, "8.6"; none where the driver does not answer."""
    query = shutil.which("nvidia-smi") or shutil.which(_NVIDIA_SMI_ELSEWHERE)
    if query is None:
        return []
    lines = output_of([query, "--query-gpu=compute_cap", "--format=csv,noheader"]).splitlines()
    return [line.strip() for line in lines]


def what_cuda_lacks(output: str) -> str | None:
    """The sentence for a user, if cmake's output says that the toolkit is the reason."""
    parts = [_PARTS.get(name, name) for name in dict.fromkeys(_LACKING.findall(output))]
    if parts:
        return (
            f"the CUDA toolkit of {nvcc()} has no {' and no '.join(parts)}: install the whole "
            "toolkit (NVIDIA's package cuda-toolkit), name the nvcc of one that has it with "
            "CUDACXX, or choose another backend with --backend cpu"
        )
    if _COMPILER_TOO_NEW.search(output):
        return (
            "nvcc does not work with a C++ compiler as new as the one here: install an older g++ "
            "and name it with CUDAHOSTCXX, or choose another backend with --backend cpu"
        )
    return None
