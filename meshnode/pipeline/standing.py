"""How a deployment stands, for those who ask: the gateway, `mesh status`, the live view.

I hold no resources and start nothing: the orchestrator tells me what happened, I remember it, say
it once, and answer at any moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import trio

from meshnode.config import WireType
from meshnode.events import Emit, Event, Kind
from meshnode.gateway.view import Health, Loss, Stage, Upstream, WorkerProgress
from meshnode.pipeline.deployment import Deployed, Placement
from meshnode.pipeline.plan import Share
from meshnode.pipeline.speculation import NO_SPECULATION, Speculation
from meshnode.pipeline.wording import guessing_text, work_text


class Standing:
    """I am the gateway's `NodeView`."""

    def __init__(self, model: str, emit: Emit) -> None:
        self.url = ""  # the gateway's, once it is bound
        self.node_status: Callable[[], Mapping[str, Any]] = dict  # the whole node's
        self.was_ready = False
        self._model = model
        self._emit = emit
        self._told: dict[Kind, str] = {}
        self._setback = ""
        self._health = Health(Stage.STARTING, "starting", None)
        self._upstream: Upstream | None = None
        self._loss = Loss()
        self._generation = 0
        self._placement: Placement | None = None
        self._deployed: Deployed | None = None
        self._tokens = 0
        self._tokens_per_s: float | None = None
        self._in_flight = 0
        self._held: list[str] = []  # why new requests are not passed on
        self._stirred = trio.Event()  # a request came or went

    # -- answers ------------------------------------------------------------------------------

    def health(self) -> Health:
        if self._held and self._upstream:
            return Health(Stage.WAITING_FOR_WORKERS, self._held[0], None)
        return self._health

    def upstream(self) -> Upstream | None:
        return None if self._held else self._upstream

    @property
    def times_ready(self) -> int:
        """How often a deployment has answered."""
        return self._generation

    @property
    def is_answering(self) -> bool:
        """Whether requests may be in flight, those included that wait for a silent worker."""
        return self._upstream is not None

    @property
    def is_withdrawn(self) -> bool:
        """Whether what was planned last is over."""
        return self._placement is None

    def loss(self) -> Loss:
        return self._loss

    def begin_request(self) -> None:
        self._in_flight += 1
        self._stir()

    def end_request(self) -> None:
        self._in_flight -= 1
        self._stir()

    def _stir(self) -> None:
        self._stirred.set()
        self._stirred = trio.Event()

    async def wait_until_quiet(self, quiet_s: float) -> None:
        """Returns when nobody would miss the deployment: it does not answer yet, or no request has
        been in flight for `quiet_s`."""
        while self._upstream is not None:
            stirred = self._stirred
            with trio.move_on_after(math.inf if self._in_flight else quiet_s) as patience:
                await stirred.wait()
            if patience.cancelled_caught:
                return

    def status(self) -> dict[str, object]:
        return dict(self.node_status())

    def record_generation(self, tokens: int, seconds: float) -> None:
        self._tokens += tokens
        if seconds > 0:
            self._tokens_per_s = tokens / seconds

    def deployment_status(self) -> dict[str, Any]:
        """The deployment's part of the node's status; JSON-ready."""
        health = self._health
        shares = self._placement.plan.shares if self._placement else ()
        loads = self._deployed.loads if self._deployed else {}
        return {
            "model": self._model,
            "health": {
                "stage": health.stage.value,
                "message": health.message,
                "progress": health.progress,
                "workers": [asdict(worker) for worker in health.workers],
            },
            "layers": [_share_status(share) for share in shares],
            "wire_dtype": self._placement and self._placement.wire_type.value,
            "speculation": self._placement and _speculation_status(self._placement.speculation),
            "load": [
                {
                    "node": name,
                    "local_tensors": load.local_tensors,
                    "local_bytes": load.local_bytes,
                    "sent_tensors": load.sent_tensors,
                    "sent_bytes": load.sent_bytes,
                }
                for name, load in loads.items()
            ],
            "tokens": self._tokens,
            "tokens_per_s": self._tokens_per_s,
        }

    # -- what happened ------------------------------------------------------------------------

    def enter(self, stage: Stage, text: str, done: float | None = None) -> None:
        """A stage begins."""
        self.progress(stage, text, done)
        self._tell(Kind.STAGE, text, stage)

    def progress(
        self,
        stage: Stage,
        text: str,
        done: float | None,
        workers: tuple[WorkerProgress, ...] = (),
    ) -> None:
        """A stage goes on; `done` from 0 to 1. What ended the last deployment stays to be read
        until the next one answers."""
        message = f"{text} ({self._setback})" if self._setback else text
        self._health = Health(stage, message, done, workers=workers)

    def planned(self, placement: Placement) -> None:
        self._placement = placement
        for share in placement.plan.shares:
            work = work_text(share.first_layer, share.last_layer, share.has_output)
            text = f"plan: {share.node} ({share.device}) computes {work}"
            self._emit(Event(Kind.PLAN, text, _share_status(share)))
        if placement.wire_type is not WireType.EXACT and not placement.plan.alone:
            text = f"plan: activations cross the wire as {placement.wire_type.value}, not exactly"
            self._emit(Event(Kind.PLAN, text, {"wire_dtype": placement.wire_type.value}))
        for reason in placement.plan.why:
            self._emit(Event(Kind.PLAN, f"plan: {reason}", {"why": reason}))
        for node, reason in placement.plan.left_out:
            text = f"plan: {node} is left out: {reason}"
            self._emit(Event(Kind.PLAN, text, {"left_out": node, "why": reason}))
        output = placement.plan.output
        if output.why:
            self._emit(Event(Kind.PLAN, f"plan: {output.why}", {"output": output.device}))
        speculation = placement.speculation
        if speculation != NO_SPECULATION:
            work = guessing_text(speculation.guesser.value)
            text = f"plan: {work}: {speculation.why}"
            self._emit(Event(Kind.PLAN, text, _speculation_status(speculation)))

    def ready(self, deployed: Deployed, *, embeddings: bool) -> None:
        """Requests may be passed on."""
        self._deployed = deployed
        self.was_ready = True
        self._told.clear()
        self._setback = ""
        self._generation += 1
        self._loss = Loss()
        socket = deployed.server.socket_path
        self._upstream = Upstream(socket, self._model, embeddings, self._generation)
        self._health = Health(Stage.READY, f"{self._model} answers", 1.0)
        text = f"ready: {self._model} answers at {self.url}/v1"
        self._emit(Event(Kind.READY, text, {"url": self.url, "model": self._model}))

    def withdraw(self, what: str, next_step: str) -> None:
        """The deployment is over: say so first, then let requests in flight fail with it."""
        text = f"{what}; {next_step}"
        # An engine's error ends in its last lines: those are for the node's own user.
        self._setback = what.splitlines()[0]
        sentence = f"{self._setback}; {next_step}"
        self._health = Health(Stage.WAITING_FOR_WORKERS, sentence, None)
        self._upstream = self._deployed = self._placement = None
        self._loss.tell(self._health)
        self._tell(Kind.WARNING, text, Stage.WAITING_FOR_WORKERS)

    @contextmanager
    def held_up(self, text: str) -> Iterator[None]:
        """While the block lasts: requests under way wait, new ones are told to come again."""
        self._held.append(text)
        self.warn(text)
        try:
            yield
        finally:
            self._held.remove(text)

    def warn(self, text: str, **data: object) -> None:
        self._emit(Event(Kind.WARNING, text, data))

    def _tell(self, kind: Kind, text: str, stage: Stage) -> None:
        """Emits what was not the last word of its kind: waiting is told once, not at each try."""
        if self._told.get(kind) != text:
            self._told[kind] = text
            self._emit(Event(kind, text, {"stage": stage.value}))


def _speculation_status(speculation: Speculation) -> dict[str, Any]:
    return {"guesser": speculation.guesser.value, "why": speculation.why}


def _share_status(share: Share) -> dict[str, Any]:
    return {
        "node": share.node,
        "device": share.device,
        "first": share.first_layer,
        "last": share.last_layer,
        "output": share.has_output,
        "weight_bytes": share.weight_bytes,
        "memory_bytes": share.total_bytes,
    }
