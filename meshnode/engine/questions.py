"""What the programs of this machine answer, where no answer is as good as an empty one."""

from __future__ import annotations

import subprocess

_TIMEOUT_S = 30  # a driver that nobody uses is loaded for the question


def output_of(command: list[str]) -> str:
    """What it printed; "" where it is not there, fails or hangs."""
    try:
        run = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.decode(errors="replace")
