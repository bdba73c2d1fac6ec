"""Whoever is not on the local network gets no answer over multicast DNS (RFC 6762 section 11)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.demo.nodes import open_node
from tests.netlab.lan import LanHost, lan

pytestmark = pytest.mark.netlab

INQUIRE = Path(__file__).with_name("inquire.py")
FAR = "198.51.100.9"


def is_answered(host: LanHost, ours: str, theirs: str) -> bool:
    done = subprocess.run(
        [*host.prefix, sys.executable, str(INQUIRE), ours, theirs],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout == "yes\n"


async def test_a_question_from_beyond_has_no_answer(tmp_path: Path) -> None:
    with lan(2) as (here, there):
        (near,) = there.addresses
        there.ip("addr", "add", f"{FAR}/32", "dev", "e0")
        here.ip("route", "add", "default", "via", near)
        async with open_node(
            "relay", name="rita", home=tmp_path / "rita", log_folder=tmp_path, prefix=here.prefix
        ) as relay:
            await relay.wait_event("node", containing="announces itself")
            assert is_answered(there, near, here.addresses[0])
            assert not is_answered(there, FAR, here.addresses[0])
