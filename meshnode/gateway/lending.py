"""What the gateway is told by a node that serves no model: `mesh worker --http`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from meshnode.gateway.view import Health, Loss, Stage, Upstream


class Lending:
    """I am the `NodeView` of a worker."""

    def __init__(self, node_status: Callable[[], Mapping[str, Any]]) -> None:
        self._node_status = node_status
        self._loss = Loss()

    def health(self) -> Health:
        return Health(
            Stage.LENDING, "this node lends what it has and serves no model: `mesh serve` does"
        )

    def upstream(self) -> Upstream | None:
        return None

    def loss(self) -> Loss:
        return self._loss

    def begin_request(self) -> None: ...

    def end_request(self) -> None: ...

    def status(self) -> dict[str, object]:
        return dict(self._node_status())

    def record_generation(self, tokens: int, seconds: float) -> None: ...
