"""Those who ask another to pull, or are asked to, and do not keep to what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.errors import MeshError, NetworkError
from meshnode.messages import MessageStream
from meshnode.pipeline import order_desk, orders
from meshnode.pipeline.commission import Progressed
from meshnode.pipeline.order_desk import ORDERS, PULL_SERVICE
from tests.engine.synthetic import make_model
from tests.meshnode.pipeline.ordering import URL, say, scene
from tunnels import Stream, StreamError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "glm.gguf", layers=3, width=256, ffn=512)


@pytest.mark.parametrize(
    "order",
    [
        {},
        {"source": f"{URL}?token=x"},
        {"source": "https://a:b@example.org/glm.gguf"},
        {"source": "x" * 5000},
        {"source": URL, "layers": 5},
    ],
)
async def test_an_order_that_cannot_be_is_refused_and_nothing_is_asked(
    tmp_path: Path, model: Path, order: dict[str, Any]
) -> None:
    async with scene(tmp_path, model) as stage:
        stream = await say(stage, order)
        with trio.fail_after(30), pytest.raises(StreamError, match="the peer's order to pull"):
            await stream.receive_some(100)
        assert stage.web.asked == []


async def read_all(stream: Stream) -> None:
    while await stream.receive_some(100):
        pass


async def test_an_asker_that_goes_on_talking_loses_its_order(tmp_path: Path, model: Path) -> None:
    async with scene(tmp_path, model) as stage:
        stage.web.hold()
        stream = await say(stage, {"source": URL})
        with trio.fail_after(30):
            await stage.web.reached.wait()
            await stream.send_all(b"x" * 1000)
            with pytest.raises(StreamError, match="says more than its order"):
                await read_all(stream)
            await stage.until_nothing_is_pulled()


async def test_a_member_that_asks_a_thousand_times_is_heard_a_few_times(
    tmp_path: Path, model: Path
) -> None:
    async with scene(tmp_path, model) as stage:
        stage.allow(frozenset())
        refusals: list[str] = []

        async def ask() -> None:
            try:
                await stage.order(URL)
            except MeshError as error:
                refusals.append(str(error))

        with trio.fail_after(120):
            for _ in range(50):
                async with trio.open_nursery() as nursery:
                    for _ in range(20):
                        nursery.start_soon(ask)
        heard = sum("pulls nothing" in one for one in refusals)
        assert len(refusals) == 1000
        assert 1 <= heard <= ORDERS.peer_rate.burst + 20
        assert any("asked too often" in one or "too many streams" in one for one in refusals)


async def test_a_member_that_answers_nonsense_or_nothing_is_left(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "SILENCE_S", 0.3)

    async def nonsense(stream: Stream) -> None:
        await MessageStream(stream).send({"event": "held", "name": 5})

    async def silence(stream: Stream) -> None:
        await trio.sleep_forever()

    async def end(stream: Stream) -> None:
        await stream.send_eof()

    async with scene(tmp_path, model) as stage:
        for answer, words in (
            (nonsense, "makes no sense"),
            (silence, "has said nothing for"),
            (end, "broke off"),
        ):
            stage.ben.endpoint.serve(PULL_SERVICE, answer)
            with trio.fail_after(30), pytest.raises(NetworkError, match=words):
                await stage.order(URL)


async def test_a_member_of_an_older_mesh_is_told_of(tmp_path: Path, model: Path) -> None:
    async with scene(tmp_path, model) as stage:
        del stage.ben.endpoint._services._handlers[PULL_SERVICE]
        with pytest.raises(NetworkError, match=r"ben takes no orders to pull: .*update it"):
            await stage.order(URL)


async def test_a_pull_that_waits_for_another_says_that_it_is_there(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_desk, "TELL_EVERY_S", 0.01)
    monkeypatch.setattr(order_desk, "ALIVE_EVERY_S", 0.05)
    async with scene(tmp_path, model) as stage:
        stage.web.hold()
        stream = await say(stage, {"source": URL})
        messages = MessageStream(stream)
        with trio.fail_after(30):
            for _ in range(3):
                news = await messages.receive_untrusted()
                assert news["event"] == "progress"
        assert Progressed(0, 0).to_message().keys() == news.keys()
