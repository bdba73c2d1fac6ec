"""A model's bytes over HTTP: all of them, ranges of them, for whom, and never a slice's holes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import httpx
import pytest

from meshnode.gateway import model_data
from meshnode.models.model_file import ModelFile
from tests.meshnode.gateway.model_node import KEY, ROOT, ModelNode, listed
from tests.meshnode.gateway.test_answers import error_of
from tests.meshnode.models.store.slices import make_whole


async def test_a_whole_file_arrives_byte_for_byte(node: ModelNode) -> None:
    path = node.put()
    answer = await node.data()
    assert answer.status_code == 200
    assert answer.content == path.read_bytes()
    assert answer.headers["accept-ranges"] == "bytes"
    assert re.fullmatch(r'"[0-9a-f]{32}-0"', answer.headers["etag"])


async def test_each_shard_is_a_file_of_its_own(node: ModelNode) -> None:
    node.put(shards=2)
    (row,) = await listed(node)
    for index, file in enumerate(row["files"]):
        answer = await node.http.get(f"{ROOT}/m/data?file={index}")
        assert answer.content == (node.home / "models" / file["name"]).read_bytes()
    assert answer.headers["etag"].endswith('-1"')
    beyond = await node.http.get(f"{ROOT}/m/data?file=2")
    assert (beyond.status_code, error_of(beyond)["code"]) == (404, "unknown_file")


async def test_one_range_is_a_206_of_it(node: ModelNode) -> None:
    content = node.put().read_bytes()
    answer = await node.data(range="bytes=100-299")
    assert (answer.status_code, answer.content) == (206, content[100:300])
    assert answer.headers["content-range"] == f"bytes 100-299/{len(content)}"


async def test_several_ranges_come_in_parts(node: ModelNode) -> None:
    content = node.put().read_bytes()
    answer = await node.data(range="bytes=500-509,0-3")
    assert answer.status_code == 206
    boundary = answer.headers["content-type"].removeprefix("multipart/byteranges; boundary=")
    parts = answer.content.split(f"\r\n--{boundary}".encode())
    assert [part.partition(b"\r\n\r\n")[2] for part in parts[1:3]] == [
        content[500:510],
        content[:4],
    ]
    assert parts[3] == b"--\r\n"


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=" + ",".join(["0-1"] * 65)])
async def test_a_range_that_cannot_be_is_refused_with_the_size(node: ModelNode, asked: str) -> None:
    size = node.put().stat().st_size
    answer = await node.data(range=asked)
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{size}"
    assert error_of(answer)["code"] in ("no_such_bytes", "too_many_ranges")


async def test_if_range_of_other_bytes_gives_all_of_these(node: ModelNode) -> None:
    content = node.put().read_bytes()
    tag = (await node.data(range="bytes=0-0")).headers["etag"]
    same = await node.data(range="bytes=5-9", if_range=tag)
    assert (same.status_code, same.content) == (206, content[5:10])
    for other in ('"other"', f"W/{tag}", "Sat, 21 Nov 2026 10:00:00 GMT"):
        assert (await node.data(range="bytes=5-9", if_range=other)).content == content


async def test_who_has_the_bytes_already_gets_none(node: ModelNode) -> None:
    node.put()
    tag = (await node.data(range="bytes=0-0")).headers["etag"]
    answer = await node.data(if_none_match=f'"x", {tag}')
    assert (answer.status_code, answer.content) == (304, b"")
    assert (await node.data(if_match=tag)).status_code == 200
    other = await node.data(if_match='"x"')
    assert (other.status_code, error_of(other)["code"]) == (412, "other_bytes")


async def test_head_tells_size_and_tag_and_sends_nothing(node: ModelNode) -> None:
    path = node.put()
    answer = await node.http.head(f"{ROOT}/m/data", headers={"range": "bytes=0-1"})
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(path.stat().st_size)
    assert answer.headers["etag"] == (await node.data(range="bytes=0-0")).headers["etag"]


async def test_a_replaced_file_has_another_tag(node: ModelNode) -> None:
    path = node.put()
    before = (await node.data(range="bytes=0-0")).headers["etag"]
    os.utime(path, ns=(1, 1))
    assert (await node.data(range="bytes=0-0")).headers["etag"] != before


async def test_of_a_slice_come_the_bytes_it_holds_and_never_its_holes(
    node: ModelNode, tmp_path: Path
) -> None:
    whole = make_whole(tmp_path / "source")
    names = set(whole.names("blk.1."))
    node.put_part(whole, sorted(names))
    content = whole.facts.path.read_bytes()
    first = min(tensor.offset for tensor in whole.facts.tensors)
    assert (await node.data(range=f"bytes=0-{first - 1}")).content == content[:first]
    for tensor in whole.facts.tensors:
        last = tensor.offset + tensor.nbytes - 1
        answer = await node.data(range=f"bytes={tensor.offset}-{last}")
        if tensor.name in names:
            assert answer.content == content[tensor.offset : last + 1]
        else:
            assert (answer.status_code, error_of(answer)["code"]) == (404, "not_here")
    for hopeless in ({}, {"range": f"bytes=0-9,{first}-"}):
        answer = await node.data(**hopeless)
        assert (answer.status_code, error_of(answer)["code"]) == (404, "not_here")
        assert "mesh=1" in str(error_of(answer)["message"])


async def test_a_complete_slice_is_the_whole_file(node: ModelNode, tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "source")
    node.put_part(whole, whole.all_names)
    assert (await node.data()).content == whole.facts.path.read_bytes()


async def test_a_slice_moved_from_its_document_gives_no_zeros(
    node: ModelNode, tmp_path: Path
) -> None:
    whole = make_whole(tmp_path / "source", vocab=40_000)
    node.put_part(whole, whole.names("blk.1."))
    (node.home / "models" / "m" / "m.gguf").rename(node.home / "models" / "n.gguf")
    embedding = next(t for t in whole.facts.tensors if t.name == "token_embd.weight")
    assert embedding.nbytes > 1 << 20, "smaller ones cannot be told from zeros"
    answer = await node.data("n", range=f"bytes={embedding.offset}-{embedding.offset + 9}")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_here")


async def test_a_slice_that_was_written_to_is_not_believed(node: ModelNode, tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "source")
    node.put_part(whole, whole.all_names)
    os.utime(node.home / "models" / "m" / "m.gguf", ns=(1, 1))
    answer = await node.data(range="bytes=0-9")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "model_changing")
    assert answer.headers["retry-after"].isdecimal()


async def test_a_file_written_to_midway_is_not_read_any_further(
    node: ModelNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = node.put()
    monkeypatch.setattr(model_data, "PIECE_BYTES", 1000)
    read = ModelFile.read

    def replaced(file: ModelFile, start: int, size_bytes: int) -> bytes:
        if start == 3000:
            os.utime(path, ns=(1, 1))
        return read(file, start, size_bytes)

    monkeypatch.setattr(ModelFile, "read", replaced)
    with pytest.raises(httpx.RemoteProtocolError):
        await node.data()
    assert (await node.http.get("/health")).status_code == 503, "nobody else is harmed"


@pytest.mark.parametrize(
    "shown",
    ["", KEY, "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer ké"],
)
async def test_bytes_need_the_operators_key(node: ModelNode, shown: str) -> None:
    node.put()
    headers = [(b"authorization", shown.encode())]
    for method in ("GET", "HEAD"):
        answer = await node.http.request(method, f"{ROOT}/m/data", headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
    assert KEY not in answer.text


async def test_without_the_key_nobody_learns_which_models_have_bytes(node: ModelNode) -> None:
    for name in ("m", "nothing"):
        answer = await node.http.get(f"{ROOT}/{name}/data", headers={"authorization": ""})
        assert error_of(answer)["code"] == "key_needed"


@pytest.mark.parametrize("query", ["file=x", "file=-1", "file=", "file=%00", "file=1e3", "file=²"])
async def test_a_file_that_is_no_number_is_refused(node: ModelNode, query: str) -> None:
    node.put()
    answer = await node.http.get(f"{ROOT}/m/data?{query}")
    assert (answer.status_code, error_of(answer)["code"]) == (400, "bad_request")


async def test_too_many_readers_are_asked_to_wait(
    node: ModelNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.put()
    monkeypatch.setattr(model_data, "MAX_STREAMS", 0)
    answer = await node.data()
    assert (answer.status_code, error_of(answer)["code"]) == (503, "gateway_busy")
