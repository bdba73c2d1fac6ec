"""A model of 120 GB, of which a header and a little of each tensor exist: a node gives its bytes to
several at once, over HTTP and to a member, in bounded memory."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio

from discovery.token import Token, parse_untrusted
from meshnode.connections import Connections
from meshnode.demo.nodes import NodeProcess
from meshnode.membership import Membership
from meshnode.models.facts import ModelFacts, TensorFacts, read_facts
from meshnode.models.peers.source import Holders, PeerSource
from meshnode.models.store.store import NewFile, Store
from meshnode.models.store.writer import SliceWriter
from meshnode.state import Home
from tests.e2e.conftest import ANY_HTTP, World
from tests.e2e.test_registry import key_of, registry_of
from tests.engine.synthetic import make_model
from tunnels import Endpoint

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does"),
]

MAX_RESIDENT_BYTES = 300 * 10**6
READERS = 8
RANGE_BYTES = 16 << 20
CUT_AFTER_BYTES = 2 * 10**9
PIECE_BYTES = 16 << 20
HELD = tuple(f"blk.60.attn_{part}.weight" for part in "qkv")


def high_water_bytes(node: NodeProcess) -> int:
    """Not ru_maxrss: that counts the pages of the process before, which was the tests'."""
    status = Path(f"/proc/{node.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


BLOCK_BYTES = 1 << 16
BEGIN_BYTES = 2 * BLOCK_BYTES
"""Within these of each tensor lies its mark. The rest is a hole."""


def mark_of(tensor: TensorFacts) -> tuple[int, bytes]:
    """Where in the tensor, and what: in a block that is its own, so that it counts as written."""
    return -tensor.offset % BLOCK_BYTES, hashlib.sha256(tensor.name.encode()).digest()


def is_of(tensor: TensorFacts, begin: bytes | bytearray) -> bool:
    at, mark = mark_of(tensor)
    return begin[at : at + len(mark)] == mark


@pytest.fixture
def huge(tmp_path: Path) -> ModelFacts:
    (tmp_path / "served").mkdir()
    path = make_model(
        tmp_path / "served" / "huge.gguf",
        layers=126,
        width=8192,
        vocab=120_000,
        heads=64,
        ffn=28_672,
        hollow=True,
    )
    assert path.stat().st_size > 115 * 10**9
    facts = read_facts(path)
    with path.open("r+b") as file:
        for tensor in facts.tensors:
            at, mark = mark_of(tensor)
            if tensor.nbytes > BEGIN_BYTES:
                file.seek(tensor.offset + at)
                file.write(mark)
    return facts


def hold_some(home: Path, facts: ModelFacts) -> str:
    """The home has a slice of it with a few tensors; its identity."""
    with Home(home) as made_home:
        made_home.subfolder("models")
    path = facts.path
    with path.open("rb") as source:
        header = source.read(min(tensor.offset for tensor in facts.tensors))
        file = NewFile(path.name, path.stat().st_size, header)
        made = Store(home / "models").create([file], "https://example.org/huge.gguf", "etag:1")
        with SliceWriter(made.folder) as writer:
            for span in writer.missing(HELD):
                for start in range(span.start, span.stop, PIECE_BYTES):
                    stop = min(span.stop, start + PIECE_BYTES)
                    source.seek(start)
                    writer.write(0, start, memoryview(source.read(stop - start)))
                    writer.done(0, start, stop)
    return made.identity.provisional


# -- over HTTP ------------------------------------------------------------------------------------


async def read_range(http: httpx.AsyncClient, data: str, tensor: TensorFacts) -> None:
    stop = min(tensor.nbytes, RANGE_BYTES) + tensor.offset
    headers = {"range": f"bytes={tensor.offset}-{stop - 1}"}
    async with http.stream("GET", data, headers=headers) as answer:
        assert answer.status_code == 206, await answer.aread()
        seen, begin = 0, b""
        async for piece in answer.aiter_raw():
            begin += piece[: max(0, BEGIN_BYTES - len(begin))]
            seen += len(piece)
    assert seen == stop - tensor.offset
    assert is_of(tensor, begin)


async def read_all_until_cut(http: httpx.AsyncClient, data: str, size_bytes: int) -> None:
    async with http.stream("GET", data) as answer:
        assert answer.status_code == 200
        assert int(answer.headers["content-length"]) == size_bytes
        seen = 0
        async for piece in answer.aiter_raw():
            seen += len(piece)
            if seen >= CUT_AFTER_BYTES:
                return


# -- to a member ----------------------------------------------------------------------------------


@asynccontextmanager
async def member(folder: Path, token: Token, identity: str) -> AsyncIterator[PeerSource]:
    """What the node holds of the model, as another member sees it."""
    with Home(folder) as home:
        key = home.identity("node.key")
        membership = Membership(home, key, "asker")
        endpoint = Endpoint(key, authorize=membership.authorize)
        connections = Connections(endpoint, membership, lambda _event: None)
        connections.offer_services()
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.run, "127.0.0.1", 0)
            await connections.join(token)
            (holder,) = await Holders(connections.introduced, lambda _: "worker").find(identity)
            yield holder
            nursery.cancel_scope.cancel()


async def read_as_member(holder: PeerSource, tensor: TensorFacts) -> None:
    begin = bytearray()
    seen = 0

    def into(data: memoryview) -> None:
        nonlocal seen
        seen += len(data)
        begin.extend(data[: max(0, BEGIN_BYTES - len(begin))])

    await holder.read(0, tensor.offset, tensor.offset + tensor.nbytes, into)
    assert seen == tensor.nbytes
    assert is_of(tensor, begin)


async def test_120_gigabytes_are_given_range_by_range_in_bounded_memory(
    world: World, huge: ModelFacts
) -> None:
    identity = hold_some(world.folder / "worker", huge)
    size_bytes = huge.path.stat().st_size
    large = [tensor for tensor in huge.tensors if tensor.nbytes > RANGE_BYTES]
    chosen = large[:: len(large) // (2 * READERS)]
    async with world.worker(*ANY_HTTP, "--models", str(huge.path.parent)) as node:
        registry = await registry_of(node)
        headers = key_of(world.folder / "worker")
        async with httpx.AsyncClient(timeout=100, trust_env=False, headers=headers) as http:
            listed = (await http.get(f"{registry}/registry")).json()["models"]
            (row,) = (one for one in listed if one["holders"][0]["complete"] and one["layers"] > 99)
            data = f"{registry}/{row['id']}/data"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_all_until_cut, http, data, size_bytes)
                for first in range(READERS):
                    nursery.start_soon(read_each, http, data, chosen[first::READERS])
            beyond = {"range": f"bytes={size_bytes}-"}
            assert (await http.get(data, headers=beyond)).status_code == 416
        over_http = high_water_bytes(node)

        token = parse_untrusted(await world.token_of(node))
        held = [tensor for tensor in huge.tensors if tensor.name in HELD]
        async with member(world.folder / "asker", token, identity) as holder:
            assert holder.files[0].size_bytes == size_bytes
            async with trio.open_nursery() as nursery:
                for tensor in held:
                    nursery.start_soon(partial(read_as_member, holder, tensor))
        resident = high_water_bytes(node)
    print(f"resident: {over_http / 10**6:.0f} MB over HTTP, then {resident / 10**6:.0f} MB")
    assert resident <= MAX_RESIDENT_BYTES


async def read_each(http: httpx.AsyncClient, data: str, tensors: list[TensorFacts]) -> None:
    for tensor in tensors:
        await read_range(http, data, tensor)
