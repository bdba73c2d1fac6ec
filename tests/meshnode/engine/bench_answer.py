"""What llama-bench says of the models that a device is measured with."""

from __future__ import annotations

from typing import Any


def answer(prompt: float = 100.0, token: float = 10.0) -> list[dict[str, Any]]:
    """Of both runs at once."""
    tests = [
        ("wide", 128),
        ("wide", 0),
        *((n, p) for n in ("narrow", "tiny") for p in (128, 512, 0)),
    ]
    return [
        {
            "model_filename": f"/tmp/x/{name}.gguf",
            "n_prompt": tokens,
            "samples_ts": [best / 2, best, best / 3],
        }
        for name, tokens in tests
        for best in [(prompt if tokens else token) * (1 if name == "wide" else 9)]
    ]
