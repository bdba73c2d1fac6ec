"""Which measures this machine can enforce, found out by taking them: a rehearsal.

What a kernel is said to offer may be forbidden in a container, so nothing is believed that was
not tried from inside.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meshnode.config import SandboxMode
from meshnode.engine.children import child_environment
from meshnode.engine.errors import SandboxMissing
from meshnode.engine.sandbox import landlock, seatbelt
from meshnode.engine.sandbox.launch import CALLS, FILES, NETWORK, SEATBELT
from meshnode.engine.sandbox.policy import Policy, launcher_argv

REHEARSAL_TIMEOUT_S = 60.0

WORDS = {
    FILES: "files",
    CALLS: "system calls",
    NETWORK: "network namespace",
    SEATBELT: "everything",
}
"""What each measure confines."""


@dataclass(frozen=True)
class Measure:
    """One measure: `text` is its name, or why it does not stand. `gap`: what it leaves open."""

    name: str
    stands: bool
    text: str
    gap: str = ""


@dataclass(frozen=True)
class Sandbox:
    """What confines the rpc-servers of one node. No measure stands: they run without.

    `hidden`: the node's folders; `reason`: why nothing stands.
    """

    measures: tuple[Measure, ...] = ()
    reason: str = ""
    hidden: tuple[Path, ...] = ()

    @property
    def standing(self) -> tuple[str, ...]:
        return tuple(measure.name for measure in self.measures if measure.stands)

    @property
    def required(self) -> tuple[str, ...]:
        """What a server's launcher must find again, so that no lease gets less than was told."""
        second_wall = NETWORK if CALLS in self.standing else None
        return tuple(name for name in self.standing if name != second_wall)

    @property
    def is_full(self) -> bool:
        """Files and system calls are confined, and nothing is known to be left open.

        The network namespace is a second wall behind the filter, which denies every socket that
        leads off the machine: its absence leaves nothing open.
        """
        whole = {m.name for m in self.measures if m.stands and not m.gap}
        return {FILES, CALLS} <= whole or SEATBELT in whole

    @property
    def is_amiss(self) -> bool:
        """It was wanted and is not full."""
        return not self.is_full and self != UNCONFINED

    @property
    def missing(self) -> str:
        """What keeps the sandbox from being full; empty when it is."""
        if self.is_full:
            return ""
        if not self.standing:
            return self.reason or "; ".join(measure.text for measure in self.measures)
        return "; ".join(
            f"{WORDS[m.name]}: {m.gap or m.text}"
            for m in self.measures
            if m.name != NETWORK and (m.gap or not m.stands)
        )

    def describe(self) -> str:
        """`landlock (ABI 7), seccomp, no network`; `partial, …, but …`; `off: …`."""
        if not self.standing:
            return f"off: {self.missing}"
        named = [m.text for m in self.measures if m.stands and m.name != NETWORK]
        if {CALLS, NETWORK, SEATBELT} & set(self.standing):
            named.append("no network")
        text = ", ".join(named)
        return text if self.is_full else f"partial: {text}, but {self.missing}"


UNCONFINED = Sandbox(reason="asked for with --sandbox off")


def prepare_sandbox(mode: SandboxMode, hidden: Sequence[Path] = ()) -> Sandbox:
    """What a worker's rpc-servers will run in. Blocks for about 50 ms.

    Raises `SandboxMissing` when it is required to be full and is not.
    """
    if mode is SandboxMode.OFF:
        return UNCONFINED
    measures, reason = rehearse()
    sandbox = Sandbox(measures, reason, tuple(hidden))
    if mode is SandboxMode.REQUIRE and not sandbox.is_full:
        raise SandboxMissing(sandbox.missing)
    return sandbox


def rehearse() -> tuple[tuple[Measure, ...], str]:
    """Every measure as it stands here, and why there is none. Blocks."""
    tools = dict.fromkeys(("/usr/bin/true", "/bin/cat"), landlock.RUN)
    policy = Policy((), Path("/"), rights=(), profile=seatbelt.profile(tools), rehearse=True)
    try:
        run = subprocess.run(
            launcher_argv(),
            input=policy.encode(),
            capture_output=True,
            timeout=REHEARSAL_TIMEOUT_S,
            env=child_environment(),
            check=False,
        )
        text = run.stdout.decode(errors="replace").strip()
        if run.returncode != 0:
            last = text.splitlines()[-1:] or [f"it ended with status {run.returncode}"]
            return (), f"the launcher failed ({last[0].removeprefix('error: ')})"
        found: dict[str, tuple[bool, str]] = json.loads(text)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return (), f"the launcher failed ({error})"
    return tuple(_measure(name, *told) for name, told in found.items()), ""


def _measure(name: str, stands: bool, text: str) -> Measure:
    gap = ""
    if name == FILES and stands:
        gap = landlock.gaps(landlock.abi())
    return Measure(name, stands, text, gap)
