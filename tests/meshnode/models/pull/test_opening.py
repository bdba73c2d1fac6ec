"""References to hubs and registries, with a server on loopback in their place; and headers."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import trio

from meshnode.errors import UsageError
from meshnode.models.cursor import DamagedGguf, NotGguf
from meshnode.models.header import read_header
from meshnode.models.pull import client, opening, remote_header
from meshnode.models.pull.opening import model_layer_untrusted, open_reference
from meshnode.models.pull.reach import Reach, welcome
from meshnode.models.pull.reference import HubReference, OllamaReference, parse_reference
from meshnode.models.pull.remote_header import fetch_header
from meshnode.models.pull.source import SourceError
from meshnode.models.shelf import DEMO_MODEL
from meshnode.models.web import Web as Opener
from tests.lab.web import Query, Web, redirect

CONTENT = random.Random(7).randbytes(50_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
TOKEN = "hf_onlyforthehub"
OPEN = Reach(welcome, welcome)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
async def web(nursery: trio.Nursery) -> Web:
    web = Web(CONTENT)
    await nursery.start(web.run)
    return web


@pytest.fixture
async def hub(web: Web, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Web:
    """Like Hugging Face: what is said of the file here, its bytes elsewhere (at `web`)."""
    hub = Web(b"")

    async def sending_on(query: Query, stream: trio.abc.Stream) -> bool:
        told = (f'X-Linked-ETag: "{SHA256}"', f"X-Linked-Size: {len(CONTENT)}")
        await stream.send_all(redirect(f"{web.url}?signature=short-lived", *told))
        return True

    hub.behave = sending_on
    await nursery.start(hub.run)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


# --- Hugging Face -------------------------------------------------------------------------------


async def test_a_file_of_the_hub_is_known_by_its_sha256_and_read_where_it_lies(
    hub: Web, web: Web
) -> None:
    taken = bytearray()
    async with open_reference(
        parse_reference("hf:org/repo/q4/m.gguf@v2"), OPEN, with_token=True
    ) as source:
        assert source.validator == f"sha256:{SHA256}"
        assert source.files[0].name == "m.gguf"
        await source.read(0, 1000, 2000, taken.extend)
    assert taken == CONTENT[1000:2000]
    assert [query.target for query in hub.queries] == ["/org/repo/resolve/v2/q4/m.gguf"]
    assert hub.queries[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert web.queries
    assert not any("authorization" in query.headers for query in web.queries)


async def test_all_shards_are_opened(hub: Web) -> None:
    async with open_reference(parse_reference("hf:org/repo/m-00001-of-00002.gguf"), OPEN) as source:
        names = [file.name for file in source.files]
        assert names == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
        assert source.validator == f"sha256:{SHA256}\nsha256:{SHA256}"


async def test_a_gated_repository_says_what_to_do_and_not_the_token(hub: Web) -> None:
    async def gated(query: Query, stream: trio.abc.Stream) -> bool:
        await stream.send_all(hub.head(403, 0, "X-Error-Code: GatedRepo"))
        return True

    hub.behave = gated
    with pytest.raises(SourceError, match="ask for access on its page") as caught:
        async with open_reference(parse_reference("hf:org/repo/m.gguf"), OPEN, with_token=True):
            pass
    assert TOKEN not in str(caught.value)


REFUSALS = {
    "gated": (403, "X-Error-Code: GatedRepo"),
    "private, or not there": (401, "X-Error-Code: RepoNotFound"),
    "private": (403,),
}


@pytest.mark.parametrize("answer", REFUSALS.values(), ids=REFUSALS)
async def test_no_token_of_this_machine_serves_others(hub: Web, answer: tuple[int, str]) -> None:
    """Not in what their orders name, and not where the repository is not for everybody."""

    async def for_those_with_a_token(query: Query, stream: trio.abc.Stream) -> bool:
        if "authorization" in query.headers:
            return await sending_on(query, stream)
        await stream.send_all(hub.head(answer[0], 0, *answer[1:]))
        return True

    assert hub.behave is not None
    sending_on, hub.behave = hub.behave, for_those_with_a_token
    opener = opening_web()
    with pytest.raises(SourceError, match=r"not for everybody.*`mesh pull` on that machine") as no:
        async with opener.open_for_stranger("hf:org/repo/m.gguf"):
            pass
    assert TOKEN not in str(no.value)
    assert not any("authorization" in query.headers for query in hub.queries)
    async with opener.open_for_user("hf:org/repo/m.gguf") as source:
        assert source.files[0].size_bytes == len(CONTENT)


async def test_what_is_for_everybody_is_there_for_others_too(hub: Web) -> None:
    async with opening_web().open_for_stranger("hf:org/repo/m.gguf") as source:
        taken = bytearray()
        await source.read(0, 1000, 2000, taken.extend)
    assert taken == CONTENT[1000:2000]
    assert not any("authorization" in query.headers for query in hub.queries)


def opening_web() -> Opener:
    """A node's, whose policy lets this test's loopback pass."""
    opener = Opener()
    opener._for_users = opener._for_strangers = OPEN
    return opener


async def test_a_token_or_a_name_that_cannot_be_is_refused_here(
    hub: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "two\x7fwords")
    with pytest.raises(UsageError, match="odd characters"):
        async with open_reference(parse_reference("hf:org/repo/m.gguf"), OPEN, with_token=True):
            pass
    with pytest.raises(UsageError, match="cannot be"):
        async with open_reference(HubReference("org/re--po", ("m.gguf",)), OPEN):
            pass
    assert not hub.queries


async def test_who_wants_to_stay_off_the_network_does(
    hub: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        async with open_reference(parse_reference("hf:org/repo/m.gguf"), OPEN):
            pass
    assert not hub.queries


async def test_a_token_is_not_sent_where_its_user_forbids_it(
    hub: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    async with open_reference(parse_reference("hf:org/repo/m.gguf"), OPEN, with_token=True):
        assert not any("authorization" in query.headers for query in hub.queries)


# --- Ollama -------------------------------------------------------------------------------------


def manifest(*layers: dict[str, object]) -> bytes:
    return json.dumps({"schemaVersion": 2, "layers": layers}).encode()


MODEL = {
    "mediaType": "application/vnd.ollama.image.model",
    "digest": f"sha256:{SHA256}",
    "size": len(CONTENT),
}
TEMPLATE = {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:0", "size": 3}


async def test_a_model_of_ollama_is_the_one_layer_with_weights(web: Web) -> None:
    async def registry(query: Query, stream: trio.abc.Stream) -> bool:
        if "/manifests/" in query.target:
            return await web.say(manifest(TEMPLATE, MODEL), stream)
        return await web.honest(query, stream)

    web.behave = registry
    taken = bytearray()
    reference = parse_reference("ollama:tiny:1b")
    async with open_reference(reference, OPEN, f"http://127.0.0.1:{web.port}") as source:
        assert source.validator == f"sha256:{SHA256}"
        assert source.files[0].name == "tiny-1b.gguf"
        await source.read(0, 0, len(CONTENT), taken.extend)
    assert taken == CONTENT
    targets = [query.target for query in web.queries[:2]]
    assert targets[0] == "/v2/library/tiny/manifests/1b"
    assert targets[1] == f"/v2/library/tiny/blobs/sha256:{SHA256}"


async def test_a_blob_of_another_length_than_announced_is_not_used(web: Web) -> None:
    async def registry(query: Query, stream: trio.abc.Stream) -> bool:
        if "/manifests/" in query.target:
            return await web.say(manifest({**MODEL, "size": 5}), stream)
        return await web.honest(query, stream)

    web.behave = registry
    with pytest.raises(SourceError, match="5 were announced"):
        async with open_reference(
            OllamaReference("library", "x", "1b"), OPEN, f"http://127.0.0.1:{web.port}"
        ):
            pass


async def test_a_registry_that_has_it_not_or_says_too_much_is_told(web: Web) -> None:
    answers = [(404, b""), (200, b"x" * (opening.MAX_MANIFEST_BYTES + 1))]
    for (status, data), told in zip(answers, ["there is no", "larger than"], strict=True):

        async def registry(
            query: Query, stream: trio.abc.Stream, data: bytes = data, status: int = status
        ) -> bool:
            return await web.say(data, stream, status)

        web.behave = registry
        with pytest.raises(SourceError, match=told):
            async with open_reference(
                OllamaReference("library", "x", "1b"), OPEN, f"http://127.0.0.1:{web.port}"
            ):
                pass


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"\xff",
        b'{"layers": 5}',
        b'{"layers": [1]}',
        b"[" * 100_000,
        manifest(),
        manifest(TEMPLATE),
        manifest(MODEL, MODEL),
        manifest({**MODEL, "digest": "md5:0"}),
        manifest({**MODEL, "size": "5"}),
        manifest({**MODEL, "size": 0}),
        manifest({**MODEL, "digest": 5}),
    ],
)
def test_manifests_that_make_no_sense_are_refused(data: bytes) -> None:
    with pytest.raises(SourceError):
        model_layer_untrusted(data, "ollama:x:y")


async def test_a_model_of_peers_is_not_looked_for_on_the_web() -> None:
    with pytest.raises(UsageError, match="peers"):
        async with open_reference(parse_reference("mesh:x"), OPEN):
            pass


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/m.gguf", "m.gguf"),
        ("/a/m", "m.gguf"),
        ("/a/..", None),
        ("/a/c:\\x.gguf", None),
        ("", None),
    ],
)
def test_a_file_to_be_gets_a_name_that_leads_nowhere_else(path: str, name: str | None) -> None:
    found = opening._name(path)
    assert Path(found).name == found
    assert found == name if name else found.startswith("model-")


# --- headers ------------------------------------------------------------------------------------


async def header_of(web: Web, content: bytes) -> remote_header.RemoteHeader:
    web.content = content
    async with open_reference(parse_reference(web.url), OPEN) as source:
        return await fetch_header(source, 0)


async def test_a_header_is_fetched_in_steps_and_the_weights_are_not(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_header, "FIRST_STEP_BYTES", 1000)
    content = DEMO_MODEL.read_bytes()
    found = await header_of(web, content)
    whole = read_header(DEMO_MODEL)
    assert (found.header.tensors, found.header.digest) == (whole.tensors, whole.digest)
    assert found.data == content[: whole.data_start]
    asked = [query for query in web.queries if not query.is_first_look]
    assert asked[0].stop == 1000
    assert [one.stop for one in asked[:-1]] == [two.start for two in asked[1:]], "no byte twice"
    assert asked[-1].stop < len(content) / 2


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"<html>not found</html>", NotGguf), (b"GGUF" + b"\x03\0\0\0" + b"\xff" * 16, DamagedGguf)],
)
async def test_what_is_no_model_is_told_before_anything_is_pulled(
    web: Web, content: bytes, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await header_of(web, content)
