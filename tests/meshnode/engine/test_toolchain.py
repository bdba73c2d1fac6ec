from __future__ import annotations

import fnmatch
import platform
import sys
from pathlib import Path

import pytest

from meshnode.engine import toolchain
from meshnode.engine.devices import DeviceKind, cpu_device, parse_device_list
from meshnode.engine.sandbox import landlock
from meshnode.engine.sandbox.policy import server_policy
from meshnode.engine.toolchain import Backend, detect_backend, install_command

CPUINFO = """\
processor\t: 0
vendor_id\t: GenuineIntel
model\t\t: 143
cpu MHz\t\t: 2000.1
flags\t\t: fpu avx512f avx2

processor\t: 1
flags\t\t: something else
"""


def test_a_cpu_is_known_by_what_it_can_do_and_not_by_its_clock() -> None:
    facts = toolchain._linux_cpu_facts(CPUINFO)
    assert facts == "flags=avx2 avx512f fpu\nmodel=143\nvendor_id=GenuineIntel"
    assert facts == toolchain._linux_cpu_facts(CPUINFO.replace("2000.1", "3500.9"))


def test_the_cpu_is_the_same_from_call_to_call() -> None:
    assert toolchain.cpu_identity() == toolchain.cpu_identity()
    assert toolchain.cpu_identity().startswith(platform.machine())


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ({"ID": "debian"}, "sudo apt-get install -y g++"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "sudo apt-get install -y g++"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "sudo dnf install -y gcc-c++"),
        ({"ID": "arch"}, "sudo pacman -S --needed gcc"),
        ({}, "sudo apt-get install -y g++"),
    ],
)
def test_the_remedy_speaks_the_systems_language(
    monkeypatch: pytest.MonkeyPatch, release: dict[str, str], command: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: release)
    assert install_command("compiler") == command
    monkeypatch.setattr(sys, "platform", "darwin")
    assert install_command("compiler") == "xcode-select --install"


def test_an_accelerator_is_used_when_both_its_tools_and_its_device_are_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tools = {Backend.CUDA}
    nodes = {"/dev/nvidia[0-9]*": ["/dev/nvidia0"]}
    monkeypatch.setattr(toolchain, "backend_available", lambda backend: backend in tools)
    monkeypatch.setattr(
        "meshnode.engine.toolchain.glob.glob", lambda pattern: nodes.get(pattern, [])
    )
    assert detect_backend() is Backend.CUDA
    nodes.clear()
    assert detect_backend() is Backend.CPU
    tools.add(Backend.METAL)
    assert detect_backend() is Backend.METAL


@pytest.mark.parametrize(
    ("node", "opened"),
    [
        ("/dev/nvidia0", "/dev/nvidia0"),
        ("/dev/dxg", "/dev/dxg"),
        ("/dev/kfd", "/dev/kfd"),
        ("/dev/dri/renderD128", "/dev/dri"),
    ],
)
def test_a_device_that_decides_the_backend_is_open_to_a_server_in_the_sandbox(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, node: str, opened: str
) -> None:
    """Under Windows' Linux there is one node for all, /dev/dxg."""
    there = (node, opened)
    monkeypatch.setattr(
        "glob.glob", lambda pattern: [path for path in there if fnmatch.fnmatch(path, pattern)]
    )
    monkeypatch.setattr(
        toolchain, "backend_available", lambda backend: backend is not Backend.METAL
    )
    assert detect_backend() is not Backend.CPU
    policy = server_policy(
        [sys.executable],
        socket_folder=tmp_path,
        readable=(),
        hidden=(),
        uses_gpu=True,
        memory_limit_bytes=None,
        required=(),
    )
    assert dict(policy.rights)[opened] == landlock.USE_DEVICE


def test_devices_are_read_from_what_the_engine_prints() -> None:
    text = (
        "Available devices:\n"
        "  CUDA0: NVIDIA RTX 4090 (D) (24080 MiB, 23000 MiB free)\n"
        "  Vulkan1: Intel(R) Arc (8192 MiB, 8000 MiB free)\n"
    )
    first, second = parse_device_list(text)
    assert (first.name, first.description) == ("CUDA0", "NVIDIA RTX 4090 (D)")
    assert (first.total_bytes, first.free_bytes) == (24080 << 20, 23000 << 20)
    assert (second.name, second.kind) == ("Vulkan1", DeviceKind.GPU)
    assert parse_device_list("Available devices:\n  (none)\n") == ()


def test_the_cpu_is_a_device_with_the_machines_memory() -> None:
    cpu = cpu_device()
    assert 0 < cpu.free_bytes <= cpu.total_bytes
    assert (cpu.name, cpu.kind) == ("CPU", DeviceKind.CPU)
