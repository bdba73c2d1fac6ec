"""Runs in a namespace: maps a port of UDP and of TCP, echoes what comes in there, and prints a line
for each change of how the mapping stands. At the end of standard input it gives the ports back.

    python -m tests.netlab.mapped CHECK_S LIFETIME_S
"""

from __future__ import annotations

import json
import sys

import trio

from discovery import mappers, mapping, portmap


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def echo_datagrams(socket: trio.socket.SocketType) -> None:
    while True:
        data, sender = await socket.recvfrom(2048)
        await socket.sendto(data, sender)


def say(status: portmap.PortMapStatus) -> None:
    print(json.dumps(status.row()), flush=True)


async def main() -> None:
    udp = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
    await udp.bind(("0.0.0.0", 0))
    port = udp.getsockname()[1]
    listeners = await trio.open_tcp_listeners(port, host="0.0.0.0")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo_datagrams, udp)
        nursery.start_soon(trio.serve_listeners, echo, listeners)
        nursery.start_soon(portmap.PortMap(lambda: {"quic": port, "tcp": port}, tell=say).run)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    portmap.CHECK_S = float(sys.argv[1])
    setattr(mappers, "LIFETIME_S", int(sys.argv[2]))  # noqa: B010 - it is imported there
    mapping.MIN_RENEWAL_S = 1.0
    trio.run(main)
