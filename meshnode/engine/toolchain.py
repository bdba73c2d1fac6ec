"""What this machine can build with: compiler, backends, CPU, and the tools PyPI brings."""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import shlex
import shutil
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

from meshnode.engine.cuda import cuda_architectures, nvcc
from meshnode.engine.errors import NoCompiler
from meshnode.engine.questions import output_of
from meshnode.errors import UsageError

JOB_MEMORY_BYTES = 10**9  # what the largest translation units take under g++


class Backend(StrEnum):
    """What computes. Every engine can also compute on the CPU."""

    CPU = "cpu"
    CUDA = "cuda"
    METAL = "metal"
    VULKAN = "vulkan"
    HIP = "hip"


BACKEND_NEEDS = {
    Backend.CUDA: "the CUDA toolkit (nvcc and cublas)",
    Backend.METAL: "macOS on Apple silicon",
    Backend.VULKAN: "the Vulkan SDK (glslc and vulkan/vulkan.h)",
    Backend.HIP: "ROCm (hipconfig)",
}


@dataclass(frozen=True)
class Toolchain:
    """`identity` names compiler and version; another identity means another build.

    `accelerator`: what cmake is told beside, of this machine.
    """

    cc: str
    cxx: str
    identity: str
    accelerator: tuple[str, ...] = ()


def parse_backend(name: str) -> Backend:
    try:
        return Backend(name)
    except ValueError:
        known = ", ".join(Backend)
        raise UsageError(f"there is no backend {name!r}: known are {known}") from None


def find_toolchain(backend: Backend) -> Toolchain:
    """The compilers cmake will use. Raises `NoCompiler` with the command that installs them."""
    cc = _first_that_runs(os.environ.get("CC"), ("cc", "gcc", "clang"))
    cxx = _first_that_runs(os.environ.get("CXX"), ("c++", "g++", "clang++"))
    if cc is None or cxx is None:
        raise NoCompiler(
            f"no C++ compiler works here: install one with `{install_command('compiler')}`"
        )
    if not backend_available(backend):
        raise NoCompiler(
            f"the backend {backend} needs {BACKEND_NEEDS[backend]}, which is not found here: "
            "install it, or choose another with --backend cpu"
        )
    identity, told = _accelerator(backend)
    return Toolchain(cc[0], cxx[0], " / ".join((cxx[1], platform.machine(), *identity)), told)


def _accelerator(backend: Backend) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What its compiler adds to the identity, and what cmake is told of it."""
    if backend is Backend.CUDA:
        compiler, architectures = nvcc() or "nvcc", cuda_architectures()
        version = _last_line([compiler, "--version"])
        if not version:
            raise NoCompiler(
                f"{compiler} does not run: install the CUDA toolkit anew, or choose another "
                "backend with --backend cpu"
            )
        told = (f"-DCMAKE_CUDA_COMPILER={compiler}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        return (version, f"for {architectures}"), told
    if backend is Backend.HIP:
        return ("hip " + _first_line(["hipconfig", "--version"]),), ()
    return (), ()


def _first_that_runs(
    from_environment: str | None, names: tuple[str, ...]
) -> tuple[str, str] | None:
    """(path, first line of --version). macOS has stubs named c++ that only ask to be installed."""
    for name in (from_environment,) if from_environment else names:
        words = shlex.split(name)
        path = shutil.which(words[0]) if words else None
        if path is None:
            continue
        version = _first_line([path, *words[1:], "--version"])
        if version:
            # cmake takes "ccache g++" from the environment, a bare path from us
            return (name if len(words) > 1 else path, version)
    return None


def _first_line(command: list[str]) -> str:
    lines = output_of(command).splitlines()
    return lines[0].strip() if lines else ""


def _last_line(command: list[str]) -> str:
    lines = output_of(command).strip().splitlines()
    return lines[-1].strip() if lines else ""


def backend_available(backend: Backend) -> bool:
    """Whether the tools to build it are here; the device itself need not be."""
    if backend is Backend.CUDA:
        return nvcc() is not None
    if backend is Backend.METAL:
        return sys.platform == "darwin" and platform.machine() == "arm64"
    if backend is Backend.VULKAN:
        headers = (Path(os.environ.get("VULKAN_SDK", "/usr")), Path("/usr"))
        found = any((root / "include/vulkan/vulkan.h").exists() for root in headers)
        return shutil.which("glslc") is not None and found
    if backend is Backend.HIP:
        return shutil.which("hipconfig") is not None
    return True


_DEVICE_NODES = {
    Backend.CUDA: ("/dev/nvidia[0-9]*", "/dev/dxg"),
    Backend.HIP: ("/dev/kfd",),
    Backend.VULKAN: ("/dev/dri/renderD*",),
}


def detect_backend() -> Backend:
    """The fastest backend for which both the tools and a device are here."""
    if backend_available(Backend.METAL):
        return Backend.METAL
    for backend in (Backend.CUDA, Backend.HIP, Backend.VULKAN):
        present = any(glob.glob(pattern) for pattern in _DEVICE_NODES[backend])
        if present and backend_available(backend):
            return backend
    return Backend.CPU


def cpu_identity() -> str:
    """Machine and a digest of the CPU's model and features: `-march=native` depends on them."""
    if sys.platform == "darwin":
        facts = output_of(["sysctl", "-n", "machdep.cpu.brand_string"])
    else:
        try:
            facts = _linux_cpu_facts(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        except OSError:  # a sandbox without /proc
            facts = platform.processor()
    digest = hashlib.sha256(facts.encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"


_CPU_FACTS = frozenset(
    ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part", "isa")
)


def _linux_cpu_facts(cpuinfo: str) -> str:
    """The first processor's lines that say what it can do; clocks and counters change."""
    first = cpuinfo.strip().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    facts = {key.strip(): value.strip() for key, _, value in pairs if key.strip() in _CPU_FACTS}
    for name in ("flags", "Features"):
        if name in facts:
            facts[name] = " ".join(sorted(facts[name].split()))
    return "\n".join(f"{key}={value}" for key, value in sorted(facts.items()))


def default_jobs() -> int:
    """One compiler a core, but no more than memory holds."""
    cores = len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(cores, psutil.virtual_memory().available // JOB_MEMORY_BYTES))


def tool_paths() -> tuple[Path, Path]:
    """cmake and ninja of the PyPI packages we depend on, so that the system need have neither."""
    import cmake
    import ninja

    return Path(cmake.CMAKE_BIN_DIR) / "cmake", Path(ninja.BIN_DIR) / "ninja"


_PACKAGES = {
    "compiler": {"apt": "g++", "dnf": "gcc-c++", "pacman": "gcc", "zypper": "gcc-c++"},
    "patch": {"apt": "patch", "dnf": "patch", "pacman": "patch", "zypper": "patch"},
    "git": {"apt": "git", "dnf": "git", "pacman": "git", "zypper": "git"},
}
_INSTALL = {
    "apt": "sudo apt-get install -y",
    "dnf": "sudo dnf install -y",
    "pacman": "sudo pacman -S --needed",
    "zypper": "sudo zypper install -y",
}
_FAMILIES = {
    "debian": "apt",
    "ubuntu": "apt",
    "fedora": "dnf",
    "rhel": "dnf",
    "centos": "dnf",
    "arch": "pacman",
    "suse": "zypper",
    "opensuse": "zypper",
}


def install_command(what: str) -> str:
    """The command that installs `what` ("compiler", "patch", "git") on this system."""
    if sys.platform == "darwin":
        return "xcode-select --install"
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    for family in (release.get("ID", ""), *release.get("ID_LIKE", "").split()):
        if family in _FAMILIES:
            tool = _FAMILIES[family]
            return f"{_INSTALL[tool]} {_PACKAGES[what][tool]}"
    return f"{_INSTALL['apt']} {_PACKAGES[what]['apt']}"
