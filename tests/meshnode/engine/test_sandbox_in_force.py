"""The sandbox as its owner sees it: what is in force, what is said, what is refused."""

from __future__ import annotations

import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import trio

from meshnode.config import SandboxMode
from meshnode.engine.cache import Engine, load_engine
from meshnode.engine.errors import EngineFailed, SandboxMissing
from meshnode.engine.rpc_server import open_rpc_server
from meshnode.engine.sandbox import landlock, launch, seatbelt, syscalls
from meshnode.engine.sandbox.check import Measure, Sandbox, prepare_sandbox
from meshnode.engine.sandbox.policy import Policy, launcher_argv
from tests.conftest import require
from tests.probe import PACKAGES, TIMEOUT_S, WITHOUT_LANDLOCK, run_launcher, run_with

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="landlock and seccomp: Linux")

MEMORY_BYTES = 64 << 20


@pytest.fixture(scope="module", autouse=True)
def _sandbox() -> None:
    sandbox = prepare_sandbox(SandboxMode.AUTO)
    assert "does not hold" not in sandbox.missing, "a hole in it is no lack of the system's"
    require("sandbox", sandbox.is_full, sandbox.missing)


@pytest.fixture
def own(tmp_path: Path) -> Policy:
    return Policy(argv=("/bin/true",), folder=Path("/"), rights=(("/", landlock.RUN),))


def test_a_required_measure_that_is_missing_starts_nothing(own: Policy) -> None:
    run = run_launcher(replace(own, argv=("/bin/echo", "started"), required=("magic",)))
    assert run.returncode == launch.MEASURE_MISSING
    assert run.stdout == b"error: the sandbox lacks a required measure: it is unknown here\n"


@pytest.mark.parametrize("text", [b"", b"junk", b"[]", b"{}", b'{"rights": 7}'])
def test_a_policy_that_makes_no_sense_starts_nothing(text: bytes) -> None:
    run = run_with(launcher_argv(), text)
    assert run.returncode == launch.POLICY_BROKEN
    assert b"cannot be applied" in run.stdout
    assert b"Traceback" not in run.stderr


@pytest.mark.parametrize("program", ["/nonexistent/server", "/etc/passwd"])
def test_a_program_that_is_none_is_told(own: Policy, program: str) -> None:
    run = run_launcher(replace(own, argv=(program,)))
    assert run.returncode == launch.PROGRAM_BROKEN
    assert program.encode() + b" cannot be started" in run.stdout


def test_the_log_says_what_confines_the_server(own: Policy) -> None:
    run = run_launcher(own)
    assert run.returncode == 0
    assert re.match(rb"in the sandbox: landlock \(ABI \d+\), seccomp", run.stdout)


# -- what this machine can enforce ----------------------------------------------------------------


def test_a_kernel_without_landlock_is_named_and_is_not_enough() -> None:
    argv = [sys.executable, "-I", "-S", "-c", WITHOUT_LANDLOCK, str(PACKAGES)]
    policy = Policy(argv=(), folder=Path("/"), rights=(), rehearse=True)
    run = run_with(argv, policy.encode())
    assert b'"files": [false, "this kernel has no landlock' in run.stdout
    assert b'"calls": [true' in run.stdout
    required = replace(policy, rehearse=False, argv=("/bin/true",), required=(launch.FILES,))
    refused = run_with(argv, required.encode())
    assert refused.returncode == launch.MEASURE_MISSING


FILES = Measure(launch.FILES, True, "landlock (ABI 7)")
CALLS = Measure(launch.CALLS, True, "seccomp")
NETWORK = Measure(launch.NETWORK, True, "a network namespace")
NO_FILES = Measure(launch.FILES, False, "this kernel has no landlock")
NO_CALLS = Measure(launch.CALLS, False, "no filter of system calls is written for riscv64")
NO_NETWORK = Measure(launch.NETWORK, False, "no network namespace of its own (EPERM)")
OLD_FILES = Measure(launch.FILES, True, "landlock (ABI 2)", landlock.gaps(2))


@pytest.mark.parametrize(
    ("measures", "is_full", "text"),
    [
        ((FILES, CALLS, NETWORK), True, "landlock (ABI 7), seccomp, no network"),
        ((FILES, CALLS, NO_NETWORK), True, "landlock (ABI 7), seccomp, no network"),
        (
            (NO_FILES, CALLS, NETWORK),
            False,
            "partial: seccomp, no network, but files: this kernel has no landlock",
        ),
        (
            (FILES, NO_CALLS, NO_NETWORK),
            False,
            "partial: landlock (ABI 7), but system calls: no filter of system calls is written "
            "for riscv64",
        ),
        (
            (OLD_FILES, CALLS, NETWORK),
            False,
            "partial: landlock (ABI 2), seccomp, no network, but files: it may cut off the files "
            "it reads: that takes Linux 6.2",
        ),
        (
            (NO_FILES, NO_CALLS, NO_NETWORK),
            False,
            f"off: {NO_FILES.text}; {NO_CALLS.text}; {NO_NETWORK.text}",
        ),
        ((), False, "off: the launcher failed"),
    ],
)
def test_what_is_in_force_is_said_exactly(
    measures: tuple[Measure, ...], is_full: bool, text: str
) -> None:
    sandbox = Sandbox(measures, "" if measures else "the launcher failed")
    assert (sandbox.describe(), sandbox.is_full) == (text, is_full)


def test_a_lease_gets_what_was_told_at_the_start_or_nothing() -> None:
    assert Sandbox((FILES, CALLS, NETWORK)).required == (launch.FILES, launch.CALLS)
    assert Sandbox((NO_FILES, CALLS, NETWORK)).required == (launch.CALLS,)
    assert Sandbox((FILES, NO_CALLS, NETWORK)).required == (launch.FILES, launch.NETWORK)


def test_without_a_launcher_there_is_no_sandbox_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    sandbox = prepare_sandbox(SandboxMode.AUTO)
    assert sandbox.describe().startswith("off: the launcher failed (")
    assert sandbox.is_amiss
    with pytest.raises(SandboxMissing, match="--sandbox require: the launcher failed"):
        prepare_sandbox(SandboxMode.REQUIRE)


def test_off_is_off_and_no_matter_for_a_warning() -> None:
    sandbox = prepare_sandbox(SandboxMode.OFF)
    assert sandbox.describe() == "off: asked for with --sandbox off"
    assert not sandbox.is_amiss


# -- a real rpc-server in it ----------------------------------------------------------------------


@pytest.fixture
def engine(engine_bin: Path) -> Engine:
    return load_engine(engine_bin)


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mesh-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.engine
async def test_a_running_server_has_no_home_no_privileges_and_few_open_files(
    engine: Engine, short: Path
) -> None:
    with trio.fail_after(TIMEOUT_S):
        async with open_rpc_server(
            engine,
            short / "rpc.sock",
            manifest=None,
            memory_limit_bytes=MEMORY_BYTES,
            threads=1,
            log=short.parent / f"{short.name}.log",
            sandbox=prepare_sandbox(SandboxMode.AUTO),
        ) as child:
            status = await trio.Path(f"/proc/{child.pid}/status").read_text()
            process = psutil.Process(child.pid)
            environment, limits = process.environ(), process.rlimit(psutil.RLIMIT_CORE)
            name, folder = process.name(), process.cwd()
    Path(f"{short}.log").unlink()
    values = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    assert (values["NoNewPrivs"], values["Seccomp"]) == ("1", "2")
    for by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        assert not int(values["SigIgn"], 16) & 1 << (by_python - 1), "as without the launcher"
    assert int(values["CapEff"], 16) in (0, 1 << 2)
    assert environment["HOME"] == environment["TMPDIR"] == str(short)
    assert limits == (0, 0)
    assert (name, folder) == ("ggml-rpc-server", str(engine.bin_dir))


@pytest.mark.engine
async def test_a_launcher_that_is_gone_is_a_sentence(
    engine: Engine, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = prepare_sandbox(SandboxMode.AUTO)
    monkeypatch.setattr(sys, "executable", str(short / "python"))
    with pytest.raises(EngineFailed, match=r"rpc-server: .*python is missing"):
        async with open_rpc_server(
            engine,
            short / "rpc.sock",
            manifest=None,
            memory_limit_bytes=MEMORY_BYTES,
            log=short / "log",
            sandbox=sandbox,
        ):
            pass


@pytest.mark.engine
async def test_a_sandbox_that_is_less_than_was_told_starts_no_server(
    engine: Engine, short: Path
) -> None:
    promised = Sandbox((Measure("magic", True, "magic"),))
    with pytest.raises(EngineFailed, match="lacks a required measure") as caught:
        async with open_rpc_server(
            engine,
            short / "rpc.sock",
            manifest=None,
            memory_limit_bytes=MEMORY_BYTES,
            log=short / "log",
            sandbox=promised,
        ):
            pass
    assert f"exited with status {launch.MEASURE_MISSING}" in str(caught.value)


# -- tables ---------------------------------------------------------------------------------------

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("architecture", HEADERS)
def test_the_numbers_of_system_calls_are_the_systems(architecture: str) -> None:
    header = HEADERS[architecture]
    require("headers", header.is_file(), f"no {header}: install linux-libc-dev")
    pattern = r"#define __NR(?:3264)?_(\w+)\s+(\d+)"
    known = {name: int(number) for name, number in re.findall(pattern, header.read_text())}
    numbers = syscalls.numbers(architecture)
    assert {name: known.get(name, number) for name, number in numbers.items()} == numbers
    assert len(known.keys() & numbers.keys()) > 80
    assert len(set(numbers.values())) == len(numbers)


def test_a_profile_for_macos_names_what_the_policy_names() -> None:
    text = seatbelt.profile({'/a "b"': landlock.READ_TREE, "/run": landlock.HOLD_SOCKETS})
    assert '(allow file-read* (subpath "/a \\"b\\""))' in text
    assert '(allow network-bind network-inbound (subpath "/run"))' in text
    assert text.count("(deny default)") == 1
    assert text.count("(") == text.count(")")
