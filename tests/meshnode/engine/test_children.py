from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from meshnode.engine import children
from meshnode.engine.children import child_environment, meaningful_lines, open_child
from meshnode.engine.errors import EngineFailed

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
while True: time.sleep(3600)
"""
# What the patched engine does: wait for the pipe's end, then exit. The fifo tells that it lives.
OBEDIENT = """
import os, sys
alive = open(sys.argv[1], "wb", buffering=0)
alive.write(b"u")
if os.read(int(os.environ["MESH_PARENT_FD"]), 1) == b"":
    alive.write(b"e")
"""
PARENT = """
import sys, trio
from pathlib import Path
from meshnode.engine.children import open_child
async def main():
    code, fifo, log = sys.argv[1:]
    argv = [sys.executable, "-c", code, fifo]
    async with open_child(argv, env={}, log=Path(log), name="child"):
        await trio.sleep_forever()
trio.run(main)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def first_line(lines: trio.MemoryReceiveChannel[str]) -> str:
    with trio.fail_after(20):
        return await lines.receive()


async def test_a_child_ends_with_its_block_and_its_words_are_kept(tmp_path: Path) -> None:
    send, lines = trio.open_memory_channel[str](10)
    log = tmp_path / "logs" / "child.log"
    argv = python("print('one', flush=True); import time; time.sleep(3600)")
    async with open_child(argv, env={}, log=log, name="sleeper", on_line=send.send_nowait) as child:
        assert await first_line(lines) == "one"
        assert child.returncode is None
    assert child.returncode == -signal.SIGTERM
    assert child.describe_end() == "was killed by SIGTERM"
    assert child.last_lines == ("one",)
    assert log.read_text() == "one\n"
    assert log.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    send, lines = trio.open_memory_channel[str](10)
    async with open_child(
        python(STUBBORN),
        env={},
        log=tmp_path / "log",
        name="deaf",
        on_line=send.send_nowait,
        stop_grace_s=0.05,
    ) as child:
        await first_line(lines)
    assert child.returncode == -signal.SIGKILL


async def test_cancelling_the_block_stops_the_child_too(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        async with open_child(
            python("import time; time.sleep(3600)"), env={}, log=tmp_path / "log", name="sleeper"
        ) as child:
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert child.returncode == -signal.SIGTERM


async def test_an_error_in_the_block_comes_out_as_itself(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        async with open_child(
            python("import time; time.sleep(3600)"), env={}, log=tmp_path / "log", name="sleeper"
        ):
            raise KeyError("mine")


async def test_the_end_of_a_child_is_noticed_with_its_last_words(tmp_path: Path) -> None:
    code = "import sys; print('fine so far'); print('error: no luck', file=sys.stderr); sys.exit(7)"
    with trio.fail_after(20):
        async with open_child(python(code), env={}, log=tmp_path / "log", name="unlucky") as child:
            assert await child.wait() == 7
            await child.ended.wait()
    error = child.failure(f"it {child.describe_end()}")
    assert "it exited with status 7\n  error: no luck\nIts log: " in str(error)
    assert isinstance(error, EngineFailed)


async def test_a_missing_program_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="is missing: run `mesh engine build`"):
        async with open_child(
            [str(tmp_path / "llama-server")], env={}, log=tmp_path / "log", name="llama-server"
        ):
            pass


async def test_a_child_has_no_input_no_core_dump_and_only_the_named_environment(
    tmp_path: Path,
) -> None:
    code = (
        "import os, resource, sys\n"
        "print(repr(sys.stdin.read()), resource.getrlimit(resource.RLIMIT_CORE))\n"
        "print(sorted(key for key in os.environ if key not in ('LC_CTYPE', 'PWD', '_')))\n"
        "print(os.getsid(0) == os.getpid())\n"
    )
    with trio.fail_after(20):
        async with open_child(
            python(code), env={"A": "b"}, log=tmp_path / "log", name="child"
        ) as child:
            await child.wait()
    assert child.last_lines == (
        "'' (0, 0)",
        str(sorted(["A", "MESH_PARENT_FD", *shell_variables()])),
        "True",
    )


def shell_variables() -> list[str]:
    """What this system's shell adds to an empty environment by itself."""
    run = subprocess.run(
        ["/bin/sh", "-c", "exec /usr/bin/env"], env={}, capture_output=True, check=True
    )
    names = (line.partition("=")[0] for line in run.stdout.decode().splitlines())
    return [name for name in names if name not in ("PWD", "_")]


async def test_a_secret_in_a_line_reaches_its_reader_and_neither_log_nor_errors(
    tmp_path: Path,
) -> None:
    heard: list[str] = []
    code = "print('one'); print('the word is sesame'); print('two', end='')"
    with trio.fail_after(20):
        async with open_child(
            python(code),
            env={},
            log=tmp_path / "log",
            name="talker",
            on_line=heard.append,
            redact=lambda line: line.replace("sesame", "---"),
        ) as child:
            await child.wait()
    assert heard == ["one", "the word is sesame", "two"]
    assert child.last_lines == ("one", "the word is ---", "two")
    assert (tmp_path / "log").read_text() == "one\nthe word is ---\ntwo\n"


async def test_a_child_reads_the_input_it_is_given_and_then_its_end(tmp_path: Path) -> None:
    code = "import sys; print(repr(sys.stdin.read()))"
    with trio.fail_after(20):
        async with open_child(
            python(code), env={}, log=tmp_path / "log", name="reader", stdin=b"open\n"
        ) as child:
            await child.wait()
    assert child.last_lines == (repr("open\n"),)


async def test_a_child_that_does_not_read_its_input_is_no_trouble(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with open_child(
            python("pass"), env={}, log=tmp_path / "log", name="deaf", stdin=b"x" * 2**20
        ) as child:
            assert await child.wait() == 0


def test_tokens_and_layout_options_never_reach_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MESH_JOIN", "LLAMA_ARG_N_GPU_LAYERS", "HF_TOKEN", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "x")
    environment = child_environment(EXTRA="y")
    assert {"PATH", "CUDA_VISIBLE_DEVICES", "EXTRA"} <= set(environment)
    assert not {"MESH_JOIN", "LLAMA_ARG_N_GPU_LAYERS", "HF_TOKEN"} & set(environment)


def test_no_child_survives_its_parents_kill_9(tmp_path: Path) -> None:
    """The child holds the write end of a fifo: its end is seen as the fifo's end."""
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    parent = subprocess.Popen([*python(PARENT), OBEDIENT, str(fifo), str(tmp_path / "log")])
    with fifo.open("rb", buffering=0) as alive:
        assert alive.read(1) == b"u"
        assert not select.select([alive], [], [], 0)[0]
        parent.kill()
        parent.wait()
        assert select.select([alive], [], [], 20)[0], "the child outlives its parent"
        assert alive.read() == b"e", "it saw the pipe's end, and is gone"


async def test_a_log_is_turned_over_before_it_fills_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "_MAX_LOG_BYTES", 1000)
    code = "for n in range(100): print('x' * 99, flush=True)"
    with trio.fail_after(20):
        async with open_child(python(code), env={}, log=tmp_path / "log", name="talker") as child:
            await child.wait()
    assert (tmp_path / "log").stat().st_size <= 1000
    assert (tmp_path / "log.1").exists()
    assert len(child.last_lines) == 100


async def test_a_line_without_an_end_takes_no_memory_without_end(tmp_path: Path) -> None:
    code = "import sys; sys.stdout.write('x' * 100000)"
    with trio.fail_after(20):
        async with open_child(python(code), env={}, log=tmp_path / "log", name="talker") as child:
            await child.wait()
    assert 1 <= len(child.last_lines) <= 100000 // 8192 + 1
    assert max(map(len, child.last_lines)) <= 8192


async def test_a_child_that_just_ended_may_be_stopped_on_every_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_group: int, _signal: int) -> None:
        raise PermissionError("as macOS says of a zombie")

    with trio.fail_after(20):
        argv = python("input()")  # its standard input is empty, so it ends by itself
        async with open_child(argv, env={}, log=tmp_path / "log", name="brief") as child:
            monkeypatch.setattr(os, "killpg", refuse)
            await child.stop()
    assert child.returncode == 1


def test_of_many_lines_those_that_tell_are_shown() -> None:
    lines = ["loading", "error: bad magic", "bye"]
    assert meaningful_lines(lines) == ("error: bad magic",)
    assert meaningful_lines(["a", "b"]) == ("a", "b")


def test_engine_threads_turn_in_circles_briefly_unless_the_user_says_how_they_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert child_environment()["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "50000")
    assert child_environment()["GOMP_SPINCOUNT"] == "50000"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in child_environment()
