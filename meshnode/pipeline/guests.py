"""Models beside the main one, on the orchestrator alone: a draft model, a projector of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from meshnode.config import ServeConfig, human_bytes
from meshnode.errors import ModelError, ResourceError
from meshnode.models.facts import ModelFacts
from meshnode.models.shelf import Shelf
from meshnode.models.store.slice import refuse_part
from meshnode.models.vocabulary import difference, read_vocabulary
from meshnode.pipeline.costs import costs_of, plan_model
from meshnode.pipeline.plan import Plan, PlanNode
from meshnode.pipeline.speculation import (
    DRAFT_MODELS,
    NO_DEVICE,
    PROJECTOR_FILES,
    Circumstances,
    Speculation,
    check_speculation,
    choose_speculation,
    local_options,
    needs_vocabulary,
)

_BY_RULE = frozenset(("auto", "ngram", "off"))
_NO_PROMPT_CACHE = ("--cache-ram", "0")
"""A prompt that another replaces is kept otherwise: its whole KV cache is fetched from the workers,
17 MB for 512 tokens of a small model, before the next may begin."""
_PIECES = ("--ubatch-size", "128")
"""Of a prompt: while the second worker computes one, the first has the next."""
_EMBEDDING_OPTIONS = frozenset(("--embedding", "--embeddings", "--reranking", "--rerank"))


def embeds(engine_options: Sequence[str]) -> bool:
    """Whether llama-server is to answer with vectors and not with text."""
    return bool(_EMBEDDING_OPTIONS & set(engine_options))


class Guests:
    """I know which models lie beside the main one, what they take, and what they are for."""

    def __init__(self, config: ServeConfig, shelf: Shelf, model: ModelFacts) -> None:
        """Blocks for headers. Raises `UsageError`, or `ModelError` for a draft model that is not
        there or guesses in other tokens, before anything is started."""
        check_speculation(config.speculate, config.engine_options)
        self._config = config
        for path in named_files(config.engine_options):
            refuse_part(path)
        self._draft: ModelFacts | None = None
        if config.speculate not in _BY_RULE:
            self._draft = _find_draft(config.speculate, shelf, model)

    @property
    def files(self) -> tuple[Path, ...]:
        """Of the models that llama-server reads beside the main one."""
        draft = () if self._draft is None else self._draft.files
        return (*draft, *named_files(self._config.engine_options))

    def choose_device(self, local: PlanNode, ctx_tokens: int, slots: int) -> str:
        """An accelerator of this machine with room for the guests, else its CPU."""
        needed_bytes = self._needed_bytes(ctx_tokens, slots)
        fitting = (one for one in local.devices if one.is_gpu and one.usable_bytes >= needed_bytes)
        return next((device.name for device in fitting), NO_DEVICE)

    def make_room(self, local: PlanNode, ctx_tokens: int, slots: int) -> PlanNode:
        """This machine without the memory that the guests take. Raises `ResourceError`."""
        chosen = self.choose_device(local, ctx_tokens, slots)
        needed_bytes = self._needed_bytes(ctx_tokens, slots)
        devices = tuple(
            replace(device, usable_bytes=_less(device.usable_bytes, needed_bytes))
            if device.name == chosen or (chosen == NO_DEVICE and not device.is_gpu)
            else device
            for device in local.devices
        )
        return replace(local, devices=devices)

    def speculation(self, model: ModelFacts, plan: Plan, *, device: str, slots: int) -> Speculation:
        """What llama-server guesses ahead with, under this plan."""
        options = self._config.engine_options
        found = Circumstances(
            model=model,
            is_alone=plan.alone,
            slots=slots,
            embeds=embeds(options),
            engine_options=options,
            device=device,
            nextn_at_home=_ends_here(plan),
        )
        return choose_speculation(self._config.speculate, found, self._draft)

    def options(self, plan: Plan, speculation: Speculation, device: str) -> tuple[str, ...]:
        """llama-server's options for all of it, the user's own last."""
        own = self._config.engine_options
        kept = () if plan.alone else (*_NO_PROMPT_CACHE, *local_options(own, device))
        pieces = _PIECES if len(plan.rpc_nodes) > 1 and not embeds(own) else ()
        return (*speculation.options, *kept, *pieces, *own)

    def _needed_bytes(self, ctx_tokens: int, slots: int) -> int:
        projector_bytes = _projector_bytes(self._config.engine_options)
        if self._draft is None:
            return projector_bytes
        model = plan_model(self._draft)
        costs = costs_of(model, ctx_tokens=ctx_tokens, slots=slots, kv_type="f16")
        items_bytes = sum(item.total_bytes for item in costs.items)
        draft_bytes = items_bytes + costs.device_compute_bytes + costs.host_bytes
        return draft_bytes + projector_bytes


def _find_draft(text: str, shelf: Shelf, model: ModelFacts) -> ModelFacts:
    try:
        draft = shelf.find(text)
        if needs_vocabulary(draft):
            told = difference(read_vocabulary(model.path), read_vocabulary(draft.path))
            if told:
                raise ModelError(
                    f"{draft.name} cannot guess for {model.name}, since {told}: take a smaller "
                    "model of the same family"
                )
    except ModelError as error:
        raise ModelError(f"--speculate {text}: {error}") from None
    return draft


def _ends_here(plan: Plan) -> bool:
    """Whether the output is this machine's, and with it the layers that predict further tokens."""
    is_last = bool(plan.shares) and plan.shares[-1].node not in plan.rpc_nodes
    return is_last or bool(plan.output.device)


def _projector_bytes(engine_options: Sequence[str]) -> int:
    """The size of the file, which is most of what it takes; llama-server tells if it is not one."""
    sizes = (path.stat().st_size for path in _files(engine_options, PROJECTOR_FILES))
    return next(sizes, 0)


def named_files(engine_options: Sequence[str]) -> tuple[Path, ...]:
    """The models that stand after `--`, where they are files."""
    return _files(engine_options, DRAFT_MODELS | PROJECTOR_FILES)


def _files(engine_options: Sequence[str], names: frozenset[str]) -> tuple[Path, ...]:
    found = []
    for option, value in pairwise((*engine_options, "")):
        name, separator, joined = option.partition("=")
        path = Path(joined if separator else value)
        if name.replace("_", "-") in names and path.is_file():
            found.append(path)
    return tuple(found)


def _less(usable_bytes: int, needed_bytes: int) -> int:
    if needed_bytes > usable_bytes:
        raise ResourceError(
            "this machine has no room for the models beside the main one: "
            f"{human_bytes(needed_bytes - usable_bytes)} are missing; take a smaller draft model "
            "or projector, or leave it out"
        )
    return usable_bytes - needed_bytes
