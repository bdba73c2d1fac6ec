"""What a llama-server answers to a few prompts: tokens, and how probable the best ones were."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from tests.engine.processes import Running

N_TOKENS = 32
N_BEST = 5
TIMEOUT_S = 60
MEDIA_MARKER = "<media>"
"""In llama-server's environment as LLAMA_MEDIA_MARKER; by default it draws one at random."""


@dataclass(frozen=True)
class Answer:
    """Greedy tokens; for each the best tokens with their log probabilities, best first.

    The latter are missing (empty) where several guessed tokens were accepted at once.
    """

    tokens: tuple[int, ...]
    best: tuple[tuple[tuple[int, float], ...], ...]
    drafted: int
    accepted: int

    @property
    def margins(self) -> list[float]:
        """How far the token taken was ahead of the second: a difference of logits."""
        return [best[0][1] - best[1][1] for best in self.best if best]


def ask(server: Running, prompt: Sequence[int], image: bytes | None = None) -> Answer:
    """With `image`, the prompt begins with it; llama-server then takes text only."""
    text = {
        "prompt_string": MEDIA_MARKER + "".join(map(str, prompt)),
        "multimodal_data": [base64.b64encode(image or b"").decode()],
    }
    reply = _post(
        server,
        "completion",
        {
            "prompt": text if image else list(prompt),
            "n_predict": N_TOKENS,
            "temperature": 0,
            "return_tokens": True,
            "ignore_eos": True,
            "n_probs": N_BEST,
            "cache_prompt": False,
        },
    )
    best = [
        tuple((top["id"], top["logprob"]) for top in token["top_logprobs"])
        for token in reply["completion_probabilities"]
    ]
    timings = reply["timings"]
    assert len(reply["tokens"]) == N_TOKENS
    return Answer(
        tuple(reply["tokens"]),
        tuple(best),
        timings.get("draft_n", 0),
        timings.get("draft_n_accepted", 0),
    )


def ask_in_turn(server: Running, prompts: Sequence[Sequence[int]]) -> list[Answer]:
    return [ask(server, prompt) for prompt in prompts]


def ask_at_once(server: Running, prompts: Sequence[Sequence[int]]) -> list[Answer]:
    """Each in a slot of its own, if the server has as many: their tokens share batches."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: ask(server, prompt), prompts))


def embed(server: Running, text: Sequence[int]) -> list[float]:
    (reply,) = _post(server, "embedding", {"content": list(text)})
    (vector,) = reply["embedding"]
    return [float(number) for number in vector]


def largest_difference(one: Answer, other: Answer) -> float:
    """Between the log probabilities of the same token at the same place."""
    return max(
        (
            abs(here[token] - there[token])
            for here, there in zip(map(dict, one.best), map(dict, other.best), strict=True)
            for token in here.keys() & there.keys()
        ),
        default=0.0,
    )


def _post(server: Running, path: str, body: dict[str, Any]) -> Any:
    transport = httpx.HTTPTransport(uds=server.address)
    with httpx.Client(transport=transport, timeout=TIMEOUT_S) as client:
        reply = client.post(f"http://engine/{path}", json=body)
    reply.raise_for_status()
    return reply.json()
