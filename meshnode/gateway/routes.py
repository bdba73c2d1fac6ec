"""The table of routes: what is passed on to llama-server, and what never is.

Names are those of llama-server (tools/server/server.cpp upstream). A request goes to the path of
its table entry, never to one that the client wrote, so `/v1/../slots` and the like reach nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from meshnode.gateway.refusal import Refusal
from meshnode.gateway.view import Upstream


class Need(Enum):
    """What the served model must be able to do for a route."""

    NOTHING = "nothing"
    EMBEDDINGS = "embeddings"


@dataclass(frozen=True)
class Passed:
    """A route passed on to llama-server.

    `end_mark` starts the last event of a stream that ended well, where the route has such a mark.
    """

    method: str
    path: str
    need: Need = Need.NOTHING
    end_mark: bytes | None = None

    def check(self, upstream: Upstream) -> None:
        """Raises `Refusal` (501) when this model, as it is served, has no such route."""
        if self.need is Need.EMBEDDINGS and not upstream.embeddings:
            raise Refusal(
                501,
                "not_served",
                f"{upstream.model} is served for generation, not for embeddings: start it with "
                "`mesh serve … -- --embeddings` on another port or in place of this one",
            )


@dataclass(frozen=True)
class Withheld:
    """A route of llama-server that is not offered, and why."""

    method: str
    path: str
    reason: str


_DONE = b"data: [DONE]"
_RESUMABLE = "answers cannot be taken up again after the client has left: generation stops with it"

PASSED = (
    Passed("GET", "/v1/models"),
    Passed("POST", "/v1/completions", end_mark=_DONE),
    Passed("POST", "/v1/chat/completions", end_mark=_DONE),
    Passed("POST", "/v1/chat/completions/control"),
    Passed("POST", "/v1/chat/completions/input_tokens"),
    Passed("POST", "/v1/responses"),
    Passed("POST", "/v1/responses/input_tokens"),
    Passed("POST", "/v1/messages"),
    Passed("POST", "/v1/messages/count_tokens"),
    Passed("POST", "/v1/embeddings", need=Need.EMBEDDINGS),
    Passed("POST", "/v1/rerank"),
    Passed("POST", "/v1/reranking"),
)
WITHHELD = (
    Withheld("POST", "/v1/audio/transcriptions", "models are served without audio input"),
    Withheld("GET", "/v1/stream", _RESUMABLE),
    Withheld("DELETE", "/v1/stream", _RESUMABLE),
    Withheld("POST", "/v1/streams/lookup", _RESUMABLE),
)
