"""`mesh:NAME`: a model from the members that have it, and nothing from anywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from meshnode.errors import AmbiguousModel, ModelError, NetworkError, NoSuchModel, UsageError
from meshnode.messages import MessageStream
from meshnode.models.facts import read_facts
from meshnode.models.fetching import Fetcher
from meshnode.models.manifest import digest_model
from meshnode.models.peers import offers, service
from meshnode.models.peers.listing import Listed, to_message
from meshnode.models.peers.offers import Offer
from meshnode.models.peers.protocol import ReadRequest
from meshnode.models.peers.service import STORE_SERVICE, StoreService
from meshnode.pipeline.pulling import Proof, Pulled, Wish
from tests.engine.synthetic import make_model, make_model_of_size
from tests.lab.holders import Circle, Machine, circle
from tests.lab.sources import FileSource
from tunnels import Stream

FIRST = ("blk.0.attn_q.weight", "blk.0.ffn_up.weight")
SECOND = ("blk.1.attn_q.weight", "blk.1.ffn_up.weight")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "glm.gguf", layers=3, width=256, ffn=512)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same name."""
    folder = tmp_path_factory.mktemp("o")
    return make_model(folder / "glm.gguf", layers=3, width=256, ffn=512, seed=7)


async def pull(scene: Circle, source: str, layers: str | None = None) -> Pulled:
    return await scene.puller.pull(Wish(source, layers), lambda _done, _total: None)


async def test_a_whole_file_of_a_member_is_pulled_and_proven(tmp_path: Path, model: Path) -> None:
    async with circle(tmp_path, "ben") as scene:
        scene.members[0].has_whole(model, digested=True)
        pulled = await pull(scene, "mesh:GLM")
        root = digest_model(read_facts(model)).root
        assert (pulled.complete, pulled.proof, pulled.root) == (True, Proof.DIGESTS, root)
        assert Path(pulled.path).read_bytes() == model.read_bytes()
        again = await pull(scene, f"mesh:{root}")
        assert (again.pulled_bytes, again.complete) == (0, True)


async def test_some_layers_come_alone_and_others_later(tmp_path: Path, model: Path) -> None:
    async with circle(tmp_path, "ben") as scene:
        scene.members[0].has_whole(model, digested=True)
        first = await pull(scene, "mesh:glm", "0:1")
        assert 0 < first.held_bytes < first.weight_bytes
        more = await pull(scene, "mesh:glm", "2:output")
        assert more.held_bytes == first.held_bytes + more.pulled_bytes
        with pytest.raises(UsageError, match="layers 0 to 2"):
            await pull(scene, "mesh:glm", "3")


async def test_files_that_nobody_has_digested_are_taken_at_their_word(
    tmp_path: Path, model: Path
) -> None:
    async with circle(tmp_path, "ben") as scene:
        scene.members[0].has_whole(model)
        pulled = await pull(scene, "mesh:glm")
        assert (pulled.complete, pulled.proof) == (True, Proof.WORD)
        assert Path(pulled.path).read_bytes() == model.read_bytes()


async def test_what_was_pulled_is_given_on_at_once(tmp_path: Path, model: Path) -> None:
    async with circle(tmp_path, "ben") as scene:
        scene.members[0].has_whole(model)
        assert scene.asker.offers.listed() == []  # which holds for a while
        await pull(scene, "mesh:glm", "0")
        (listed,) = scene.asker.offers.listed()
        await pull(scene, "mesh:glm", "1")
        (again,) = scene.asker.offers.listed()
        assert 0 < listed.held_bytes < again.held_bytes


async def test_parts_of_several_members_are_put_together(tmp_path: Path, model: Path) -> None:
    async with circle(tmp_path, "ben", "cy", "dan") as scene:
        ben, cy, dan = scene.members
        names = [tensor.name for tensor in read_facts(model).tensors]
        await ben.holds(model, *FIRST)
        await cy.holds(model, *(name for name in names if name not in (*FIRST, *SECOND)))
        with pytest.raises(NetworkError, match=r"are missing; what came is kept"):
            await pull(scene, "mesh:glm")
        await dan.holds(model, *SECOND)
        pulled = await pull(scene, "mesh:glm")
        assert pulled.complete
        assert Path(pulled.path).read_bytes() == model.read_bytes()


async def test_whole_files_of_other_dates_give_together(tmp_path: Path) -> None:
    model = make_model_of_size(tmp_path / "large.gguf", size_bytes=80 * 10**6)
    async with circle(tmp_path, "ben", "cy") as scene:
        for member in scene.members:
            member.has_whole(model, digested=True)
        asked = [count_reads(member) for member in scene.members]
        pulled = await pull(scene, "mesh:large")
        assert pulled.proof is Proof.DIGESTS
        assert Path(pulled.path).read_bytes() == model.read_bytes()
        assert all(asked), "each of them gave something"


async def test_caches_of_ollama_give_together_though_nobody_has_digested_them(
    tmp_path: Path,
) -> None:
    model = make_model_of_size(tmp_path / "large.gguf", size_bytes=80 * 10**6)
    async with circle(tmp_path, "ben", "cy") as scene:
        for member in scene.members:
            member.has_in_ollama(model, "glm")
        asked = [count_reads(member) for member in scene.members]
        pulled = await pull(scene, "mesh:glm")
        assert (pulled.proof, pulled.complete) == (Proof.SHA256, True)
        assert Path(pulled.path).read_bytes() == model.read_bytes()
        assert all(asked), "each of them gave something"


async def test_a_cache_has_the_same_model_as_what_was_begun_from_its_source(
    tmp_path: Path, model: Path
) -> None:
    async with circle(tmp_path, "ben") as scene:
        blob = scene.members[0].has_in_ollama(model, "glm")
        source = FileSource(model, version=blob.name.replace("-", ":"))
        fetcher = Fetcher(scene.asker.store, source.open)
        begun = await fetcher.obtain("ollama:glm:latest")
        pulled = await pull(scene, "mesh:glm:latest")
        assert pulled.complete
        (part,) = scene.asker.store.slices()
        assert part.folder == begun.folder
        assert source.asked_bytes < 2**21, "its header alone"


async def test_a_blob_that_is_not_what_its_name_says_is_found_out(
    tmp_path: Path, model: Path
) -> None:
    async with circle(tmp_path, "ben") as scene:
        blob = scene.members[0].has_in_ollama(model, "glm")
        data = bytearray(model.read_bytes())
        data[-100] ^= 1
        blob.write_bytes(data)
        scene.members[0].look_again()
        with pytest.raises(ModelError, match="not what its source says"):
            await pull(scene, "mesh:glm")


def count_reads(member: Machine) -> list[ReadRequest]:
    """What is read at a member from now on, its header left out."""
    asked: list[ReadRequest] = []

    class Counting(StoreService):
        async def _give(
            self, stream: Stream, messages: MessageStream, request: ReadRequest
        ) -> None:
            asked.append(request)
            await super()._give(stream, messages, request)

    member.endpoint.serve(STORE_SERVICE, Counting(member.offers).serve)
    return asked


async def test_a_name_of_two_models_is_asked_back(tmp_path: Path, model: Path, other: Path) -> None:
    async with circle(tmp_path, "ben", "cy") as scene:
        ben, cy = scene.members
        ben.has_whole(model, digested=True)
        cy.has_whole(other, digested=True)
        with pytest.raises(AmbiguousModel, match="name the one you mean by its identity"):
            await pull(scene, "mesh:glm")
        root = digest_model(read_facts(other)).root
        pulled = await pull(scene, f"mesh:{root}")
        assert Path(pulled.path).read_bytes() == other.read_bytes()


async def test_a_name_that_is_none_is_answered_by_what_there_is(
    tmp_path: Path, model: Path
) -> None:
    async with circle(tmp_path, "ben") as scene:
        scene.members[0].has_whole(model)
        with pytest.raises(NoSuchModel, match=r"called 'glm-5': there are glm \(on ben\)"):
            await pull(scene, "mesh:glm-5")
    async with circle(tmp_path / "alone") as scene:
        with pytest.raises(NetworkError, match="no member is connected"):
            await pull(scene, "mesh:glm")


async def test_what_is_here_whole_is_not_fetched(tmp_path: Path, model: Path) -> None:
    async with circle(tmp_path, "ben") as scene:
        scene.members[0].has_whole(model, digested=True)
        mine = scene.asker.has_whole(model, digested=True)
        asked = count_reads(scene.members[0])
        pulled = await pull(scene, "mesh:glm")
        assert (pulled.pulled_bytes, pulled.path, asked) == (0, str(mine), [])


async def test_what_no_member_has_and_this_node_does_is_here_already(
    tmp_path: Path, model: Path
) -> None:
    for members in ((), ("ben",)):
        async with circle(tmp_path / str(len(members)), *members) as scene:
            mine = scene.asker.has_whole(model)
            assert (await pull(scene, "mesh:glm")).path == str(mine)


async def test_a_file_that_is_replaced_meanwhile_is_not_mixed_with_the_one_before(
    tmp_path: Path, model: Path, other: Path
) -> None:
    async with circle(tmp_path, "ben") as scene:
        (ben,) = scene.members
        path = ben.has_whole(model)
        first = await pull(scene, "mesh:glm", "0:1")
        path.write_bytes(other.read_bytes())  # of the same length, and the listing is not anew
        with pytest.raises(NetworkError, match="do not give all"):
            await pull(scene, f"mesh:{first.id}")
        ben.look_again()
        pulled = await pull(scene, "mesh:glm")
        assert pulled.id != first.id
        assert Path(pulled.path).read_bytes() == other.read_bytes()
        (begun,) = [one for one in scene.asker.store.slices() if one.identity.is_named(first.id)]
        assert begun.held_bytes == first.held_bytes


async def test_a_file_that_is_written_to_while_it_is_given_does_not_count(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with circle(tmp_path, "ben") as scene:
        (ben,) = scene.members
        path, calls = ben.has_whole(model), iter(range(1000))
        check = service._OpenFile.check_unchanged

        def overtaken(opened: service._OpenFile) -> None:
            if next(calls):  # the header went before
                path.touch()
            check(opened)

        monkeypatch.setattr(service._OpenFile, "check_unchanged", overtaken)
        with pytest.raises(NetworkError, match="do not give all"):
            await pull(scene, "mesh:glm")
        (part,) = scene.asker.store.slices()
        assert part.held_bytes == 0


# -- members that lie ---------------------------------------------------------------------------


class Rotten(StoreService):
    """Gives other bytes than it has, of all but the header."""

    async def _give(self, stream: Stream, messages: MessageStream, request: ReadRequest) -> None:
        if request.start < 4096:
            await super()._give(stream, messages, request)
            return
        await messages.send({"bytes": request.stop - request.start})
        await stream.send_all(b"x" * (request.stop - request.start))


async def test_bytes_of_a_liar_are_thrown_away_and_others_asked(
    tmp_path: Path, model: Path
) -> None:
    async with circle(tmp_path, "ben", "mallory") as scene:
        for member in scene.members:
            member.has_whole(model, digested=True)
        liar = scene.members[1]
        liar.endpoint.serve(STORE_SERVICE, Rotten(liar.offers).serve)
        with trio.fail_after(60):
            pulled = await pull(scene, "mesh:glm")
        assert Path(pulled.path).read_bytes() == model.read_bytes()


async def test_a_liar_alone_gives_nothing_that_is_used(tmp_path: Path, model: Path) -> None:
    async with circle(tmp_path, "mallory") as scene:
        (liar,) = scene.members
        liar.has_whole(model, digested=True)
        liar.endpoint.serve(STORE_SERVICE, Rotten(liar.offers).serve)
        with trio.fail_after(120), pytest.raises(NetworkError, match="do not give all"):
            await pull(scene, "mesh:glm")
        (part,) = scene.asker.store.slices()
        assert part.held_bytes < part.facts.weight_bytes // 10


async def test_digests_that_are_made_up_prove_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = digest_model(read_facts(model)).root
    monkeypatch.setattr(Offer, "all_digests", lambda offer: bytes(32 * len(offer.facts.tensors)))
    async with circle(tmp_path, "mallory") as scene:
        scene.members[0].has_whole(model, digested=True)
        with pytest.raises(NetworkError, match="does not make up that identity"):
            await pull(scene, f"mesh:{root}")
        assert (await pull(scene, "mesh:glm")).proof is Proof.WORD


async def test_nothing_is_thrown_away_at_a_members_word(tmp_path: Path, model: Path) -> None:
    """What lies here and what a member proves differ: the user has to say who is wrong."""
    async with circle(tmp_path, "ben") as scene:
        (ben,) = scene.members
        path = ben.has_whole(model)
        ben.endpoint.serve(STORE_SERVICE, Rotten(ben.offers).serve)
        first = await pull(scene, "mesh:glm", "0:1")
        assert first.proof is Proof.WORD
        StoreService(ben.offers).offer(ben.endpoint)
        ben.cache.manifest(read_facts(path))
        ben.look_again()
        with pytest.raises(ModelError, match=r"one of the two is wrong; remove yours"):
            await pull(scene, "mesh:glm")
        (part,) = scene.asker.store.slices()
        assert part.held_bytes == first.held_bytes
        scene.asker.store.remove(part.folder)
        assert (await pull(scene, "mesh:glm")).proof is Proof.DIGESTS


async def test_a_whole_model_here_and_another_one_there_of_the_same_files(
    tmp_path: Path, model: Path
) -> None:
    async with circle(tmp_path, "ben") as scene:
        (ben,) = scene.members
        path = ben.has_whole(model)
        ben.endpoint.serve(STORE_SERVICE, Rotten(ben.offers).serve)
        assert (await pull(scene, "mesh:glm")).complete
        ben.cache.manifest(read_facts(path))
        ben.look_again()
        with pytest.raises(ModelError, match="one of the two is wrong"):
            await pull(scene, "mesh:glm")


async def test_what_came_from_the_web_is_no_members_to_describe(
    tmp_path: Path, model: Path, other: Path
) -> None:
    """A member claims that the very files that were begun from the web are of another root."""
    async with circle(tmp_path, "mallory") as scene:
        (mallory,) = scene.members
        begun = await scene.asker.holds(model, *FIRST)
        evil = digest_model(read_facts(other))
        await mallory.holds(model, *FIRST, *SECOND)
        mallory.has_whole(other, digested=True)  # so that it can prove the root, of other files
        claim = Listed("glm", (), begun.identity.provisional, evil.root, 10**6, 10**6)
        mallory.offers.listed = lambda: [claim]  # type: ignore[method-assign]
        with pytest.raises(NetworkError, match="nobody answers at https"):
            await pull(scene, "mesh:glm")
        (part,) = scene.asker.store.slices()
        assert part.identity.root is None
        assert part.document.held == {*FIRST, *SECOND}


async def test_a_member_that_lists_what_it_does_not_have_is_told_of(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with circle(tmp_path, "mallory") as scene:
        made_up = Listed("glm", (), "1a" * 32, None, 10**18, 10**18)
        monkeypatch.setattr(offers.Offers, "listed", lambda _self: [made_up])
        with pytest.raises(NetworkError, match=r"mallory say that they have glm, and give nothing"):
            await pull(scene, "mesh:glm")
        assert scene.asker.store.folders() == []


async def test_members_of_an_older_mesh_are_named_when_nothing_is_found(tmp_path: Path) -> None:
    async def break_off(stream: Stream) -> None:
        stream.reset("the peer asks the store for an operation this version does not know")

    async with circle(tmp_path, "old") as scene:
        scene.members[0].endpoint.serve(STORE_SERVICE, break_off)
        with pytest.raises(NoSuchModel, match=r"\(old did not say what they have\)"):
            await pull(scene, "mesh:glm")


async def test_a_long_list_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [
        Listed("x" * 255, ("y" * 255,) * 4, f"{n:064x}", f"{n:064x}", n, n) for n in range(2000)
    ]
    monkeypatch.setattr(offers.Offers, "listed", lambda _self: many)
    async with circle(tmp_path, "ben") as scene:
        with pytest.raises(AmbiguousModel, match="different models"):
            await pull(scene, f"mesh:{'x' * 255}")
    assert len(to_message(many)["models"]) == 1024
