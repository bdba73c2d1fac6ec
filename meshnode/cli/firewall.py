"""Whether a firewall of this machine keeps peers out, and the words that let them in.

Only what any user can see is looked at; nothing is changed. A node that is not let in is no
obstacle while it can dial: either side may print the token.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from meshnode.cli.checks import Check, Verdict

NAME = "firewall"
ASK_TIMEOUT_S = 5.0
_UFW = Path("/etc/ufw/ufw.conf")
_TOOLS = "/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin:/usr/local/sbin"
_MAC = "/usr/libexec/ApplicationFirewall/socketfilterfw"


def firewall(
    port: int | None, platform: str = sys.platform, ufw: Path = _UFW, tools: str = _TOOLS
) -> Check:
    """port: the node's, of UDP and TCP; None: it has none yet. tools: where the system's are.
    Blocks for as long as they take."""
    named = "PORT" if port is None else str(port)
    if platform == "darwin":
        return _mac()
    if platform == "win32":
        return _windows(named)
    with contextlib.suppress(OSError):
        if "ENABLED=yes" in ufw.read_text(encoding="utf-8", errors="replace"):
            return _closed("ufw", f"sudo ufw allow {named}", port)
    if _said(tools, "firewall-cmd", "--state").strip() == "running":
        opens = f"--add-port={named}/udp --add-port={named}/tcp"
        return _closed("firewalld", f"sudo firewall-cmd {opens}", port)
    rules = _said(tools, "nft", "list", "ruleset")
    if "hook input" in rules and "policy drop" in rules:
        rule = f"udp dport {named} accept, and tcp dport {named} accept"
        return _closed("nftables", f"in its input chain: {rule}", port)
    unseen = "" if rules or os.geteuid() == 0 else "; what nftables does, root alone can see"
    return Check(NAME, Verdict.OK, f"neither ufw nor firewalld is on{unseen}")


def _closed(name: str, remedy: str, port: int | None) -> Check:
    where = " (PORT: what the node says it listens at, or --listen)" if port is None else ""
    text = (
        f"{name} is on, and may keep peers from dialling this machine: {remedy}{where}. Without "
        "that, dial from here: start the other machine first and join with its token"
    )
    return Check(NAME, Verdict.NOTE, text)


def _mac() -> Check:
    if "enabled" not in _output([_MAC, "--getglobalstate"]).lower():
        return Check(NAME, Verdict.OK, "the application firewall is off")
    text = (
        "the application firewall is on: allow incoming connections when macOS asks, or run "
        f"sudo {_MAC} --add {sys.executable}"
    )
    return Check(NAME, Verdict.NOTE, text)


def _windows(port: str) -> Check:
    rule = "netsh advfirewall firewall add rule name=mesh dir=in action=allow"
    text = (
        "allow mesh in private networks when Windows asks, or as administrator: "
        f"{rule} protocol=UDP localport={port}, and the same with protocol=TCP"
    )
    return Check(NAME, Verdict.NOTE, text)


def _said(tools: str, *command: str) -> str:
    """What a tool of the system says; nothing where there is none, or it says nothing to us."""
    found = shutil.which(command[0], path=tools)
    return "" if found is None else _output([found, *command[1:]])


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ASK_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
