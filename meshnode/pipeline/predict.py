"""How long a plan takes: for a token, for a prompt, until it is ready. Sans-IO.

A plan is a row of stages, each some items (layers, then the output) on one device. One formula says
how long a *load* takes, `streams` requests of `prompt_tokens` each, answered with `answer_tokens`
(`work.py` says what items ask of a device, `speeds.py` what it does in a second):

- **A token reads.** Each stage reads its weights once for a token of every stream, so that a batch
  takes `read bytes / decode rate`, until so many streams share it that arithmetic is the bound
  (`streams x bytes / prefill rate`). Of experts only those used are read; of the cache, as much as
  there are tokens before, 512 unless the load says otherwise. Layers that predict further tokens
  (NextN) read nothing: they run for guesses only. With several streams a mixture reads more experts
  than one does; not counted.
- **Stages wait for each other.** A token passes all of them, so their times add up: machines more
  add memory, never speed, to a single answer.
- **Hops.** Half a round trip and the activations at the link's rate, each way: in a ring there are
  w + 1 for w workers (orchestrator, worker, worker, …, back), in a star 2w, since a result goes
  home before it goes on. Two devices of one worker hand over by way of the orchestrator too.
- **The output.** With the last stage: one row of logits (4 bytes a token of the vocabulary) crosses
  the last hop for each token. At home: the hidden state does, and this machine's CPU reads the
  output's weights.
- **A prompt is arithmetic.** Each token is multiplied with the weights (`bytes / prefill rate`),
  its vectors are normed, turned and summed (`number_s` for each of their numbers: a quarter of the
  whole where layers are narrow, a tenth where they are wide), and it attends to the tokens before
  it, half of the prompt (`attention_s`). The last layer's feed-forward part is for the last token
  only. Over two workers and more a prompt goes in pieces of 128 tokens, which follow each other
  like cars in a tunnel as long as nothing must come home in between (a ring that ends on a worker):
  all stages once, and for each further piece the slowest of them, be it a device or a wire.
  Otherwise their times add up.
- **A batch** takes `layer_s` a layer and `token_s` a stage whatever its size.
- **Ready** is a share pulled where it is not on the disk, read from it, and seven round trips
  (docs/engine.md); the slowest node decides.

Not in it: tokens guessed ahead, machines that share cores or a network with others, and what a
machine does besides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from meshnode.pipeline.plan import Plan, PlanRequest
from meshnode.pipeline.speeds import Link, Links, Speed, Storage
from meshnode.pipeline.work import ANSWER, CROWD, PROMPT, Load, Work, work_of

PIECE_TOKENS = 128
BATCH_TOKENS = 512
START_ROUND_TRIPS = 7
START_S = 0.3
"""Of processes, caches and the first batch."""
LEAST_S = 1e-9
"""Of anything, so that there is a rate."""

Moving = Mapping[str, tuple[float, ...]]
"""By node, seconds that the items before each are taken to cost because they are not there."""
NOTHING_MOVES: Moving = {}


@dataclass(frozen=True)
class Site:
    """A device that may hold items."""

    node: str
    device: str
    speed: Speed
    is_local: bool = False


@dataclass(frozen=True)
class Stage:
    """Items `start` to `stop` (left out) on a device."""

    site: Site
    start: int
    stop: int


class Pricing:
    """I say what each part of a chain of stages costs under a load, in seconds."""

    def __init__(
        self, work: Work, links: Links, load: Load, home: Site, moving: Moving = NOTHING_MOVES
    ) -> None:
        """moving: counted on top, by node, of the items before each."""
        self.moving = moving
        self._work = self.work = work
        self._links = links
        self._load = self.load = load
        self._home = home
        self._hops: dict[tuple[str, str], Link] = {}
        self._tables: dict[tuple[str, ...], list[list[tuple[float, float]]]] = {}
        self._ways: dict[tuple[str, str], tuple[float, float]] = {}
        self._answers: dict[Speed, Sequence[float]] = {}
        self._moved: dict[tuple[Speed, str], Sequence[float]] = {}
        self._pieces: dict[tuple[Speed, float], Sequence[float]] = {}
        self.output = work.output

    def pieces(self, n_workers: int) -> tuple[int, float]:
        """How many pieces a load's prompts are, and of how many tokens each."""
        tokens = self._load.prompt_tokens * self._load.streams
        count = math.ceil(tokens / (PIECE_TOKENS if n_workers > 1 else BATCH_TOKENS))
        return count, tokens / count if count else 0.0

    def answer_sums(self, site: Site) -> Sequence[float]:
        """Of the items before each: what they take for every answered token of the load."""
        found = self._answers.get(site.speed)
        if found is None:
            found = self._answers[site.speed] = self._work.answer_sums(site.speed, self._load)
        moving = self.moving.get(site.node)
        if moving is None:
            return found
        key = site.speed, site.node
        if key not in self._moved:
            self._moved[key] = tuple(map(float.__add__, found, moving))
        return self._moved[key]

    def piece_sums(self, site: Site, piece_tokens: float) -> Sequence[float]:
        """The same for one piece of a prompt."""
        key = site.speed, piece_tokens
        found = self._pieces.get(key)
        if found is None:
            depth = self._load.prompt_tokens / 2
            found = self._pieces[key] = self._work.piece_sums(site.speed, piece_tokens, depth)
        return found

    def least_s_per_byte(self, site: Site, piece_tokens: float) -> float:
        """Of a piece of a prompt (`Work.least_s_per_byte`)."""
        depth = self._load.prompt_tokens / 2
        return self._work.least_s_per_byte(site.speed, piece_tokens, depth)

    def wire_s(self, start: str, end: str, piece_tokens: float) -> float:
        """What a piece of a prompt takes of a link's rate, as often as it crosses it."""
        return self._way(start, end)[1] * piece_tokens * self._work.hidden_bytes

    def hop_s(self, start: str, end: str, pieces: float, piece_tokens: float) -> float:
        """From one device to the next, for every token answered and so many pieces of prompts."""
        load, (delay_s, byte_s) = self._load, self._way(start, end)
        tokens = load.answer_tokens * load.streams + pieces * piece_tokens
        wire_s = tokens * self._work.hidden_bytes * byte_s
        return (load.answer_tokens + pieces) * delay_s + wire_s

    def hop_table(
        self, names: Sequence[str], pieces: float, piece_tokens: float
    ) -> list[list[float]]:
        """`hop_s` from each of these nodes to each."""
        load = self._load
        batches = load.answer_tokens + pieces
        tokens = load.answer_tokens * load.streams + pieces * piece_tokens
        sent_bytes = tokens * self._work.hidden_bytes
        key = tuple(names)
        if key not in self._tables:
            self._tables[key] = [[self._way(one, other) for other in names] for one in names]
        return [
            [batches * delay_s + sent_bytes * byte_s for delay_s, byte_s in row]
            for row in self._tables[key]
        ]

    def return_s(self, last: str, pieces: float, *, output_at_home: bool) -> float:
        """From the last worker home, which of a prompt is one token."""
        work, load = self._work, self._load
        token_bytes = work.hidden_bytes if output_at_home else work.logits_bytes
        link = self._link(last, self._home.node)
        return load.answer_tokens * link.hop_s(load.streams * token_bytes) + pieces * link.hop_s(
            token_bytes
        )

    def home_output_s(self) -> float:
        sums = self.answer_sums(self._home)
        return sums[self.output + 1] - sums[self.output]

    def fixed_s(self, site: Site, pieces: float) -> float:
        return (self._load.answer_tokens + pieces) * site.speed.token_s

    def is_pipelined(self, workers: Sequence[str], *, ends_here: bool) -> bool:
        straight = all(self._links.goes_straight(*pair) for pair in itertools.pairwise(workers))
        return len(workers) > 1 and straight and not ends_here

    def _way(self, start: str, end: str) -> tuple[float, float]:
        """From one device to the next: the delay, and what each byte takes of the links' rates."""
        found = self._ways.get((start, end))
        if found is None:
            legs = self._legs(start, end)
            delay_s = sum(leg.rtt_s for leg in legs) / 2
            found = delay_s, sum(1 / leg.bytes_per_s for leg in legs)
            self._ways[start, end] = found
        return found

    def _legs(self, start: str, end: str) -> tuple[Link, ...]:
        """The links that a result crosses on its way to the next device."""
        home = self._home.node
        if start == end:
            return () if start == home else (self._link(start, home), self._link(home, end))
        if home in (start, end) or self._links.goes_straight(start, end):
            return (self._link(start, end),)
        return (self._link(start, home), self._link(home, end))

    def _link(self, start: str, end: str) -> Link:
        found = self._hops.get((start, end))
        if found is None:
            found = self._hops[start, end] = self._links.between(start, end, self._home.node)
        return found


def load_s(pricing: Pricing, home: Site, stages: Sequence[Stage], *, output_at_home: bool) -> float:
    """How long the load takes on these stages, in their order; empty ones count for nothing."""
    used = [stage for stage in stages if stage.stop > stage.start]
    workers = list(dict.fromkeys(stage.site.node for stage in used if not stage.site.is_local))
    ends_here = used[-1].site.is_local
    n_pieces, piece_tokens = pricing.pieces(len(workers))
    is_pipelined = pricing.is_pipelined(workers, ends_here=ends_here)
    passes = min(n_pieces, 1) if is_pipelined else n_pieces
    total_s = slowest_s = 0.0
    at = home
    for stage in used:
        answers = pricing.answer_sums(stage.site)
        pieces = pricing.piece_sums(stage.site, piece_tokens)
        stop = max(stage.start, min(stage.stop, pricing.output + (not output_at_home)))
        piece_s = pieces[stop] - pieces[stage.start]
        total_s += answers[stop] - answers[stage.start]
        total_s += passes * piece_s + pricing.fixed_s(stage.site, passes)
        slowest_s = max(slowest_s, piece_s)
        if stage.site != at and not (at.is_local and stage.site.is_local):
            total_s += pricing.hop_s(at.node, stage.site.node, passes, piece_tokens)
            wire_s = pricing.wire_s(at.node, stage.site.node, piece_tokens)
            slowest_s = max(slowest_s, wire_s)
        at = stage.site
    if not ends_here:
        total_s += pricing.return_s(at.node, passes, output_at_home=output_at_home)
    if output_at_home:
        total_s += pricing.home_output_s()
    return max(LEAST_S, total_s + (n_pieces - passes) * slowest_s)


@dataclass(frozen=True)
class Prediction:
    """`crowd_tok_s`: prompts and answers of eight requests at once, all their tokens together.
    `memory_bytes`: by node. `is_measured`: nothing of it was assumed."""

    ready_s: float
    decode_tok_s: float
    prefill_tok_s: float
    crowd_tok_s: float
    memory_bytes: Mapping[str, int]
    is_measured: bool


def predict(request: PlanRequest, plan: Plan) -> Prediction:
    """What this plan of this request comes to."""
    memory_bytes: dict[str, int] = {}
    weight_bytes: dict[str, int] = {}
    for share in plan.shares:
        memory_bytes[share.node] = memory_bytes.get(share.node, 0) + share.total_bytes
        weight_bytes[share.node] = weight_bytes.get(share.node, 0) + share.weight_bytes
    return Prediction(
        ready_s=ready_s(weight_bytes, storage_of(request, plan), request.links, request.local.name),
        decode_tok_s=ANSWER.tokens / plan_s(request, plan, ANSWER),
        prefill_tok_s=PROMPT.tokens / plan_s(request, plan, PROMPT),
        crowd_tok_s=CROWD.tokens / plan_s(request, plan, CROWD),
        memory_bytes=memory_bytes,
        is_measured=request.is_measured,
    )


def plan_s(request: PlanRequest, plan: Plan, load: Load, pricing: Pricing | None = None) -> float:
    """How long a load takes under this plan. `pricing`: of the two, where it is there."""
    first, last = plan.shares[0], plan.shares[-1]
    output_at_home = first.has_output and last.node != first.node
    sites = sites_of(request)
    stages = [
        Stage(
            sites[share.node, share.device],
            share.first_layer,
            share.last_layer + (share.has_output and not output_at_home),
        )
        for share in plan.shares
    ]
    home = sites[first.node, first.device]
    return load_s(pricing or pricing_of(request, load), home, stages, output_at_home=output_at_home)


def pricing_of(request: PlanRequest, load: Load, moving: Moving = NOTHING_MOVES) -> Pricing:
    """Of what a request has, whichever plan it comes to."""
    local = request.local
    cpu = next(device for device in local.devices if not device.is_gpu)
    home = Site(local.name, cpu.name, cpu.speed, is_local=True)
    work = work_of(request.model, wire_bytes=request.wire_bytes)
    return Pricing(work, request.links, load, home, moving)


def sites_of(request: PlanRequest) -> dict[tuple[str, str], Site]:
    """By node and device."""
    return {
        (node.name, device.name): Site(node.name, device.name, device.speed, node.is_local)
        for node in request.nodes
        for device in node.devices
    }


def storage_of(request: PlanRequest, plan: Plan) -> Mapping[str, Storage]:
    """By node, with what it is to pull for this plan."""
    if request.stock is None:
        return request.storage
    missing = request.stock.missing_bytes(plan.shares)
    return {
        node: replace(request.storage.get(node, Storage()), missing_bytes=size_bytes)
        for node, size_bytes in missing.items()
    }


def ready_s(
    weight_bytes: Mapping[str, int], storage: Mapping[str, Storage], links: Links, home: str
) -> float:
    """Until the first answer may begin: `weight_bytes` by node, what it has to load."""
    slowest_s = farthest_s = 0.0
    for node, size_bytes in weight_bytes.items():
        kept = storage.get(node, Storage())
        pull_s = kept.missing_bytes / kept.pull_bytes_per_s
        slowest_s = max(slowest_s, pull_s + size_bytes / kept.disk_bytes_per_s)
        if node != home:
            farthest_s = max(farthest_s, links.between(home, node, home).rtt_s)
    return START_S + slowest_s + START_ROUND_TRIPS * farthest_s
