"""A secret that is logged is found, in whatever form and wherever; others are not."""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from discovery.grants import Role
from discovery.token import Secret, Token, encode
from tests.sansio import ROOT
from tests.secrets_forms import find_secret, token_secrets
from tunnels.identity import Identity
from tunnels.peer import Candidate

SECRET = bytes.fromhex("00f1e2d3c4b5a69788796a5b4c3d2e1f")
TOKEN = encode(
    Token(
        mesh=b"m" * 32,
        inviter=Identity.generate().peer,
        id=b"identity",
        secret=Secret(SECRET),
        role=Role.PEER,
        expires_at=1_900_000_000,
        uses=1,
        candidates=(Candidate("quic", "192.0.2.1", 4242),),
    )
)


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        SECRET.hex().encode(),
        SECRET.hex().upper().encode(),
        base64.b64encode(SECRET),
        base64.b64encode(b"x" + SECRET + b"yz"),
        base64.urlsafe_b64encode(b"xy" + SECRET),
        base64.b32encode(b"xyz" + SECRET + b"z"),
        repr(SECRET).encode(),
        str(list(SECRET)).encode(),
        TOKEN.encode(),
        TOKEN.upper().encode(),
        f"join={TOKEN[:160]}".encode(),
    ],
)
def test_a_secret_is_found_in_every_form(text: bytes) -> None:
    line = b"12:00 INFO meshnode: \xff here: " + text + b" and more\n"
    assert find_secret(line, {SECRET}) is not None
    assert find_secret(line, {bytes(range(16))}) is None


def test_a_token_gives_its_secret_away() -> None:
    assert token_secrets(f"on another machine, run:\nmesh serve join={TOKEN}\n") == {SECRET}
    assert token_secrets("mesh1 is how it starts; mesh1qqq… is cut") == set()


CULPRITS = {
    "a log record": "logging.getLogger('meshnode').warning('made %s', secret.hex())",
    "a traceback": (
        "try:\n        raise ValueError(secret)\n"
        "    except ValueError:\n        logging.getLogger('tunnels').exception('failed')"
    ),
    "a log file": "(tmp_path / 'home' / 'logs' / 'rpc.log').write_bytes(b'key ' + secret)",
    "an argument": "subprocess.run(['true', base64.b64encode(secret).decode()], check=True)",
    "stderr of a command": (
        "subprocess.run([sys.executable, '-c', 'import sys; sys.stderr.write(sys.stdin.read())'],"
        " input=secret.hex(), text=True, capture_output=True, check=True)"
    ),
    "standard error": "print(secret.hex(), file=sys.stderr)",
    "innocent": "print(repr(identity), identity.peer)",
}
HEAD = """
import base64, logging, subprocess, sys
from tunnels.identity import Identity
"""
CULPRIT = """
def test_culprit_{number}(tmp_path):
    (tmp_path / "home" / "logs").mkdir(parents=True)
    identity = Identity.load_or_create(tmp_path / "home" / "node.key")
    secret = identity.tls_key.private_bytes_raw()
    logging.getLogger("meshnode").warning("made %r of %s", identity, identity.peer)
    {leak}
"""


def test_a_run_that_logs_a_secret_fails(tmp_path: Path) -> None:
    """A whole run of pytest: all but one of its tests let their node's key out, each by a way of
    its own."""
    script, base = tmp_path / "test_culprits.py", tmp_path / "base"
    tests = (
        CULPRIT.replace("{number}", str(number)).replace("{leak}", leak)
        for number, leak in enumerate(CULPRITS.values())
    )
    script.write_text(HEAD + "".join(tests))
    options = ["-q", "-p", "tests.secrets_watch", "-p", "no:cacheprovider"]
    options += ["--rootdir", str(tmp_path), "--basetemp", str(base)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(base)  # or the run that this test is part of finds them as well
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{len(CULPRITS)} passed" in done.stdout
    summary = done.stdout.partition("secrets: ")[2]
    for number, name in enumerate(CULPRITS):
        told = f"test_culprit_{number}" in summary
        assert told == (name != "innocent"), f"{name}: {done.stdout}"
