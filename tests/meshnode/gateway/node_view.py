"""A node whose state the test sets: the real `NodeView` protocol, without a node behind it."""

from __future__ import annotations

from pathlib import Path

from meshnode.gateway.view import Health, Loss, Stage, Upstream


class SettableNode:
    """What the gateway is told, as the test says it; it keeps what the gateway tells."""

    def __init__(self) -> None:
        self.present = Health(Stage.STARTING, "connecting to the mesh", None, None)
        self.running: Upstream | None = None
        self.end = Loss()
        self.generated: list[tuple[int, float]] = []
        self.in_flight = 0

    def serve_from(self, socket: Path, *, embeddings: bool = False) -> None:
        generation = self.running.generation + 1 if self.running else 1
        self.running = Upstream(socket, "tiny", embeddings, generation)
        self.end = Loss()
        self.present = Health(Stage.READY, "tiny answers", 1.0)

    def lose(self, message: str) -> None:
        self.present = Health(Stage.WAITING_FOR_WORKERS, message, None, 7)
        self.running = None
        self.end.tell(self.present)

    def health(self) -> Health:
        return self.present

    def upstream(self) -> Upstream | None:
        return self.running

    def loss(self) -> Loss:
        return self.end

    def begin_request(self) -> None:
        self.in_flight += 1

    def end_request(self) -> None:
        self.in_flight -= 1

    def status(self) -> dict[str, object]:
        return {"peers": [{"name": "shed", "rtt_ms": 0.4}], "tokens_per_s": 12.5}

    def record_generation(self, tokens: int, seconds: float) -> None:
        self.generated.append((tokens, seconds))
