"""What is expected of every pair of networks: direct, relayed or impossible, and why.

Written down before it was made true, and compared with what is seen by `./just netlab`. The table
is data; `test_expected.py` derives each of its letters a second time, from what the kinds are.

Without a relay the joiner has the token, and where nothing answers there the printer has the
joiner's reply code (`mesh accept`). With a relay, a third host that both reach runs one, and the
token names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

FIRST_BYTE_S = 2.0  # median at most, over any link
DIRECT_S = 5.0  # median at most, where direct is expected
BIRTHDAY_SHARE = 0.95  # of tries that go direct where it takes guessing

KINDS = {
    "open": "public addresses of both families, no firewall",
    "full": "full cone NAT: one mapping for all, open to all",
    "addr": "address-restricted NAT: one mapping, open to addresses that were sent to",
    "port": "port-restricted NAT: one mapping, open to sockets that were sent to",
    "home": "plain Linux home router: masquerade, port-restricted",
    "sym": "symmetric NAT: a random port for every destination, port-restricted",
    "stealth": "public addresses of both families; the host's firewall drops the unasked",
    "blocked": "home router that lets out TCP to port 443 and nothing else",
    "cgnat": "home router behind a carrier's NAT",
    "ipv6": "IPv6 only, behind a router that drops what was not asked for",
    "broken4": "both families, but IPv4 leads nowhere; IPv6 without a firewall",
    "short": "home router that forgets a mapping after fifteen seconds of silence",
    "upnp": "home router that forwards ports when asked (UPnP, NAT-PMP, PCP)",
}


class Outcome(Enum):
    DIRECT = "direct"
    RELAYED = "relayed"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True)
class Way:
    """One letter of the table. reason: in a few words, of what happens without a relay;
    relayed_reason: with one, when it reads differently."""

    outcome: Outcome
    reason: str
    needs_reply_code: bool = False
    relayed_reason: str = ""
    guesses: bool = False  # birthday probes: a small share of tries may stay relayed


WAYS = {
    "T": Way(Outcome.DIRECT, "the printer is reachable: the joiner dials it"),
    "R": Way(
        Outcome.DIRECT,
        "only the joiner is reachable: the printer dials it, with the reply code",
        needs_reply_code=True,
        relayed_reason="only the joiner is reachable: the printer dials it, told through the relay",
    ),
    "P": Way(
        Outcome.DIRECT,
        "both punch: each opens its own side for the other's known address",
        needs_reply_code=True,
    ),
    "B": Way(
        Outcome.DIRECT,
        "birthday probes: many sockets at one side, many guesses of their ports at the other",
        needs_reply_code=True,
        guesses=True,
    ),
    "S": Way(Outcome.IMPOSSIBLE, "both ports are random for every destination", True),
    "U": Way(Outcome.IMPOSSIBLE, "no UDP, and of TCP port 443 only, where no peer listens", True),
    "F": Way(Outcome.IMPOSSIBLE, "no address family in common", True),
    "H": Way(
        Outcome.IMPOSSIBLE, "the router turns nothing around, and keeps the networks apart", True
    ),
}

# A row is who prints the token, a column who joins.
TABLE = """
          open full addr port home sym  stealth blocked cgnat ipv6 broken4 short upnp
open      T    T    T    T    T    T    T       U       T     T    T       T     T
full      T    T    T    T    T    T    T       U       T     F    F       T     T
addr      R    R    P    P    P    P    P       U       P     F    F       P     R
port      R    R    P    P    P    B    P       U       P     F    F       P     R
home      R    R    P    P    P    B    P       U       P     F    F       P     R
sym       R    R    P    B    B    S    B       U       B     F    F       B     R
stealth   R    R    P    P    P    B    P       U       P     P    R       P     R
blocked   U    U    U    U    U    U    U       U       U     F    F       U     U
cgnat     R    R    P    P    P    B    P       U       P     F    F       P     R
ipv6      R    F    F    F    F    F    P       F       F     P    R       F     F
broken4   T    F    F    F    F    F    T       F       F     T    T       F     F
short     R    R    P    P    P    B    P       U       P     F    F       P     R
upnp      T    T    T    T    T    T    T       U       T     F    F       T     T
"""

# Two hosts behind one NAT; who prints the token makes no difference.
NEIGHBOURS = {
    "lan": ("T", "two hosts of one LAN, behind one NAT that does not hairpin"),
    "lan-hairpin": ("T", "two hosts of one LAN, behind one NAT that hairpins"),
    "guest": ("H", "a LAN and a guest network kept apart, behind one NAT that does not hairpin"),
    "guest-hairpin": (
        "T",
        "a LAN and a guest network kept apart, behind one full cone that hairpins",
    ),
}


@dataclass(frozen=True)
class Cell:
    """printer and joiner are KINDS; for two hosts behind one NAT, both are the same NEIGHBOURS."""

    printer: str
    joiner: str
    relay: bool

    @property
    def name(self) -> str:
        pair = self.printer if self.printer in NEIGHBOURS else f"{self.printer}-{self.joiner}"
        return f"{pair}+relay" if self.relay else pair

    @property
    def way(self) -> Way:
        return WAYS[letter_of(self.printer, self.joiner)]

    @property
    def outcome(self) -> Outcome:
        outcome = self.way.outcome
        return Outcome.RELAYED if self.relay and outcome is Outcome.IMPOSSIBLE else outcome

    @property
    def reason(self) -> str:
        return (self.relay and self.way.relayed_reason) or self.way.reason

    @property
    def needs_reply_code(self) -> bool:
        return self.way.needs_reply_code and not self.relay


def letter_of(printer: str, joiner: str) -> str:
    return NEIGHBOURS[printer][0] if printer in NEIGHBOURS else _LETTERS[printer, joiner]


def _read(table: str) -> dict[tuple[str, str], str]:
    head, *rows = table.strip().splitlines()
    joiners = head.split()
    return {
        (row.split()[0], joiner): letter
        for row in rows
        for joiner, letter in zip(joiners, row.split()[1:], strict=True)
    }


_LETTERS = _read(TABLE)
CELLS = {
    cell.name: cell
    for relay in (False, True)
    for cell in (
        *(Cell(printer, joiner, relay) for printer, joiner in _LETTERS),
        *(Cell(pair, pair, relay) for pair in NEIGHBOURS),
    )
}

# Tried a hundred times each: what most pairs of machines are, and what breaks first.
NAMED = {
    "home-home+relay": "the pair the product is for: two homes, each behind its router",
    "home-home": "the same with nothing between them but the token and the reply code",
    "home-open": "a server joins a machine at home: only the joiner can be dialled",
    "open-home": "a machine at home joins a server: the token alone must do",
    "stealth-stealth+relay": "two firewalled hosts: nothing is translated, nothing is let in",
    "sym-home+relay": "an office or a phone prints, a home joins: the port has to be guessed",
    "home-sym+relay": "the same the other way round, for the guessing side is then the other",
    "sym-sym+relay": "no direct path: it must say so soon, and stay relayed without harm",
    "blocked-home+relay": "a network that lets web pages out only: all through TCP 443",
    "cgnat-home+relay": "a phone's hotspot or a carrier without addresses: two NATs in a row",
    "upnp-sym": "a port mapping spares even the worst NAT any guessing and any relay",
    "lan": "two machines of one LAN, where the way through the router is shut",
}
