"""What the members of one mesh tell each other of its members, and when. Sans-IO.

A member's record has a number, and of two the higher is newer. Members talk of numbers, and send a
record to who lacks it:

    news      a number that is new here goes at once to FANOUT neighbours, drawn by lot, and so on
    compare   as a session begins, and every COMPARE_S with one neighbour, drawn by lot: a root over
              all numbers; where that differs, which cells do (`discovery.digest`); their numbers

A neighbour is a member with whom there is a session. A conversation is a stream that the asker
opened:

    news      asker     {mesh, news: entries}
              listener  {want: keys}
              asker     records
    compare   asker     {mesh, root}
              listener  {cells: hashes, none where the roots are equal}
              asker     {of: which cells differ, entries: the asker's in these}
              listener  {want: keys, pages: how many follow}, records
              asker     records

Who is believed, and what a record holds, is the layer above's. Bounds here: a member's records are
asked for as often as RECORDS allows, whoever tells of them; what was refused is not asked for again
for a while; a neighbour is told at most once in NEWS_PAUSE_S, and sent what SENDS allows.

`now` comes in as seconds of any clock that does not go back; `draw(n)` gives a number below n.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from discovery.digest import (
    CELLS,
    Digest,
    pack_bits,
    pack_cells,
    pack_entries,
    pack_keys,
    parse_bits_untrusted,
    parse_cells_untrusted,
    parse_entries_untrusted,
    parse_keys_untrusted,
)
from tunnels.allowance import Buckets, Rate
from tunnels.errors import BadFrame
from tunnels.peer import PeerId

FANOUT = 8
NEWS_PAUSE_S = 1.0
COMPARE_S = 30.0
COMPARE_AGAIN_S = 5.0
"""After a comparison that found a difference: it may not have found all."""
RETRY_S = 10.0  # a neighbour with whom a conversation failed
ASKED_S = 5.0  # a record that was asked of one neighbour is not asked of another
REFUSED_S = 3600.0
RECORDS = Rate(per_s=1 / 30, burst=6)
"""Of one member: it may move, and its network may flap; it cannot keep the mesh busy."""
SENDS = Rate(per_s=20, burst=1024)
"""Records to one neighbour: all of a large mesh once, and then no more than can be news."""
MAX_NEWS = 256
MAX_ENTRIES = 1024
MAX_SENT = 256  # records in one conversation, each way
MAX_REMEMBERED = 4096  # of what was asked for, or refused

Draw = Callable[[int], int]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Talk:
    """A conversation to begin with a neighbour: news, or, where there is none, a comparison."""

    to: PeerId
    news: Mapping[PeerId, int]


@dataclass
class _Neighbour:
    """knows: numbers that it has, as far as we have heard or told. compares: is due."""

    knows: dict[PeerId, int] = field(default_factory=dict)
    news: dict[PeerId, int] = field(default_factory=dict)
    compares: bool = False
    busy: bool = False
    free_at_s: float = -math.inf


class Gossip:
    """I say who is to be told what, and what to ask for."""

    def __init__(self, me: PeerId, draw: Draw, now: float) -> None:
        self._me = me
        self._draw = draw
        self._digest = Digest()
        self._neighbours: dict[PeerId, _Neighbour] = {}
        self._records = Buckets(RECORDS)
        self._sends = Buckets(SENDS)
        self._asked: OrderedDict[PeerId, tuple[int, float]] = OrderedDict()
        self._refused: OrderedDict[PeerId, tuple[int, float]] = OrderedDict()
        self._compare_at_s = now

    # -- what is known ------------------------------------------------------------------------

    def number(self, peer: PeerId) -> int | None:
        """Of the record that we have; None for none."""
        return self._digest.get(peer)

    def __len__(self) -> int:
        return len(self._digest)

    def root(self) -> bytes:
        return self._digest.root()

    def put(self, peer: PeerId, number: int, now: float, source: PeerId | None = None) -> None:
        """We have this record now; `source` told us, where it was not the member itself."""
        if (before := self._digest.get(peer)) == number:
            return
        self._digest.put(peer, number)
        self._asked.pop(peer, None)
        if source is not None and before is not None:
            self._records.spend(peer, now, 1)
        if source in self._neighbours:
            self._neighbours[source].knows[peer] = number
        who = [
            one
            for name, one in self._neighbours.items()
            if name not in (peer, source) and one.knows.get(peer) != number
        ]
        for _ in range(min(FANOUT, len(who))):
            who.pop(self._draw(len(who))).news[peer] = number

    def drop(self, peer: PeerId) -> None:
        """Its record is gone: it is no member any more."""
        self._digest.drop(peer)
        for one in self._neighbours.values():
            one.news.pop(peer, None)
            one.knows.pop(peer, None)

    def refuse(self, peer: PeerId, number: int, now: float) -> None:
        """This record was not taken: it is not asked for again, for a while."""
        _remember(self._refused, peer, (number, now + REFUSED_S))

    # -- neighbours ---------------------------------------------------------------------------

    def neighbours(self) -> frozenset[PeerId]:
        return frozenset(self._neighbours)

    def meet(self, peer: PeerId) -> None:
        """A session with a member has begun. Of the two, the one with the lower id compares."""
        self._neighbours[peer] = _Neighbour(compares=self._me < peer)

    def part(self, peer: PeerId) -> None:
        self._neighbours.pop(peer, None)

    # -- conversations that we begin ----------------------------------------------------------

    def next_deadline(self) -> float:
        """When `due` has something to say; minus infinity for now, infinity for never."""
        idle = [one for one in self._neighbours.values() if not one.busy]
        first_s = min((one.free_at_s for one in idle), default=math.inf)
        due = [one.free_at_s for one in idle if one.news or one.compares]
        return min([*due, max(self._compare_at_s, first_s)])

    def due(self, now: float) -> list[Talk]:
        """The conversations to begin now; `over` follows for each."""
        free = {
            name: one
            for name, one in self._neighbours.items()
            if not one.busy and one.free_at_s <= now
        }
        if free and now >= self._compare_at_s:
            self._compare_at_s = now + COMPARE_S * (0.5 + self._draw(1024) / 1024)
            list(free.values())[self._draw(len(free))].compares = True
        talks = []
        for name, one in free.items():
            if one.news:
                first = sorted(one.news)[:MAX_NEWS]
                talks.append(Talk(name, {peer: one.news.pop(peer) for peer in first}))
            elif one.compares:
                one.compares = False
                talks.append(Talk(name, {}))
            else:
                continue
            one.busy = True
        return talks

    def over(self, talk: Talk, now: float, *, failed: bool = False, differed: bool = False) -> None:
        """The conversation has ended."""
        if differed:
            self._compare_at_s = min(self._compare_at_s, now + COMPARE_AGAIN_S)
        one = self._neighbours.get(talk.to)
        if one is None:
            return
        one.busy = False
        one.free_at_s = now + (RETRY_S if failed else NEWS_PAUSE_S)
        if not failed:
            one.knows.update(talk.news)
            return
        one.compares = one.compares or not talk.news
        for peer, number in talk.news.items():
            if self._digest.get(peer) == number:
                one.news.setdefault(peer, number)

    def opening(self, talk: Talk) -> dict[str, Any]:
        if talk.news:
            return {"news": pack_entries(talk.news)}
        return {"root": self._digest.root()}

    def wanted_untrusted(self, talk: Talk, answer: Message, now: float) -> list[PeerId]:
        """What a neighbour lacks of the news. Raises `BadFrame`."""
        wanted = parse_keys_untrusted(answer.get("want"), MAX_NEWS)
        return self._to_send(talk.to, [peer for peer in wanted if peer in talk.news], now)

    def narrow_untrusted(self, answer: Message) -> dict[str, Any] | None:
        """What to say of the cells that differ; None where none does. Raises `BadFrame`."""
        theirs = parse_cells_untrusted(answer.get("cells"))
        ours = self._digest.cells()
        differing = [cell for cell in range(CELLS) if theirs and theirs[cell] != ours[cell]]
        if not differing:
            return None
        chosen = self._as_many_as_fit(differing)
        return {"of": pack_bits(chosen), "entries": pack_entries(self._digest.entries(chosen))}

    def compared_untrusted(
        self, talk: Talk, answer: Message, now: float
    ) -> tuple[list[PeerId], int]:
        """Which records to send, and how many pages come before. Raises `BadFrame`."""
        wanted = parse_keys_untrusted(answer.get("want"), MAX_SENT)
        pages = answer.get("pages")
        if not isinstance(pages, int) or not 0 <= pages <= MAX_SENT:
            raise BadFrame("a comparison of an unknown shape")
        return self._to_send(talk.to, wanted, now), pages

    # -- conversations that others begin ------------------------------------------------------

    def hear_untrusted(self, source: PeerId, message: Message, now: float) -> dict[str, Any]:
        """The answer to a neighbour's first words. Raises `BadFrame`."""
        if "news" in message:
            entries = parse_entries_untrusted(message["news"], MAX_NEWS)
            return {"want": pack_keys(self._lacking(source, entries, now))}
        if not isinstance(message.get("root"), bytes):
            raise BadFrame("a conversation of an unknown kind")
        is_same = message["root"] == self._digest.root()
        return {"cells": b"" if is_same else pack_cells(self._digest.cells())}

    def compare_untrusted(
        self, source: PeerId, message: Message, now: float
    ) -> tuple[list[PeerId], list[PeerId]]:
        """Which records to ask for and which to send, of the cells that differ. Raises
        `BadFrame`."""
        cells = parse_bits_untrusted(message.get("of"))
        theirs = parse_entries_untrusted(message.get("entries"), MAX_ENTRIES)
        wanted = self._lacking(source, theirs, now)
        ours = self._digest.entries(cells)
        newer = [peer for peer, number in ours.items() if number > theirs.get(peer, -1)]
        return wanted, self._to_send(source, newer, now)

    def _lacking(self, source: PeerId, theirs: Mapping[PeerId, int], now: float) -> list[PeerId]:
        """Of what a neighbour has, what to ask it for."""
        wanted = []
        neighbour = self._neighbours.get(source)
        for peer, number in theirs.items():
            ours = self._digest.get(peer)
            if ours is not None and neighbour is not None:
                neighbour.knows[peer] = number
                if neighbour.news.get(peer) == number:
                    del neighbour.news[peer]
            if (ours is None or number > ours) and self._may_ask(peer, number, now):
                wanted.append(peer)
        for peer in (wanted := wanted[:MAX_SENT]):
            _remember(self._asked, peer, (theirs[peer], now + ASKED_S))
        return wanted

    def _may_ask(self, peer: PeerId, number: int, now: float) -> bool:
        for book in (self._asked, self._refused):
            known, until_s = book.get(peer, (-1, -math.inf))
            if number <= known and now < until_s:
                return False
        return self._records.level(peer, now) >= 1

    def _to_send(self, neighbour: PeerId, peers: list[PeerId], now: float) -> list[PeerId]:
        """Those of which we may send a record, which the neighbour has from then on."""
        room = min(MAX_SENT, max(0, int(self._sends.level(neighbour, now))))
        known = [(peer, number) for peer in peers if (number := self.number(peer)) is not None]
        sent = dict(known[:room])
        self._sends.spend(neighbour, now, len(sent))
        if neighbour in self._neighbours:
            self._neighbours[neighbour].knows.update(sent)
        return list(sent)

    def _as_many_as_fit(self, cells: list[int]) -> list[int]:
        """Of the cells that differ, from one drawn by lot on: what is left out comes next time."""
        start = self._draw(len(cells))
        chosen: list[int] = []
        entries = 0
        for cell in cells[start:] + cells[:start]:
            entries += self._digest.size(cell)
            if entries > MAX_ENTRIES and chosen:
                break
            chosen.append(cell)
        return chosen


def _remember(
    book: OrderedDict[PeerId, tuple[int, float]], peer: PeerId, entry: tuple[int, float]
) -> None:
    book[peer] = entry
    book.move_to_end(peer)
    while len(book) > MAX_REMEMBERED:
        book.popitem(last=False)
