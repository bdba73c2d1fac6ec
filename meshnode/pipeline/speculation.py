"""What llama-server guesses ahead with, so that one trip over the wire yields several tokens.

Sans-IO. Whatever guesses stays on the orchestrator: an n-gram search needs no model, a draft model
or a projector of images on a remote device would cost a trip for each token it guesses.

Figures behind `NGRAM`: docs/benchmarks.md. A short key finds more, and is wrong more often; a
rejected guess costs the computing of its tokens, an accepted one saves a trip for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from meshnode.errors import UsageError
from meshnode.models.facts import ModelFacts

NGRAM = (
    *("--spec-type", "ngram-map-k"),
    *("--spec-ngram-map-k-size-n", "4", "--spec-ngram-map-k-size-m", "8"),
)
DRAFT_TOKENS = 4
"""A draft model's guesses a step: where 8 in 10 are right, a fifth is reached 4 times in 10."""
MTP_ARCHITECTURES = frozenset(
    (
        *("bailingmoe3", "cohere2moe", "deepseek2", "deepseek32", "deepseek4", "glm-dsa"),
        *("glm4moe", "hy_v3", "mimo2", "nemotron_h_moe", "qwen35", "qwen35moe", "qwen3next"),
        "step35",
    )
)
"""Those the pinned llama.cpp has a graph of the further layers for (src/models, `graph_mtp`)."""
NO_DEVICE = "none"
"""The CPU, in the words of `--device` and its kin."""
_MADE_FOR_ONE = {"eagle3": "draft-eagle3", "dflash": ""}
"""Draft models that are made for one other model; "": llama-server tells their kind apart."""
DRAFT_MODELS = frozenset(("-md", "--model-draft", "--spec-draft-model"))
_CHOOSES = DRAFT_MODELS | {"--spec-type"}
_DRAFT_DEVICES = frozenset(("-devd", "--device-draft", "--spec-draft-device"))
PROJECTOR_FILES = frozenset(("-mm", "--mmproj"))
_PROJECTORS = PROJECTOR_FILES | {"-mmu", "--mmproj-url"}
_PROJECTOR_DEVICES = frozenset(("-mmdev", "--mmproj-device", "--no-mmproj-offload"))


class Guesser(Enum):
    """What makes the guesses."""

    NOTHING = "off"
    NGRAM = "ngram"
    DRAFT = "draft"
    MTP = "mtp"


@dataclass(frozen=True)
class Speculation:
    """What was chosen, why in words for the user, and llama-server's options for it."""

    guesser: Guesser
    why: str
    options: tuple[str, ...] = ()


AS_TOLD = "as --speculate says"
NO_SPECULATION = Speculation(Guesser.NOTHING, AS_TOLD)


@dataclass(frozen=True)
class Circumstances:
    """What the choice rests on. `device`: of this machine, for a draft model. `nextn_at_home`: the
    layers that predict further tokens would lie on this machine."""

    model: ModelFacts
    is_alone: bool
    slots: int
    embeds: bool
    engine_options: tuple[str, ...]
    device: str = NO_DEVICE
    nextn_at_home: bool = False


def check_speculation(text: str, engine_options: Sequence[str]) -> None:
    """What cannot be asked for together. Raises `UsageError`."""
    own = _given(engine_options, _CHOOSES)
    if own and text not in ("auto", "off"):
        raise UsageError(
            f"--speculate {text} and {own} after -- both say how to guess ahead: drop one"
        )


def choose_speculation(text: str, found: Circumstances, draft: ModelFacts | None) -> Speculation:
    """`text`: auto, ngram or off; `draft`: the model that --speculate names instead."""
    if draft is not None:
        return _with_draft(draft, found.device)
    if text == "ngram":
        return Speculation(Guesser.NGRAM, AS_TOLD, NGRAM)
    if text == "off":
        return NO_SPECULATION
    return _best(found)


def _best(found: Circumstances) -> Speculation:
    """The rule of `auto`."""
    own = _given(found.engine_options, _CHOOSES)
    if own:
        return Speculation(Guesser.NOTHING, f"{own} after -- says how")
    if found.embeds:
        return Speculation(Guesser.NOTHING, "embeddings are of texts that are there")
    model = found.model
    may_use_nextn = model.has_nextn and model.arch in MTP_ARCHITECTURES
    if may_use_nextn and (found.is_alone or found.nextn_at_home):
        why = f"{model.name} has layers that predict further tokens"
        return Speculation(Guesser.MTP, why, ("--spec-type", "draft-mtp"))
    if found.is_alone:
        return Speculation(Guesser.NOTHING, "no trip over the wire is there to be saved")
    if model.is_recurrent:
        why = f"a wrong guess would have {model.name}'s state fetched from the workers"
        return Speculation(Guesser.NOTHING, why)
    if found.slots > 1:
        return Speculation(Guesser.NOTHING, f"{found.slots} requests at once fill the trips")
    return Speculation(Guesser.NGRAM, "repeated text needs fewer trips over the wire", NGRAM)


def _with_draft(draft: ModelFacts, device: str) -> Speculation:
    options = ["--spec-draft-model", str(draft.path)]
    if draft.has_nextn:
        options += ["--spec-type", "draft-mtp"]
    elif draft.arch not in _MADE_FOR_ONE:
        options += ["--spec-type", "draft-simple", "--spec-draft-n-max", str(DRAFT_TOKENS)]
    elif _MADE_FOR_ONE[draft.arch]:
        options += ["--spec-type", _MADE_FOR_ONE[draft.arch]]
    options += ["--spec-draft-device", device]
    return Speculation(Guesser.DRAFT, f"{draft.name} guesses, on this machine", tuple(options))


def local_options(engine_options: Sequence[str], device: str) -> tuple[str, ...]:
    """What keeps models named after `--` on this machine: llama-server would give a draft model
    all of the main model's devices, and the projector the first of them."""
    options: tuple[str, ...] = ()
    if _given(engine_options, DRAFT_MODELS) and not _given(engine_options, _DRAFT_DEVICES):
        options += ("--spec-draft-device", device)
    if _given(engine_options, _PROJECTORS) and not _given(engine_options, _PROJECTOR_DEVICES):
        options += ("--mmproj-device", device)
    return options


def needs_vocabulary(draft: ModelFacts) -> bool:
    """Whether a draft model has a vocabulary of its own, which must be the main model's."""
    return not draft.has_nextn and draft.arch not in _MADE_FOR_ONE


def _given(engine_options: Sequence[str], names: frozenset[str]) -> str:
    """The first of these options that is among those after `--`, or nothing."""
    given = (option.partition("=")[0].replace("_", "-") for option in engine_options)
    return next((option for option in given if option in names), "")
