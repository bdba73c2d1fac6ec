"""One node has another pull: as far as that one's operator allows, and as long as it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from meshnode.config import PullSource
from meshnode.errors import AccessError, NetworkError, NoSuchModel, UsageError
from meshnode.models.spans import size_of
from meshnode.models.store import disk
from meshnode.pipeline import order_desk
from meshnode.pipeline.commission import Held
from meshnode.pipeline.order_desk import PULL_SERVICE
from meshnode.pipeline.orders import OrderRefused
from meshnode.pipeline.quota import Quota
from meshnode.pipeline.user_pulls import UserPulls
from tests.engine.synthetic import make_model
from tests.meshnode.pipeline.ordering import ALL, URL, Scene, say, scene
from tunnels import Stream


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "glm.gguf", layers=3, width=256, ffn=512)


async def test_a_member_pulls_from_the_web_what_it_is_asked_to(tmp_path: Path, model: Path) -> None:
    async with scene(tmp_path, model) as stage:
        first = await stage.order(URL, "0:1")
        assert 0 < first.held_bytes < first.weight_bytes
        assert (first.name, first.complete, first.proof) == ("glm", False, "word")
        held = await stage.order(URL)
        assert held.complete
        assert held.pulled_bytes == held.weight_bytes - first.held_bytes
        (part,) = stage.ben.store.slices()
        assert part.facts.path.read_bytes() == model.read_bytes()
        assert stage.ann.store.folders() == []
        said = [event.text for event in stage.events]
        assert said[:2] == [f"pulls {URL} for ann", "pulled glm for ann"]


async def test_a_member_pulls_from_members_what_the_asker_names(
    tmp_path: Path, model: Path
) -> None:
    """Ann knows the model by her own disk; ben takes it from her."""
    async with scene(tmp_path, model) as stage:
        stage.ann.has_whole(model, digested=True)
        held = await stage.order("mesh:glm")
        assert (held.complete, held.proof) == (True, "digests")
        with pytest.raises(NoSuchModel, match=r"there are glm \(on ben, ann\)"):
            await stage.order("mesh:glm-5")


async def test_a_member_pulls_only_what_its_operator_allows(tmp_path: Path, model: Path) -> None:
    async with scene(tmp_path, model) as stage:
        stage.ann.has_whole(model, digested=True)
        refused = {
            URL: (PullSource.URL, "from web servers"),
            "hf:org/repo/m.gguf": (PullSource.HUB, "from hubs"),
            "ollama:glm4": (PullSource.HUB, "from hubs"),
            "mesh:glm": (PullSource.PEERS, "from other members"),
        }
        for source, (kind, words) in refused.items():
            stage.allow(ALL - {kind})
            with pytest.raises(OrderRefused, match=f"ben pulls nothing {words}") as error:
                await stage.order(source)
            assert f"--allow-pull {kind.value}" in str(error.value)
            assert error.value.exit_code == AccessError.exit_code
        assert stage.web.asked == []
        assert stage.ben.store.folders() == []


async def test_a_secret_never_leaves_and_costs_the_member_nothing(
    tmp_path: Path, model: Path
) -> None:
    async with scene(tmp_path, model) as stage:
        stage.ben.endpoint.serve(PULL_SERVICE, never)
        for address in (f"{URL}?token=geheim", "https://ann:geheim@example.org/glm.gguf"):
            with pytest.raises(UsageError, match="does not leave this machine") as error:
                await stage.order(address)
            assert "geheim" not in str(error.value)


async def never(stream: Stream) -> None:
    raise AssertionError("it was asked")


async def test_layers_that_are_none_are_told_with_the_code_of_the_command(
    tmp_path: Path, model: Path
) -> None:
    async with scene(tmp_path, model) as stage:
        with pytest.raises(
            OrderRefused, match=r"ben: --layers 7: synthetic has the layers 0"
        ) as error:
            await stage.order(URL, "7")
        assert error.value.exit_code == UsageError.exit_code


async def test_how_far_it_is_comes_back(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_desk, "TELL_EVERY_S", 0.01)
    told: list[tuple[int, int]] = []
    async with scene(tmp_path, model) as stage:
        stage.web.hold()

        def tell(*progress: int) -> None:
            told.append((progress[0], progress[1]))
            stage.web.free.set()

        with trio.fail_after(30):
            held = await stage.order(URL, None, tell)
        assert {total for _, total in told} == {held.weight_bytes}


async def test_a_member_stops_when_its_asker_leaves_and_keeps_what_came(
    tmp_path: Path, model: Path
) -> None:
    async with scene(tmp_path, model) as stage:
        first = await stage.order(URL, "0")
        await leave_midway(stage)
        (part,) = stage.ben.store.slices()
        assert part.held_bytes == first.held_bytes
        held = await stage.order(URL)
        assert held.complete, "nobody holds the slice any more"


async def leave_midway(stage: Scene) -> None:
    stage.web.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.order, URL)
        with trio.fail_after(30):
            await stage.web.reached.wait()
        assert stage.quota._promised
        nursery.cancel_scope.cancel()
    with trio.fail_after(30):
        await stage.until_nothing_is_pulled()
    stage.web.free.set()


async def test_of_an_order_in_vain_nothing_stays(tmp_path: Path, model: Path) -> None:
    """A thousand of them would be a thousand headers."""
    async with scene(tmp_path, model) as stage:
        await leave_midway(stage)
        assert stage.ben.store.folders() == []
        with pytest.raises(OrderRefused, match="has the layers"):
            await stage.order(URL, "7")
        assert stage.ben.store.folders() == []


async def test_an_asker_that_says_no_more_has_left(tmp_path: Path, model: Path) -> None:
    async with scene(tmp_path, model) as stage:
        stage.web.hold()
        stream = await say(stage, {"source": URL})
        with trio.fail_after(30):
            await stage.web.reached.wait()
            await stream.send_eof()
            await stage.until_nothing_is_pulled()


async def test_an_asker_that_is_lost_is_as_one_that_left(tmp_path: Path, model: Path) -> None:
    async with scene(tmp_path, model) as stage:
        stage.web.hold()

        async def ask() -> None:
            with pytest.raises(NetworkError, match=r"the order to ben broke off"):
                await stage.order(URL)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            with trio.fail_after(30):
                await stage.web.reached.wait()
                await stage.session.aclose("killed")
        with trio.fail_after(30):
            await stage.until_nothing_is_pulled()


async def test_two_orders_at_once_for_one_model_are_both_carried_out(
    tmp_path: Path, model: Path
) -> None:
    async with scene(tmp_path, model) as stage:
        held: list[Held] = []

        async def ask(layers: str | None) -> None:
            held.append(await stage.order(URL, layers))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, "0:2")
                nursery.start_soon(ask, None)
        assert any(one.complete for one in held)
        (part,) = stage.ben.store.slices()
        assert part.complete
        weights = [span for span in stage.web.asked if span.start]
        assert size_of(weights) < 1.1 * model.stat().st_size, "no tensor came twice"


async def test_a_disk_without_enough_room_is_a_sentence_of_the_member(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, model) as stage:
        monkeypatch.setattr(Quota, "_space", lambda _self: (3 * 2**30, 20 * 2**30))
        assert (await stage.order(URL, "0")).held_bytes
        monkeypatch.setattr(Quota, "_space", lambda _self: (2**30, 20 * 2**30))
        with pytest.raises(OrderRefused, match=r"ben: .* others order leaves 2.0 GiB free") as no:
            await stage.order(URL)
        assert no.value.exit_code == 7


async def test_a_members_sentence_names_none_of_its_folders(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, model) as stage:
        assert (await stage.order(URL, "0")).held_bytes
        monkeypatch.setattr(disk, "_space", lambda _folder: (1000, 2**40))
        with pytest.raises(OrderRefused, match=r"ben: pulling .* needs .* gc --keep SIZE") as no:
            await stage.order(URL)
        assert "/" not in str(no.value).replace("…/", "")


# -- as commands and the API have it ------------------------------------------------------------


async def test_one_function_pulls_here_or_there(tmp_path: Path, model: Path) -> None:
    async with scene(tmp_path, model) as stage:

        def tell(_done: int, _total: int) -> None:
            pass

        pulls, me = stage.user_pulls, str(stage.ann.endpoint.peer)
        for node in (None, "ann", me, me.upper()):
            row = await pulls.pull(URL, "0", tell, node=node)
            assert (row["node"], row["name"]) == ("ann", "glm")
        row = await pulls.pull(URL, None, tell, node="ben")
        assert (row["node"], row["complete"]) == ("ben", True)
        assert "path" not in row, "what lies where on other machines is theirs to know"
        with pytest.raises(UsageError, match="there is no peer 'nobody'"):
            await pulls.pull(URL, None, tell, node="nobody")
        with pytest.raises(NetworkError, match="cy is not connected"):
            await pulls.pull(URL, None, tell, node="cy")
        for request in (
            {},
            {"source": 5},
            {"source": URL, "layers": 1},
            {"source": URL, "node": 1},
        ):
            with pytest.raises(UsageError, match="the request for a pull"):
                await pulls.answer(request, tell)


async def test_two_nodes_of_this_nodes_name_are_told_apart(tmp_path: Path, model: Path) -> None:
    async with scene(tmp_path, model) as stage:
        stage.ben.name = "ann"
        twin = UserPulls("ben", str(stage.ann.endpoint.peer), stage.puller(stage.ann), stage.orders)
        stage.ben.name = "ben"
        with pytest.raises(UsageError, match="this node and another are called 'ben'"):
            await twin.pull(URL, None, lambda _d, _t: None, node="ben")
