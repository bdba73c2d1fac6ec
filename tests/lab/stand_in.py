"""A program in ggml-rpc-server's place: it lends nothing, and pushes and takes what it is told to.

Whoever connects to its `-H` socket says one line: `push N` has it push N bytes of `x`, `take N`
answers with the next N bytes that were pushed to it; `flood` pushes without end. What is not taken
it reads a mebibyte of, and no more.
"""

from __future__ import annotations

import sys
from pathlib import Path

from meshnode.engine.cache import Engine

PROGRAM = """\
#!{python}
import socket, sys, threading

OPTIONS = ["-H", "--push-listen", "--push-to"]
if "--help" in sys.argv:
    print("  --push-listen unix:/path" if {knows} else "  -H HOST", file=sys.stderr)
    raise SystemExit(1)


def listen(option):
    if option not in sys.argv:
        return None
    door = socket.socket(socket.AF_UNIX)
    door.bind(sys.argv[sys.argv.index(option) + 1].removeprefix("unix:"))
    door.listen(8)
    return door


rpc, inward, outward = map(listen, OPTIONS)
pushed, arrived, taker = bytearray(), threading.Condition(), []


def take_all():
    while True:
        peer = inward.accept()[0]
        while data := peer.recv(65536):
            with arrived:
                arrived.wait_for(lambda: len(pushed) < 1 << 20)
                pushed.extend(data)
                arrived.notify_all()


def push(data):
    if not taker:
        taker.append(outward.accept()[0])
    taker[0].sendall(data)


def serve(client):
    words = client.makefile().readline().split()
    if words[:1] == ["push"]:
        push(b"x" * int(words[1]))
        client.sendall(b"pushed")
    if words[:1] == ["flood"]:
        while True:
            push(b"x" * 65536)
    if words[:1] == ["take"]:
        with arrived:
            arrived.wait_for(lambda: len(pushed) >= int(words[1]))
            client.sendall(bytes(pushed[: int(words[1])]))
            del pushed[: int(words[1])]
            arrived.notify_all()
    client.close()


if inward:
    threading.Thread(target=take_all, daemon=True).start()
while True:
    threading.Thread(target=serve, args=rpc.accept()[:1], daemon=True).start()
"""


def make_engine(folder: Path, *, knows_ring: bool = True) -> Engine:
    """An engine of which only the rpc-server is there."""
    program = folder / "ggml-rpc-server"
    program.write_text(PROGRAM.format(python=sys.executable, knows=knows_ring))
    program.chmod(0o755)
    return Engine(folder, "stand-in", "cpu", False, "nowhere", "none", "any")
