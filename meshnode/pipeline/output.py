"""Where the output layer computes: on the last worker, or on the orchestrator. Sans-IO.

It turns a token's hidden state, a few thousand numbers, into one number for each token of the
vocabulary. On the last worker, those cross the wire each time: 128 KB for 32,000 tokens, 600 KB for
150,000. On the orchestrator the hidden state does, and the output matrix is read here instead.

With the engine's variable set, the output layer is on the named device whatever `--tensor-split`
says; the counts go on including it, as one on the last device.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshnode.config import human_bytes
from meshnode.pipeline.costs import PlanModel

CPU_BYTES_PER_S = 15e9
GPU_BYTES_PER_S = 300e9
"""What reads a matrix at least that fast: two channels of memory, a small card."""
LINK_BYTES_PER_S = 60e6
"""Taken for a link nobody has measured: half a gigabit, as good Wi-Fi or a busy cable has it."""
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class OutputChoice:
    """`device`: of the orchestrator, "" for the last worker. `why` is for the user; "" where there
    was nothing to choose."""

    device: str = ""
    why: str = ""


LAST_WORKER = OutputChoice()


@dataclass(frozen=True)
class LastWorker:
    """The lender that holds the last layers. `bytes_per_s`: of its link, `reads_bytes_per_s`: of
    its device, where those are known."""

    name: str
    is_gpu: bool
    bytes_per_s: float | None
    reads_bytes_per_s: float | None = None


def choose_output(
    model: PlanModel, last: LastWorker, device: str, reads_bytes_per_s: float | None = None
) -> OutputChoice:
    """The cheaper of the two, for one token. `reads_bytes_per_s`: of the local CPU, if known."""
    logits_bytes = model.n_vocab * _FLOAT_BYTES
    hidden_bytes = model.n_embd * _FLOAT_BYTES
    wire_bytes_per_s = last.bytes_per_s or LINK_BYTES_PER_S
    home_s = (
        model.output_bytes / (reads_bytes_per_s or CPU_BYTES_PER_S)
        + hidden_bytes / wire_bytes_per_s
    )
    away_rate = last.reads_bytes_per_s or (GPU_BYTES_PER_S if last.is_gpu else CPU_BYTES_PER_S)
    away_s = model.output_bytes / away_rate + logits_bytes / wire_bytes_per_s
    sizes = (
        f"a token is {human_bytes(hidden_bytes)} on the wire instead of "
        f"{human_bytes(logits_bytes)} of logits"
    )
    times = f"about {_ms(home_s)} here, {_ms(away_s)} on {last.name}"
    if home_s <= away_s:
        return OutputChoice(device, f"the output stays here: {sizes} ({times})")
    return OutputChoice("", f"the output is left to {last.name}, though {sizes} here ({times})")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
