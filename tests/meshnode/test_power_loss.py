"""Power cuts at any step of a write: what is kept is the old or the new, and never less than what
was promised to somebody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from discovery.grants import Role
from meshnode.administration import Administration
from meshnode.engine import build, cache
from meshnode.engine.toolchain import Backend, Toolchain
from meshnode.joining import Joining
from meshnode.membership import Membership
from meshnode.models.cache import ManifestCache
from meshnode.models.facts import read_facts
from meshnode.models.manifest import digest_model
from meshnode.state import Home
from tests.engine.synthetic import make_model
from tests.power_loss import Disk, Found, after_power_cuts
from tunnels import Identity

WRITE_POINTS = ("opened", "half", "written", "flushed", "renamed")


@contextmanager
def watched_home(tmp_path: Path) -> Iterator[tuple[Home, Disk]]:
    (tmp_path / "home").mkdir()
    with Home(tmp_path / "home") as home:
        disk = Disk(home.folder)
        try:
            with disk.watched():
                yield home, disk
        finally:
            disk.close()


def check_all(disk: Disk, tmp_path: Path, check: Callable[[Home, Found], None]) -> int:
    """Opens every home that may be found, as a restarted node does; says how many there were."""
    count = 0
    for found in after_power_cuts(disk, tmp_path):
        (found.folder / "lock").touch()  # a home of ours, whatever of it is there
        with Home(found.folder) as home:
            assert not list(found.folder.glob(".*.part")), "what was cut short is swept"
            check(home, found)
        count += 1
    return count


def old_or_new(disk: Disk, tmp_path: Path) -> int:
    def check(home: Home, found: Found) -> None:
        number = (home.load_json("doc.json") or {"number": 0})["number"]
        assert number in (0, 1, 2)
        assert number >= len(found.told), f"told {found.told}, found {number}"

    return check_all(disk, tmp_path, check)


def save_twice(tmp_path: Path) -> Disk:
    with watched_home(tmp_path) as (home, disk):
        for number in (1, 2):
            home.save_json("doc.json", {"number": number, "fill": "x" * 100})
            disk.tell(f"{number} is saved")
    return disk


def test_a_document_is_the_old_or_the_new_one_and_stays_once_saved(tmp_path: Path) -> None:
    assert old_or_new(save_twice(tmp_path), tmp_path) > 10


@pytest.mark.parametrize("missing", ["the file's flush", "the folder's flush"])
def test_without_either_flush_a_power_cut_is_seen_to_lose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """The test above can fail."""
    flush = os.fsync

    def skip_one_kind(descriptor: int) -> None:
        is_folder = os.path.isdir(f"/dev/fd/{descriptor}")
        if is_folder != (missing == "the folder's flush"):
            flush(descriptor)

    monkeypatch.setattr(os, "fsync", skip_one_kind)
    disk = save_twice(tmp_path)
    monkeypatch.undo()
    with pytest.raises(Exception, match=r"damaged|told"):
        old_or_new(disk, tmp_path)


def test_a_burned_invite_stays_burned_or_the_grant_never_left(tmp_path: Path) -> None:
    joiner = Identity.generate().peer
    with watched_home(tmp_path) as (home, disk):
        inviter = Membership(home, home.identity("node.key"), "inviter")
        disk.tell("founded")
        joining = Joining(inviter.ledger)
        token = joining.invite((), role=Role.PEER, lifetime_s=3600, uses=1)
        disk.tell("invited")
        joining._redeem(joiner, {"id": token.id, "secret": token.secret.reveal()})
        disk.tell("granted")
        me, mesh = home.identity("node.key").peer, inviter.ledger.own_mesh

    def check(home: Home, found: Found) -> None:
        again = Membership(home, home.identity("node.key"), "inviter")  # raises where damaged
        invites = again.ledger.invites.to_state()["invites"]
        if "founded" in found.told:
            assert (home.identity("node.key").peer, again.ledger.own_mesh) == (me, mesh)
            assert again.role_in(mesh) is Role.PEER
        if "invited" in found.told:
            assert [invite["id"] for invite in invites] == [token.id.hex()]
        if "granted" in found.told:
            assert invites[0]["redeemed_by"] == [str(joiner)]

    assert check_all(disk, tmp_path, check) > 30


def test_a_member_told_to_be_removed_stays_removed(tmp_path: Path) -> None:
    removed = Identity.generate().peer
    with watched_home(tmp_path) as (home, disk):
        founder = Membership(home, home.identity("node.key"), "founder")
        disk.tell("founded")
        desk = Administration(founder, Joining(founder.ledger), lambda: ())
        desk.answer({"op": "remove", "peer": str(removed)})
        disk.tell("removed")

    def check(home: Home, found: Found) -> None:
        ledger = Membership(home, home.identity("node.key"), "founder").ledger
        said = ledger.revocations.of_mesh(ledger.own_mesh)
        if "removed" in found.told:
            assert [one.subject for one in said] == [removed.key]

    assert check_all(disk, tmp_path, check) > 10


def test_kept_digests_are_whole_or_made_anew(tmp_path: Path) -> None:
    facts = read_facts(make_model(tmp_path / "m.gguf", layers=1, width=64, ffn=64))
    manifest = digest_model(facts)
    with watched_home(tmp_path) as (home, disk):
        folder = home.subfolder("manifests")
        ManifestCache(folder).put(manifest)
        disk.tell("kept")

    def check(home: Home, found: Found) -> None:
        kept = ManifestCache(home.subfolder("manifests")).get(facts)
        assert kept in (None, manifest)

    assert check_all(disk, tmp_path, check) > 5


def test_an_engine_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record is what makes it one, so a record beside an empty program would be run."""
    monkeypatch.setenv("MESH_CACHE", str(tmp_path / "cache"))
    engines = cache.engine_cache_dir() / "engines"
    engines.mkdir(parents=True)
    built = tmp_path / "built"
    built.mkdir()
    for name in cache.BINARIES:
        (built / name).write_bytes(name.encode())
    toolchain = Toolchain(cc="cc", cxx="c++", identity="compiler")
    wanted = build._Wanted("key", Backend.CPU, toolchain, False, "cpu")
    disk = Disk(engines)
    with disk.watched():
        wanted.finish(built, "source")
        disk.tell("built")
    disk.close()
    count = 0
    for found in after_power_cuts(disk, tmp_path):
        home = found.folder.rename(tmp_path / "cache" / "engine" / "engines.now")
        for record in home.glob(f"*/{cache.RECORD_NAME}"):
            engine = cache._read_record(record)
            for name in cache.BINARIES if engine else ():
                assert (record.parent / "bin" / name).read_bytes() == name.encode()
        home.rename(found.folder)
        count += 1
    assert count > 30


def test_a_port_number_that_was_lost_is_no_damage(tmp_path: Path) -> None:
    with watched_home(tmp_path) as (home, disk):
        home.save_json("port.json", {"port": 4567})
        disk.tell("saved")

    def check(home: Home, found: Found) -> None:
        saved = home.load_json("port.json")
        assert saved == {"port": 4567} or (saved is None and not found.told)

    assert check_all(disk, tmp_path, check) > 3


# -- killed, with the power on --------------------------------------------------------------------

WRITE_BOTH = """
import sys
from pathlib import Path
from meshnode.joining import Joining
from meshnode.membership import Membership
from meshnode.state import Home
from discovery.grants import Role
with Home(Path(sys.argv[1])) as home:
    inviter = Membership(home, home.identity("node.key"), "inviter")
    for number in range(3):
        print(number, flush=True)
        Joining(inviter.ledger).invite((), role=Role.PEER, lifetime_s=3600, uses=1)
"""


@pytest.mark.parametrize("write", [1, 2, 3], ids=["membership", "first invite", "second invite"])
@pytest.mark.parametrize("point", WRITE_POINTS)
def test_a_node_killed_while_it_writes_finds_old_or_new(
    tmp_path: Path, point: str, write: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITE_BOTH, str(tmp_path / "home")],
        env={**os.environ, "MESH_CRASH_AT": f"state.{point}:{write}"},
        stdout=subprocess.PIPE,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    begun = len(done.stdout.split())
    with Home(tmp_path / "home") as home:
        again = Membership(home, home.identity("node.key"), "inviter")
        assert len(again.ledger.invites.to_state()["invites"]) in (max(0, begun - 1), begun)
        assert again.role_in(again.ledger.own_mesh) is Role.PEER
        assert not list(home.folder.glob(".*"))
