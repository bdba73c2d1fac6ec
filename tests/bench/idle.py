"""A part of `./just bench tunnels`: what a node costs that has nothing to do but keep one peer.

Two workers on a local network of their own (with multicast DNS, as by default; where namespaces
cannot be made, on loopback), connected; then nobody asks anything of them. Counted is the node's
own process, from the kernel's books.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import psutil
import trio

from meshnode.demo.nodes import invite_token, open_node, write_token
from tests.bench.processes import verdict
from tests.netlab.lan import lan
from tests.netlab.netns import can_be_made

CPU_TO_REACH = 0.005  # of a core
RSS_TO_REACH_BYTES = 90_000_000
SETTLE_S = 15.0  # looking for better links, first questions by multicast

Prefix = tuple[str, ...]


@contextmanager
def places() -> Iterator[tuple[tuple[Prefix, Prefix], tuple[str, ...]]]:
    """What to put before each node's command, and options of both."""
    if can_be_made():
        with lan(2) as (one, other):
            yield (one.prefix, other.prefix), ()
    else:
        yield ((), ()), ("--listen", "127.0.0.1:0")


async def watch(folder: Path, seconds: float) -> tuple[float, int]:
    """Of the node that printed the token: the share of a core it used, and its RSS in bytes."""
    with places() as ((here, there), options):
        common = ("worker", "--threads", "1", *options)
        async with open_node(
            *common, name="one", home=folder / "one", log_folder=folder, prefix=here
        ) as one:
            token = write_token(folder / "token", invite_token(await one.wait_event("invite")))
            async with open_node(
                *(*common, "--join-file", str(token)),
                name="two",
                home=folder / "two",
                log_folder=folder,
                prefix=there,
            ) as two:
                await two.wait_event("peer", containing="connected to one")
                await trio.sleep(SETTLE_S)
                process = psutil.Process(one.pid)
                before_s = _cpu_s(process)
                await trio.sleep(seconds)
                return (_cpu_s(process) - before_s) / seconds, process.memory_info().rss


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def idle_rows(seconds: float) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="mesh-bench-idle-") as name:
        share, rss_bytes = trio.run(watch, Path(name), seconds)
    return [
        "| idle node with one peer | of a core | RSS |",
        "|---|---|---|",
        f"| over {seconds:.0f} s | {share:.2%} | {rss_bytes / 1e6:.0f} MB |",
        "",
        verdict("idle node, of 0.5 % of a core", share / CPU_TO_REACH, at_most=1.0),
        verdict("idle node, of 90 MB", rss_bytes / RSS_TO_REACH_BYTES, at_most=1.0),
    ]


@click.command()
@click.option("--seconds", type=click.FloatRange(1), default=60.0)
def idle(seconds: float) -> None:
    """What a node costs that does nothing: share of a core, memory."""
    click.echo("\n".join(idle_rows(seconds)))


if __name__ == "__main__":
    idle()
