"""What guesses ahead, where it lies, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshnode.config import ServeConfig
from meshnode.errors import MeshError, ModelError, ResourceError, UsageError
from meshnode.models.facts import ModelFacts, read_facts
from meshnode.models.shelf import Shelf
from meshnode.models.slice_mark import IsASlice
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from meshnode.pipeline.guests import Guests
from meshnode.pipeline.output import OutputChoice
from meshnode.pipeline.plan import Plan, PlanDevice, PlanNode, Share
from meshnode.pipeline.speculation import NGRAM, Guesser, Speculation
from tests.engine.synthetic import make_model
from tests.meshnode.models.store.slices import make_whole, pull

MIB = 2**20
CPU = PlanDevice("CPU", 1024 * MIB, False)
CARD = PlanDevice("CUDA0", 512 * MIB, True)
LOCAL = PlanNode("local", True, (CPU,))
ALONE = Plan((), True, 0, (), (), ())
SPREAD = Plan((), False, 5, (5,), ("RPC0",), ("tower",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "big.gguf", layers=4, name="big")
    make_model(folder / "small.gguf", layers=1, width=64, ffn=64, name="small")
    make_model(folder / "other.gguf", layers=1, width=64, ffn=64, vocab=1024, name="other")
    (folder / "notes.gguf").write_text("my notes")
    return folder


class House:
    """A node with the folder's models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shelf = Shelf((folder,), folder)
        self.model = read_facts(folder / "big.gguf")

    def guests(self, speculate: str, *engine_options: str) -> Guests:
        config = ServeConfig(speculate=speculate, engine_options=engine_options)
        return Guests(config, self.shelf, self.model)

    def choose(
        self,
        speculate: str,
        *engine_options: str,
        plan: Plan = SPREAD,
        slots: int = 1,
        model: ModelFacts | None = None,
        local: PlanNode = LOCAL,
    ) -> Speculation:
        guests = self.guests(speculate, *engine_options)
        device = guests.choose_device(local, 1024, slots)
        return guests.speculation(model or self.model, plan, device=device, slots=slots)


@pytest.fixture
def house(folder: Path) -> House:
    return House(folder)


def refusal(kind: type[MeshError], work: Any, *arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        work(*arguments)
    return str(caught.value)


# -- by rule ----------------------------------------------------------------------------------


def test_off_is_off_and_n_grams_are_had_for_the_asking(house: House) -> None:
    assert house.choose("off").guesser is Guesser.NOTHING
    assert house.choose("ngram", plan=ALONE).options == NGRAM


def test_auto_searches_for_repetition_where_trips_can_be_saved(house: House) -> None:
    assert house.choose("auto").guesser is Guesser.NGRAM
    assert house.choose("auto", plan=ALONE).guesser is Guesser.NOTHING


def test_auto_leaves_alone_what_would_lose(house: House) -> None:
    recurrent = replace(house.model, is_recurrent=True)
    assert "state fetched from the workers" in house.choose("auto", model=recurrent).why
    assert "4 requests at once" in house.choose("auto", slots=4).why
    assert "embeddings" in house.choose("auto", "--embeddings").why
    for told in ("--spec-type", "-md"):
        assert house.choose("auto", told, "x").why == f"{told} after -- says how"


def test_auto_takes_a_models_own_further_layers_where_they_are_at_home(house: House) -> None:
    further = replace(house.model, arch="qwen35", has_nextn=True, is_recurrent=True)
    assert house.choose("auto", model=further, plan=ALONE).options == ("--spec-type", "draft-mtp")
    assert (
        house.choose("auto", model=further).guesser is Guesser.NOTHING
    )  # on a worker: a trip each
    home = replace(SPREAD, output=OutputChoice("CPU", "it fits"))
    assert house.choose("auto", model=further, plan=home).guesser is Guesser.MTP
    card = replace(SPREAD, shares=(Share("local", "CUDA0", 3, 4, True, 1, 1, 1),))
    assert house.choose("auto", model=further, plan=card).guesser is Guesser.MTP
    unknown = replace(further, arch="nobodys")
    assert house.choose("auto", model=unknown, plan=ALONE).guesser is Guesser.NOTHING


# -- a draft model ----------------------------------------------------------------------------


def test_a_draft_model_computes_on_this_machine_alone(house: House) -> None:
    found = house.choose("small")
    assert found.guesser is Guesser.DRAFT
    assert found.why == "small guesses, on this machine"
    path = str(house.folder / "small.gguf")
    assert found.options[:4] == ("--spec-draft-model", path, "--spec-type", "draft-simple")
    assert found.options[-2:] == ("--spec-draft-device", "none")
    assert house.choose(path) == found


def test_a_draft_model_takes_an_accelerator_that_has_room(house: House) -> None:
    found = house.choose("small", local=PlanNode("local", True, (CARD, CPU)))
    assert found.options[-2:] == ("--spec-draft-device", "CUDA0")
    narrow = replace(CARD, usable_bytes=100_000)
    found = house.choose("small", local=PlanNode("local", True, (narrow, CPU)))
    assert found.options[-2:] == ("--spec-draft-device", "none")


def test_the_memory_of_a_draft_model_is_not_planned_twice(house: House) -> None:
    left = house.guests("small").make_room(LOCAL, 1024, 1).devices[0].usable_bytes
    taken_bytes = CPU.usable_bytes - left
    weights_bytes = read_facts(house.folder / "small.gguf").weight_bytes
    assert weights_bytes < taken_bytes < 64 * MIB
    assert house.guests("off").make_room(LOCAL, 1024, 1) == LOCAL
    poor = replace(LOCAL, devices=(replace(CPU, usable_bytes=MIB),))
    told = refusal(ResourceError, house.guests("small").make_room, poor, 1024, 1)
    assert "no room for the models beside the main one" in told


def test_a_draft_model_that_cannot_be_is_refused_before_anything_starts(house: House) -> None:
    told = refusal(ModelError, house.guests, "other")
    assert told == (
        "--speculate other: other cannot guess for big, since they have 512 and 1024 tokens: take "
        "a smaller model of the same family"
    )
    told = refusal(ModelError, house.guests, str(house.folder / "notes.gguf"))
    assert "notes.gguf is not a GGUF file" in told
    told = refusal(ModelError, house.guests, "/nowhere/small.gguf")
    assert told == (
        "--speculate /nowhere/small.gguf: there is no file /nowhere/small.gguf: check its path"
    )
    assert "did you mean small?" in refusal(ModelError, house.guests, "smal")


# -- beside llama-server's own options --------------------------------------------------------


def test_two_words_on_how_to_guess_are_one_too_many(house: House) -> None:
    told = refusal(UsageError, house.guests, "ngram", "--spec-type", "ngram-mod")
    assert told == (
        "--speculate ngram and --spec-type after -- both say how to guess ahead: drop one"
    )
    assert house.choose("ngram", "--mmproj=eyes.gguf").guesser is Guesser.NGRAM


def test_what_is_named_after_the_dashes_stays_on_this_machine_too(house: House) -> None:
    own = ("--mmproj", "eyes.gguf", "-md", "small.gguf")
    guests = house.guests("off", *own)
    nothing = house.choose("off", *own)
    kept = ("--cache-ram", "0", "--spec-draft-device", "none", "--mmproj-device", "none")
    assert guests.options(SPREAD, nothing, "none") == (*kept, *own)
    assert guests.options(ALONE, nothing, "none") == own
    said = ("--mmproj", "eyes.gguf", "--no-mmproj-offload", "-md", "small.gguf", "-devd", "CUDA1")
    assert house.guests("off", *said).options(SPREAD, nothing, "none")[2:] == said


def test_replaced_prompts_are_not_fetched_from_the_workers_to_be_kept(house: House) -> None:
    nothing = house.choose("off")
    assert house.guests("off").options(SPREAD, nothing, "none") == ("--cache-ram", "0")
    assert house.guests("off").options(ALONE, nothing, "none") == ()
    wanted = ("--cache-ram", "512")
    assert house.guests("off", *wanted).options(SPREAD, nothing, "none")[-2:] == wanted


def test_prompts_go_in_pieces_where_two_workers_can_each_have_one(house: House) -> None:
    nothing = house.choose("off")
    both = replace(SPREAD, rpc_nodes=("tower", "attic"))
    pieces = ("--ubatch-size", "128")
    assert house.guests("off").options(both, nothing, "none")[-2:] == pieces
    own = ("-ub", "512")
    assert house.guests("off", *own).options(both, nothing, "none")[-4:] == (*pieces, *own)
    vectors = house.guests("off", "--embeddings").options(both, nothing, "none")
    assert not set(pieces) & set(vectors)  # a prompt of an encoder is one piece


def test_a_projectors_memory_is_set_aside(house: House) -> None:
    own = ("--mmproj", str(house.folder / "small.gguf"))
    left = house.guests("off", *own).make_room(LOCAL, 1024, 1).devices[0].usable_bytes
    assert CPU.usable_bytes - left == (house.folder / "small.gguf").stat().st_size


# -- slices -----------------------------------------------------------------------------------


def test_models_beside_the_main_one_are_named_wherever_they_stand(house: House) -> None:
    small, other = house.folder / "small.gguf", house.folder / "other.gguf"
    assert house.guests("off").files == ()
    assert house.guests(str(small)).files == (small,)
    options = ("--mmproj", str(other), f"--model_draft={small}", "-mm", "not-there.gguf", "-mm")
    assert house.guests("auto", *options).files == (other, small)


@pytest.mark.parametrize("option", ["-md", "--spec-draft-model", "-mm", "--mmproj"])
def test_a_part_of_a_model_is_never_read_for_the_whole(
    house: House, tmp_path: Path, option: str
) -> None:
    whole = make_whole(tmp_path / "whole")
    part = whole.create(Store(tmp_path / "models"))
    said = refusal(IsASlice, house.guests, "auto", option, str(part.facts.path))
    assert said.startswith("only 0 B of the")
    with SliceWriter(part.folder) as writer:
        pull(writer, whole, whole.all_names)
    assert house.guests("auto", option, str(part.facts.path)).files == (part.facts.path,)
