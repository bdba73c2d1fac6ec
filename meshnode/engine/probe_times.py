"""What three models of zeros say of a device: their times, taken apart. Sans-IO.

A prompt's token takes `bytes of weights / rate + numbers of its vectors x number_s + queries x
tokens before x attention_s`, and a share of what the batch takes whatever its size. Two lengths of
one prompt tell attention from the rest, two widths weights from vectors, and a model of next to no
weights what each layer takes. (`pipeline/work.py` says how a model's layers add up, also that the
last one's feed-forward part is for one token only: a quarter of the wide model, were it forgotten.)
"""

from __future__ import annotations

from dataclasses import dataclass

from meshnode.engine.probe_model import NARROW, TINY, WIDE, Shape
from meshnode.pipeline.speeds import Speed
from meshnode.pipeline.work import attention_share, layer_numbers

SHORT_TOKENS, LONG_TOKENS = 128, 512
AT_MOST = 0.5
"""Of a time, taken for what was told apart from it: other programs disturb measurements."""
BATCH_AT_MOST = 0.9
"""The same of what is measured by itself: starting a card's kernels can take that long."""


@dataclass(frozen=True)
class Times:
    """Seconds for each token: of a prompt of `SHORT_TOKENS` or `LONG_TOKENS`, or of an answer."""

    wide_prompt: float
    wide_answer: float
    narrow_prompt: float
    narrow_long: float
    tiny_answer: float


@dataclass(frozen=True)
class _Asked:
    """By each token of a prompt."""

    done_bytes: float
    numbers: float
    queries: float
    layers: int


def speed_from(times: Times) -> Speed:
    """What the device does in a second."""
    wide, narrow, tiny = (_asked(shape) for shape in (WIDE, NARROW, TINY))
    layer_s = times.tiny_answer / tiny.layers
    attention_s = _attention_s(times, narrow, layer_s)
    wide_s, narrow_s = (
        _arithmetic_s(prompt_s, asked, layer_s, attention_s)
        for prompt_s, asked in ((times.wide_prompt, wide), (times.narrow_prompt, narrow))
    )
    share = narrow.done_bytes / wide.done_bytes
    number_s = (narrow_s - share * wide_s) / (narrow.numbers - share * wide.numbers)
    number_s = _within(number_s, AT_MOST * wide_s / wide.numbers)
    layer_s = max(0.0, layer_s - number_s * tiny.numbers / tiny.layers)
    beside_s = WIDE.layers * layer_s + number_s * wide.numbers
    answer_s = times.wide_answer - _within(beside_s, AT_MOST * times.wide_answer)
    return Speed(
        decode_bytes_per_s=WIDE.token_bytes / answer_s,
        prefill_bytes_per_s=wide.done_bytes / (wide_s - number_s * wide.numbers),
        layer_s=layer_s,
        number_s=number_s,
        attention_s=attention_s,
    )


def _attention_s(times: Times, narrow: _Asked, layer_s: float) -> float:
    """From what each token takes more in a longer prompt."""
    more_s = times.narrow_long - times.narrow_prompt
    more_s += narrow.layers * layer_s * (1 / SHORT_TOKENS - 1 / LONG_TOKENS)
    further_tokens = (LONG_TOKENS - SHORT_TOKENS) / 2
    return _within(more_s, AT_MOST * times.narrow_long) / (narrow.queries * further_tokens)


def _arithmetic_s(prompt_s: float, asked: _Asked, layer_s: float, attention_s: float) -> float:
    """Of a short prompt's token, without what attention and the batch take."""
    batch_s = asked.layers * layer_s / SHORT_TOKENS
    attending_s = asked.queries * attention_s * SHORT_TOKENS / 2
    return prompt_s - _within(batch_s + attending_s, BATCH_AT_MOST * prompt_s)


def _asked(shape: Shape) -> _Asked:
    share = attention_share(shape.width, shape.width, 2 * shape.width, shape.ffn)
    whole = shape.layers - 1 + share  # the last layer's second part is for the last token only
    return _Asked(
        done_bytes=whole * shape.layer_bytes,
        numbers=whole * layer_numbers(shape.width, shape.width, shape.ffn),
        queries=shape.layers * shape.width,
        layers=shape.layers,
    )


def _within(value: float, most: float) -> float:
    return max(0.0, min(value, most))
