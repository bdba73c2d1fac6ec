"""The registry API: what a node says of its models, and what nobody can make it say."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from meshnode.models.cache import ManifestCache
from meshnode.models.facts import read_facts
from meshnode.models.manifest import digest_model
from meshnode.models.peers.overview import Model, Share
from meshnode.models.pull.source import SourceFile
from meshnode.models.spans import Span
from tests.meshnode.gateway.model_node import KEY, ROOT, ModelNode, Unread, listed
from tests.meshnode.gateway.test_answers import error_of
from tests.meshnode.models.store.slices import SOURCE, make_whole
from tunnels import PeerId

# -- what there is --------------------------------------------------------------------------------


async def test_a_node_without_models_says_so(node: ModelNode) -> None:
    assert await listed(node) == []


async def test_a_whole_model_is_held_by_this_node_in_all_its_tensors(node: ModelNode) -> None:
    path = node.put()
    (row,) = await listed(node)
    facts = read_facts(path)
    assert (row["name"], row["layers"], row["format"]) == ("m", 2, "gguf")
    assert row["files"] == [{"name": "m.gguf", "size_bytes": path.stat().st_size}]
    assert row["root"] is None, "nobody has read all of it yet"
    assert row["id"] == row["provisional"]
    assert row["holders"] == [
        {
            "node": "attic",
            "peer": "peer-of-attic",
            "complete": True,
            "held_bytes": facts.weight_bytes,
            "tensors": None,
        }
    ]
    assert row["members_asked"] is False
    assert node.asked == []


async def test_once_its_digests_are_kept_a_model_has_its_root_and_tells_them(
    node: ModelNode,
) -> None:
    path = node.put()
    await listed(node)
    manifest = digest_model(read_facts(path))
    ManifestCache(node.home / "manifests").put(manifest)
    (row,) = await listed(node)
    assert row["id"] == row["root"] == manifest.root
    tensors = (await node.http.get(f"{ROOT}/{manifest.root}/tensors")).json()["tensors"]
    known = {entry.name: f"blake3:{entry.digest.hex()}" for entry in manifest.tensors}
    assert {tensor["name"]: tensor["digest"] for tensor in tensors} == known


async def test_a_slice_names_the_tensors_it_holds(node: ModelNode, tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "source")
    names = whole.names("blk.1.")
    node.put_part(whole, names)
    (row,) = await listed(node)
    (mine,) = row["holders"]
    assert (mine["complete"], set(mine["tensors"])) == (False, set(names))
    assert row["source"] == SOURCE
    answer = await node.http.get(f"{ROOT}/{row['id']}/tensors")
    assert {one["name"] for one in answer.json()["tensors"] if one["here"]} == set(names)


PEER = PeerId(bytes(range(32)))


async def test_members_are_asked_only_when_that_is_wished(node: ModelNode, tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "source")
    node.put_part(whole, whole.names("blk.1."))
    size = whole.facts.path.stat().st_size
    last = max(whole.facts.tensors, key=lambda tensor: tensor.offset)
    theirs = Span(0, last.offset, last.offset + last.nbytes)
    weights = whole.facts.weight_bytes
    crumbs = tuple(Span(0, 2 * at, 2 * at + 1) for at in range(len(whole.facts.tensors) + 2))

    def share(name: str, held: int, source: Unread | None = None) -> Share:
        return Share(name, PEER, "f" * 64, held, held == weights, source)

    node.there = [
        [
            share("tower", 5, Unread((SourceFile("m.gguf", size, ""),), (theirs,))),
            share("cellar", weights),
            share("odd", 9, Unread((SourceFile("other.gguf", size + 1, ""),), (Span(0, 0, 9),))),
            share("silent", 7),
            share("liar", 8, Unread((SourceFile("m.gguf", size, ""),), crumbs)),
        ]
    ]
    (row,) = await listed(node)
    assert len(row["holders"]) == 1
    (row,) = await listed(node, "?mesh=1")
    assert node.asked == [row["id"]]
    assert row["members_asked"] is True
    told = {
        one["node"]: (one["complete"], one["held_bytes"], one["tensors"])
        for one in row["holders"][1:]
    }
    assert told == {
        "tower": (False, last.nbytes, [last.name]),
        "cellar": (True, weights, None),
        "odd": (False, 9, None),
        "silent": (False, 7, None),
        "liar": (False, 8, None),
    }


async def test_models_that_only_others_have_are_listed_too(node: ModelNode, tmp_path: Path) -> None:
    facts = make_whole(tmp_path / "source").facts
    size = facts.path.stat().st_size
    far = Model(("far", "ann/far"), "a" * 64, "b" * 64, [Share("tower", PEER, "a" * 64, 3, False)])
    far.facts, far.files = facts, (("far.gguf", size),)
    node.elsewhere = [far, Model(("odd",), "c" * 64, None, [Share("t", PEER, "c" * 64, 1, True)])]
    assert await listed(node) == []
    row, odd = await listed(node, "?mesh=1")
    assert (row["id"], row["name"], row["aliases"]) == ("b" * 64, "far", ["ann/far"])
    assert (row["layers"], row["files"]) == (
        facts.n_layers,
        [{"name": "far.gguf", "size_bytes": size}],
    )
    assert [one["node"] for one in row["holders"]] == ["tower"], "this node holds nothing"
    assert (odd["name"], sorted(odd)) == ("odd", ["name", "trouble"])


async def test_a_file_that_is_no_model_is_named_without_its_path(node: ModelNode) -> None:
    (node.home / "models" / "broken.gguf").write_bytes(b"GGUF" + bytes(10))
    answer = await node.http.get(f"{ROOT}/registry")
    (row,) = answer.json()["models"]
    assert (row["name"], sorted(row)) == ("broken", ["name", "trouble"])
    assert str(node.home) not in answer.text
    asked = await node.http.get(f"{ROOT}/broken/metadata")
    assert (asked.status_code, error_of(asked)["code"]) == (409, "model_unusable")


async def test_metadata_is_what_the_header_says(node: ModelNode) -> None:
    facts = read_facts(node.put())
    answer = await node.http.get(f"{ROOT}/m/metadata")
    told = answer.json()
    assert answer.status_code == 200
    assert (told["layers"], told["width"]) == (facts.n_layers, facts.n_embd)
    assert told["weight_bytes"] == facts.weight_bytes
    assert str(node.home) not in answer.text


async def test_tensors_lie_where_they_are_told_to(node: ModelNode) -> None:
    path = node.put()
    answer = await node.http.get(f"{ROOT}/M/tensors")  # case does not matter
    for tensor, fact in zip(answer.json()["tensors"], read_facts(path).tensors, strict=True):
        assert (tensor["name"], tensor["offset"]) == (fact.name, fact.offset)
        assert tensor["size_bytes"] == fact.nbytes
        assert tensor["digest"] is None


async def test_two_models_of_one_name_are_asked_for_by_identity(node: ModelNode) -> None:
    for folder in ("a", "b"):
        (node.home / "models" / folder).mkdir()
        node.put(f"{folder}/m.gguf", layers=2 if folder == "a" else 3)
    answer = await node.http.get(f"{ROOT}/m/metadata")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "ambiguous_model")
    assert str(node.home) not in answer.text
    for row in await listed(node):
        assert row["id"] in str(error_of(answer)["message"])
        told = await node.http.get(f"{ROOT}/{row['id']}/metadata")
        assert told.json()["layers"] == row["layers"]
    assert (await node.http.get(f"{ROOT}/a%2Fm/metadata")).json()["layers"] == 2


# -- who may, and what never is -------------------------------------------------------------------


HOSTILE = (
    "nothing",
    "..%2f..%2fetc%2fpasswd",
    "%2Fetc%2Fpasswd",
    "../../../../etc/passwd",
    "m.gguf",
    "m%00",
    "%ff%fe",
    "m%0d%0aX-Evil:%201",
    "x" * 5000,
    "0" * 64,
    "%F0%9F%92%A9",
    "a/../m",
    "",
    "%2F",
)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("what", ["metadata", "tensors", "data"])
async def test_what_is_no_model_of_ours_is_404_whatever_it_is_called(
    node: ModelNode, name: str, what: str
) -> None:
    path = node.put()
    (node.home / "secret").write_text("nobody reads this")
    head = f"GET {ROOT}/{name}/{what} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    answer = await raw(node, f"{head}Authorization: Bearer {KEY}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert len(answer) < 2000
    assert b"X-Evil: 1\r\n" not in answer
    assert path.exists()


async def test_a_path_to_a_file_beside_the_models_reads_nothing(node: ModelNode) -> None:
    node.put()
    secret = node.home / "secret.gguf"
    secret.write_bytes((node.home / "models" / "m.gguf").read_bytes())
    for name in (str(secret), "../secret.gguf", "../secret", "secret"):
        answer = await node.data(name.replace("/", "%2F"))
        assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_model")


async def test_the_listing_wants_to_know_whom_to_ask(node: ModelNode) -> None:
    answer = await node.http.get(f"{ROOT}/registry?mesh=yes")
    assert (answer.status_code, error_of(answer)["code"]) == (400, "bad_request")


async def test_nothing_of_it_can_be_changed(node: ModelNode) -> None:
    node.put()
    for what in ("registry", "m/metadata", "m/tensors", "m/data"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            answer = await node.http.request(method, f"{ROOT}/{what}")
            assert answer.status_code == 405


async def raw(node: ModelNode, request: bytes) -> bytes:
    """The answer to a request as no client would write it."""
    port = node.http.base_url.port
    assert port is not None
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(request)
        return b"".join([bytes(data) async for data in stream])
