"""What a model's items ask of a device, and how long that takes it. Sans-IO.

Everything is a sum over items, layers and then the output, so that any range of them is a
difference of two numbers: that is what a search of ranges rests on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from meshnode.pipeline.costs import PlanModel
from meshnode.pipeline.speeds import Speed

DEPTH_TOKENS = 512
FLOAT_BYTES = 4.0


@dataclass(frozen=True)
class Load:
    """`streams` requests at once, of so many tokens each. `depth_tokens`: before each answered
    one."""

    prompt_tokens: int
    answer_tokens: int
    streams: int = 1
    depth_tokens: int = DEPTH_TOKENS

    @property
    def tokens(self) -> int:
        return self.streams * (self.prompt_tokens + self.answer_tokens)


ANSWER = Load(0, 1)
PROMPT = Load(512, 0)
CROWD = Load(512, 128, 8)


@dataclass(frozen=True)
class Work:
    """By item, layers then output, for one token. `read`: bytes of weights; `done`: those that each
    token of a prompt is multiplied with. `hidden_bytes`, `logits_bytes`: of it on the wire. `kept`:
    bytes of the cache for each token before it. `numbers`: of its vectors; `queries`: those that
    attend."""

    read: tuple[float, ...]
    done: tuple[float, ...]
    hidden_bytes: float
    logits_bytes: float
    kept: tuple[float, ...] = ()
    numbers: tuple[float, ...] = ()
    queries: tuple[float, ...] = ()

    @property
    def output(self) -> int:
        """The item that is no layer."""
        return len(self.read) - 1

    def answer_sums(self, speed: Speed, load: Load) -> Sequence[float]:
        """Seconds of the items before each, for every answered token of a load."""
        tokens, streams = load.answer_tokens, load.streams
        read_s = tokens * max(1 / speed.decode_bytes_per_s, streams / speed.prefill_bytes_per_s)
        kept_s = tokens * streams * load.depth_tokens / speed.decode_bytes_per_s
        number_s = tokens * streams * speed.number_s
        layer_s = tokens * speed.layer_s
        return [
            read_s * read + kept_s * kept + number_s * numbers + layer_s * layers
            for read, kept, numbers, layers in zip(
                self._read, self._kept, self._numbers, self._layers, strict=True
            )
        ]

    def piece_sums(self, speed: Speed, tokens: float, depth: float) -> Sequence[float]:
        """The same for a piece of a prompt, with so many tokens before each of its tokens."""
        done_s = tokens / speed.prefill_bytes_per_s
        number_s = tokens * speed.number_s
        query_s = tokens * depth * speed.attention_s
        layer_s = speed.layer_s
        return [
            done_s * done + number_s * numbers + query_s * queries + layer_s * layers
            for done, numbers, queries, layers in zip(
                self._done, self._passed, self._queries, self._layers, strict=True
            )
        ]

    def least_s_per_byte(self, speed: Speed, tokens: float, depth: float) -> float:
        """Of a piece of a prompt: what each byte that its tokens are multiplied with takes at
        least, with all that goes with it, in whichever item."""
        passed, queries, layers = self._least
        each_s = 1 / speed.prefill_bytes_per_s + passed * speed.number_s
        return tokens * (each_s + queries * depth * speed.attention_s) + layers * speed.layer_s

    @cached_property
    def _least(self) -> tuple[float, float, float]:
        """For each byte that a prompt's tokens are multiplied with, of the item that has the least:
        numbers, queries, and layers."""
        columns = (self._passed, self._queries, self._layers)
        rows = [[after - before for before, after in itertools.pairwise(row)] for row in columns]
        passed, queries, layers = (
            min((one / done for one, done in zip(row, self.done, strict=True) if done), default=0.0)
            for row in rows
        )
        return passed, queries, layers

    @cached_property
    def _read(self) -> Sequence[float]:
        return self._sums(self.read)

    @cached_property
    def _done(self) -> Sequence[float]:
        return self._sums(self.done)

    @cached_property
    def _kept(self) -> Sequence[float]:
        return self._sums(self.kept)

    @cached_property
    def _numbers(self) -> Sequence[float]:
        return self._sums(self.numbers)

    @cached_property
    def _passed(self) -> Sequence[float]:
        """Of a prompt's tokens, which skip what they are not multiplied with."""
        rows = zip(self.numbers, self.done, self.read, strict=False)
        return self._sums([count * done / read if read else 0.0 for count, done, read in rows])

    @cached_property
    def _queries(self) -> Sequence[float]:
        return self._sums(self.queries)

    @cached_property
    def _layers(self) -> Sequence[float]:
        """The items that take part, but the output."""
        return self._sums([float(read > 0) for read in self.read[:-1]])

    def _sums(self, row: Iterable[float]) -> Sequence[float]:
        found = list(itertools.accumulate(row, initial=0.0))
        return found + [found[-1]] * (len(self.read) + 1 - len(found))


def work_of(model: PlanModel, *, wire_bytes: float = FLOAT_BYTES) -> Work:
    """`wire_bytes`: of one number of the hidden state on the wire."""
    read = [float(size) for size in model.read_bytes or model.layer_bytes]
    done = list(read)
    kept = [float(each) for each in model.kv_bytes_per_token_per_layer]
    numbers = [layer_numbers(model.n_embd, model.n_attn, model.n_ff)] * model.n_layers
    queries = [float(model.n_attn if each else 0) for each in kept]
    last = model.n_layers - model.n_nextn - 1
    if last >= 0:
        n_kv = sum(cells.k_width + cells.v_width for cells in model.memory[last].caches)
        done[last] *= attention_share(model.n_embd, model.n_attn, n_kv, model.n_ff)
    for layer in range(max(0, last + 1), model.n_layers):
        read[layer] = done[layer] = kept[layer] = numbers[layer] = queries[layer] = 0.0
    # Of a prompt only the last token reaches the output.
    return Work(
        read=(*read, float(model.output_bytes)),
        done=(*done, 0.0),
        hidden_bytes=model.n_embd * wire_bytes,
        logits_bytes=model.n_vocab * FLOAT_BYTES,
        kept=tuple(kept),
        numbers=tuple(numbers),
        queries=tuple(queries),
    )


def layer_numbers(n_embd: int, n_attn: int, n_ff: int) -> float:
    """Of one token's vectors in a layer: the hidden state twice, queries, what is in the middle."""
    return float(2 * n_embd + n_attn + n_ff)


def attention_share(n_embd: int, n_attn: int, n_kv: int, n_ff: int) -> float:
    """Of a layer's weights, what attention has: `n_kv` numbers of keys and values, three matrices
    for what follows. The engine drops a prompt's tokens between the two, but the last, where no
    layer comes after."""
    attention, rest = n_embd * (2 * n_attn + n_kv), 3 * n_embd * n_ff
    return attention / (attention + rest) if attention + rest else 1.0
