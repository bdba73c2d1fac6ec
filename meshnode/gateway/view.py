"""What the gateway is told by the node: the seam between HTTP and everything else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

import trio


class Stage(Enum):
    """How far the node is from answering. Only in READY are requests passed on; in LENDING they
    never are, for the node serves no model."""

    STARTING = "starting"
    WAITING_FOR_WORKERS = "waiting_for_workers"
    PLANNING = "planning"
    DIGESTING = "digesting"
    PULLING = "pulling"
    LEASING = "leasing"
    LOADING = "loading"
    READY = "ready"
    LENDING = "lending"


@dataclass(frozen=True)
class WorkerProgress:
    """How far one worker is with the stage's work, in bytes. A total of 0 is not known yet."""

    node: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Health:
    """`message` is one sentence for users: what is going on, or what failed and how to go on.

    `progress` runs from 0 to 1 within the stage, None where it is not known, and
    `workers` has it for each worker that has told: in PULLING what it fetched of its part, in
    LEASING what it digested of its files, in LOADING what it has loaded. `retry_after_s` goes into
    the Retry-After header; None means the gateway's own default.
    """

    stage: Stage
    message: str
    progress: float | None = None
    retry_after_s: int | None = None
    workers: tuple[WorkerProgress, ...] = ()


@dataclass(frozen=True)
class Upstream:
    """The running llama-server: where it listens and what it serves.

    `generation` grows by one with each server started, so that two servers on one socket path are
    told apart.
    """

    socket: Path
    model: str
    embeddings: bool
    generation: int


class Loss:
    """The end of one server: it or a worker died, or a better plan was due.

    The sentence travels with it, since the node goes on to other stages at once.
    """

    def __init__(self) -> None:
        self.happened = trio.Event()
        self.health: Health | None = None

    def tell(self, health: Health) -> None:
        """It has happened; `health.message` says why, to every request in flight."""
        if self.health is None:
            self.health = health
        self.happened.set()


class NodeView(Protocol):
    """What the gateway asks of the node. Every call returns at once."""

    def health(self) -> Health: ...

    def upstream(self) -> Upstream | None:
        """The server to pass requests to, or None while there is none."""
        ...

    def loss(self) -> Loss:
        """The end of the present server, which may be still to come. Each has its own."""
        ...

    def begin_request(self) -> None:
        """A request is being passed on: no better plan may end it. `end_request` follows."""
        ...

    def end_request(self) -> None: ...

    def status(self) -> dict[str, object]:
        """What `/api/v1/status` shows, ready for JSON."""
        ...

    def record_generation(self, tokens: int, seconds: float) -> None:
        """One answer is complete: so many tokens were generated in so much time."""
        ...
