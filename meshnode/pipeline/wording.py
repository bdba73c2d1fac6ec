"""A node's share of a model, in words. • Sans-IO.

Layers are counted from 0; `first` is included, `last` is not.
"""

from __future__ import annotations


def layers_text(first: int, last: int, output: bool) -> str:
    """`0-3`, `7 and output`, `output`, or `none` for a node that holds no layer."""
    layers = str(first) if last - first == 1 else f"{first}-{last - 1}"
    parts = [layers] * (last > first) + ["output"] * output
    return " and ".join(parts) or "none"


def work_text(first: int, last: int, output: bool) -> str:
    """What completes `NODE computes …`: `layers 0-3 and output`, `output`, or `input` (the token
    embedding, which stays with the orchestrator even where it holds no layer)."""
    if last > first:
        return f"{'layers' if last - first > 1 else 'layer'} {layers_text(first, last, output)}"
    return "output" if output else "input"


_GUESSING = {
    "off": "nothing is guessed ahead",
    "ngram": "repeated text is guessed ahead",
    "draft": "a draft model guesses ahead",
    "mtp": "the model guesses ahead itself",
}


def guessing_text(guesser: str) -> str:
    """What completes `plan: …` for a `Guesser`'s value."""
    return _GUESSING.get(guesser, guesser)
