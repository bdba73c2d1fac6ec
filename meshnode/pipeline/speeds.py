"""How fast devices compute and links carry: what predictions are made from. Sans-IO.

What nobody has measured is assumed, and says so (`is_measured`): two channels of memory for a CPU,
a small card for an accelerator, a good home network between machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshnode.pipeline.output import CPU_BYTES_PER_S, GPU_BYTES_PER_S, LINK_BYTES_PER_S

ASSUMED_RTT_S = 2e-3
DISK_BYTES_PER_S = 500e6
PULL_BYTES_PER_S = 30e6


@dataclass(frozen=True)
class Speed:
    """Of one device. `decode_bytes_per_s`: of weights and cache read while it computes one token,
    which memory bounds. `prefill_bytes_per_s`: of weights times tokens while it computes a prompt,
    which arithmetic bounds. `token_s`: for each batch, whatever its size (kernels started, threads
    woken, messages handled); `layer_s`: the same for each layer. `number_s`: for each number of a
    token's vectors in a layer, to norm and turn and sum it; `attention_s`: for each of its queries,
    to attend to one token before it. Where these are 0, the rates are to have them in them."""

    decode_bytes_per_s: float
    prefill_bytes_per_s: float
    token_s: float = 0.0
    is_measured: bool = True
    layer_s: float = 0.0
    number_s: float = 0.0
    attention_s: float = 0.0

    def to_row(self) -> list[int]:
        """As it is told to others: a worker's node to an orchestrator's, a node to `mesh plan`."""
        rates = (self.decode_bytes_per_s, self.prefill_bytes_per_s)
        times = (self.layer_s, self.number_s, self.attention_s)
        return [*map(round, rates), *(round(one * TICKS_PER_S) for one in times)]


TICKS_PER_S = 10**18
"""Times are told in whole ticks, and are of a second at most: a card has done with a number in a
few thousand."""
ROW_LENGTH, MAX_ROW_LENGTH = 5, 64
DEVICE_BYTES_PER_S = (1e6, 1e15)
"""What a device may be said to reach: below the slowest computer and above the fastest."""


def speed_of(row: object) -> Speed | None:
    """The speed that somebody tells of; None where that is not known, or cannot be. A lie within
    the bounds is believed, as a worker's memory is: what it lends is used too much, or not. Rates
    alone will do: other versions tell less, or more."""
    least, most = DEVICE_BYTES_PER_S
    if not isinstance(row, list) or not (len(row) == 2 or ROW_LENGTH <= len(row) <= MAX_ROW_LENGTH):
        return None
    told = row[:ROW_LENGTH]
    if not all(type(one) is int for one in told):
        return None
    rates, ticks = told[:2], told[2:]
    if not all(least <= rate <= most for rate in rates):
        return None
    if not all(0 <= one <= TICKS_PER_S for one in ticks):
        return None
    return Speed(float(rates[0]), float(rates[1]), 0.0, True, *(one / TICKS_PER_S for one in ticks))


ASSUMED_CPU = Speed(CPU_BYTES_PER_S, 8 * CPU_BYTES_PER_S, is_measured=False)
ASSUMED_GPU = Speed(GPU_BYTES_PER_S, 40 * GPU_BYTES_PER_S, is_measured=False)


@dataclass(frozen=True)
class Link:
    """The way from one node to another: `rtt_s` there and back, `bytes_per_s` in this direction.
    `is_measured`: both of them, the rate `age_s` ago."""

    rtt_s: float = ASSUMED_RTT_S
    bytes_per_s: float = LINK_BYTES_PER_S
    is_measured: bool = True
    age_s: float = 0.0

    def hop_s(self, size_bytes: float) -> float:
        return self.rtt_s / 2 + size_bytes / self.bytes_per_s


ASSUMED_LINK = Link(is_measured=False)


@dataclass(frozen=True)
class Storage:
    """Of one node. `missing_bytes`: of its share of the model, what is not on its disk."""

    missing_bytes: int = 0
    disk_bytes_per_s: float = DISK_BYTES_PER_S
    pull_bytes_per_s: float = PULL_BYTES_PER_S


@dataclass(frozen=True)
class Links:
    """`pairs`: by (from, to), as far as measured. `ring`: workers hand results to each other;
    `parted`: pairs of workers, in either order, that go by way of the orchestrator all the same."""

    pairs: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    ring: bool = True
    parted: frozenset[tuple[str, str]] = frozenset()

    def between(self, start: str, end: str, home: str) -> Link:
        """Two workers that nobody measured are taken to be as far from each other as the farther
        of them is from the orchestrator, `home`."""
        found = self.pairs.get((start, end))
        if found is not None:
            return found
        if home in (start, end):
            return ASSUMED_LINK
        out, back = self.between(start, home, home), self.between(home, end, home)
        rate = min(out.bytes_per_s, back.bytes_per_s)
        return Link(max(out.rtt_s, back.rtt_s), rate, is_measured=False)

    def is_measured(self, one: str, other: str) -> bool:
        """Both ways between two nodes."""
        ways = (self.pairs.get((one, other)), self.pairs.get((other, one)))
        return all(way is not None and way.is_measured for way in ways)

    def goes_straight(self, start: str, end: str) -> bool:
        """Whether a worker hands its results to the next one itself."""
        return self.ring and not {(start, end), (end, start)} & self.parted
