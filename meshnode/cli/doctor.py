"""`mesh doctor`: is this machine fit for a node, one line a check."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
import trio

from meshnode.cli.checks import Check, Verdict
from meshnode.cli.firewall import firewall
from meshnode.cli.network_checks import look, network_checks, relays_known
from meshnode.cli.settings import home_option, offline_option, portmap_option, stun_option
from meshnode.config import human_bytes, parse_servers
from meshnode.descriptors import raise_open_files
from meshnode.engine.build import find_built
from meshnode.engine.cache import Engine, engine_cache_dir
from meshnode.engine.devices import list_devices
from meshnode.engine.sandbox.check import WORDS, Measure, Sandbox, rehearse
from meshnode.errors import MeshError
from meshnode.state import PORT_DOCUMENT, default_home
from tunnels import ListenFailed
from tunnels.stun import Server

LOW_DISK_BYTES = 2 << 30
"""Building the engine takes 700 MB; logs and pulled layers come on top."""
LOW_OPEN_FILES = 1024
"""What a node with a few dozen peers, each with several streams, may need."""


@click.command()
@home_option
@stun_option
@portmap_option
@offline_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def doctor(home: Path | None, stun: str, portmap: bool, offline: bool, as_json: bool) -> int:
    """Say whether this machine is fit for a node: network, engine, devices, sandbox, home, limits.

    Exit code 0; 1 when a check is bad. A check of which a note is made does not make it so.
    """
    home = home or default_home()
    checks = list(examine(home))
    checks += examine_network(home, () if offline else parse_servers(stun), portmap, offline)
    if as_json:
        click.echo(json.dumps({"checks": [asdict(check) for check in checks]}))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            click.echo(f"{check.verdict:<5} {check.name:<{width}}  {check.text}")
    return 1 if any(check.verdict is Verdict.BAD for check in checks) else 0


def examine(home: Path) -> Iterator[Check]:
    """Every check of the machine itself, in the order they are shown. Blocks for about 50 ms, and
    as long as a GPU takes to wake. Changes nothing."""
    yield from _engine()
    yield from _sandbox(Sandbox(*rehearse()))
    yield _home(home)
    yield _disk("disk of the home", home)
    yield _disk("disk of the engine", engine_cache_dir())
    yield _open_files()


def examine_network(
    home: Path, servers: Collection[Server], portmap: bool, offline: bool
) -> Iterator[Check]:
    """Every check of the network. Takes some seconds where nothing answers. Maps no port."""
    if offline:
        yield Check("network", Verdict.OK, "not looked at beyond this machine (--offline)")
    else:
        relays = relays_known(home)
        try:
            yield from network_checks(trio.run(partial(look, servers, relays, portmap=portmap)))
        except ListenFailed as error:
            yield Check("network", Verdict.BAD, str(error))
    yield firewall(_port(home))


def _port(home: Path) -> int | None:
    """The node's, of last time."""
    try:
        port = json.loads((home / PORT_DOCUMENT).read_bytes())["port"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return port if isinstance(port, int) and 0 < port < 65536 else None


def _engine() -> Iterator[Check]:
    try:
        engine = find_built()
    except MeshError as error:
        yield Check("engine", Verdict.BAD, str(error))
        return
    if engine is None:
        text = "none is built for this version: the first start builds it, or `mesh engine build`"
        yield Check("engine", Verdict.NOTE, text)
        return
    yield Check("engine", Verdict.OK, f"{engine.key} ({engine.backend}) in {engine.bin_dir}")
    yield _devices(engine)


def _devices(engine: Engine) -> Check:
    try:
        devices = list_devices(engine)
    except MeshError as error:
        return Check("devices", Verdict.BAD, str(error))
    named = ", ".join(f"{one.name} ({human_bytes(one.free_bytes)} free)" for one in devices)
    if any(one.is_gpu for one in devices):
        return Check("devices", Verdict.OK, named)
    text = f"{named}: no GPU that this engine ({engine.backend}) can use"
    return Check("devices", Verdict.OK, f"{text}; with one, `mesh engine build --backend` names it")


def _sandbox(sandbox: Sandbox) -> Iterator[Check]:
    verdict = Verdict.OK if sandbox.is_full else Verdict.NOTE
    yield Check("sandbox", verdict, sandbox.describe())
    for measure in sandbox.measures:
        yield _measure(measure)


def _measure(measure: Measure) -> Check:
    name = f"sandbox: {WORDS[measure.name]}"
    if not measure.stands or measure.gap:
        return Check(name, Verdict.NOTE, measure.gap or measure.text)
    return Check(name, Verdict.OK, measure.text)


def _home(home: Path) -> Check:
    name = "home"
    try:
        found = home.stat()
    except FileNotFoundError:
        return Check(name, Verdict.OK, f"{home} is not there yet: the first start makes it")
    except OSError as error:
        return Check(name, Verdict.BAD, f"{home} cannot be looked at: {error.strerror}")
    if not stat.S_ISDIR(found.st_mode):
        return Check(name, Verdict.BAD, f"{home} is no folder: name another one with --home")
    if found.st_uid != os.getuid():
        return Check(name, Verdict.BAD, f"{home} belongs to somebody else: name one of yours")
    if found.st_mode & 0o077:
        text = f"{home} is open to other users: chmod 700 it (the next start does)"
        return Check(name, Verdict.BAD, text)
    keys = (path for path in home.glob("*.key") if path.is_file())
    loose = sorted(path.name for path in keys if path.stat().st_mode & 0o077)
    if loose:
        return Check(name, Verdict.BAD, f"{', '.join(loose)} in {home}: chmod 600, others can read")
    return Check(name, Verdict.OK, f"{home}, closed to other users")


def _disk(name: str, folder: Path) -> Check:
    absolute = folder.absolute()
    place = next(each for each in (absolute, *absolute.parents) if os.path.exists(each))
    free_bytes = shutil.disk_usage(place).free
    text = f"{human_bytes(free_bytes)} free at {place}"
    if free_bytes < LOW_DISK_BYTES:
        return Check(name, Verdict.NOTE, f"{text}: less than {human_bytes(LOW_DISK_BYTES)}")
    return Check(name, Verdict.OK, text)


def _open_files() -> Check:
    most = raise_open_files()  # as every node does
    if 0 <= most < LOW_OPEN_FILES:
        text = f"{most} at once: have the system's limit for a program raised (`ulimit -Hn`)"
        return Check("open files", Verdict.NOTE, text)
    return Check("open files", Verdict.OK, f"{most} at once" if most >= 0 else "any number")
