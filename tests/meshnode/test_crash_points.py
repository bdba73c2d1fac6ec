"""Named points: nothing in a normal run, SIGKILL or a halt where the environment names one."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.crash_points import POINTS, CrashPoint

ROOT = Path(__file__).resolve().parent.parent.parent
REACH_TWICE = """
from meshnode.crash_points import reached
for number in (1, 2):
    print(number, flush=True)
    reached("lease.granted")
    reached("lease.asked")
print("alive", flush=True)
"""


def run(**environment: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", REACH_TWICE],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.split()


def test_nothing_happens_in_a_normal_run() -> None:
    assert run() == (0, ["1", "2", "alive"])


@pytest.mark.parametrize(
    ("text", "printed"), [("lease.granted", ["1"]), ("lease.granted:2", ["1", "2"])]
)
def test_the_process_is_killed_at_its_point(text: str, printed: list[str]) -> None:
    assert run(MESH_CRASH_AT=text) == (-signal.SIGKILL, printed)


def test_the_process_stands_still_at_its_gate(tmp_path: Path) -> None:
    path = tmp_path / "gate"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(30)
        with subprocess.Popen(
            [sys.executable, "-c", REACH_TWICE],
            env={**os.environ, "MESH_CRASH_AT": "lease.asked", "MESH_CRASH_GATE": str(path)},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            held, _ = listener.accept()
            with held:
                assert held.recv(100) == b"lease.asked\n"
                assert process.poll() is None
            assert process.stdout
            assert process.stdout.read().split() == ["1", "2", "alive"]
    assert process.returncode == 0


@pytest.mark.parametrize("text", ["lease.grantet", "", "lease.granted:0", "lease.granted:x"])
def test_a_point_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        CrashPoint(text, None)


def test_every_point_is_somewhere_in_the_code_and_listed() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "meshnode").rglob("*.py")]
    used = {point for text in sources for point in re.findall(r'\breached\("([a-z.]+)"\)', text)}
    assert used == POINTS
