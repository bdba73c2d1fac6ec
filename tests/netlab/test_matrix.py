"""A few cells of the matrix, one try each; `./just netlab` tries them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import require
from tests.netlab import report
from tests.netlab.expected import CELLS, Outcome
from tests.netlab.seen import Seen, load, summed
from tests.netlab.servers import can_run
from tests.netlab.stations import open_stations
from tests.netlab.topology import internet
from tests.netlab.tries import Try, try_cells

pytestmark = pytest.mark.netlab

AT_ONCE = 3
FAST = (
    # by the token alone, and with the reply code
    "open-home",
    "full-sym",
    "upnp-sym",
    "broken4-ipv6",
    "lan",
    "guest-hairpin",
    "home-home",
    "sym-home",
    # with a relay
    "home-home+relay",
    "home-sym+relay",
    "stealth-stealth+relay",
    "ipv6-ipv6+relay",
    "sym-sym+relay",
    "blocked-home+relay",
)


async def test_pairs_of_networks_connect_as_expected(tmp_path: Path) -> None:
    require("coturn", can_run("turnserver"), "needs turnserver (./just setup)")
    require("miniupnpd", can_run("miniupnpd"), "needs miniupnpd (./just setup)")
    with internet() as net:
        async with open_stations(net, tmp_path) as stations:
            cells = [CELLS[name] for name in FAST]
            tries = await try_cells(stations, cells, lambda _: 1, AT_ONCE)
    wrong = {name: seen for name, (seen,) in tries.items() if not seen.agrees(CELLS[name])}
    assert wrong == {}


def test_the_page_tells_what_was_seen_beside_what_was_expected() -> None:
    wanted, other = CELLS["home-home+relay"], CELLS["sym-sym"]
    direct = Try(Outcome.DIRECT, "quic", first_byte_s=0.5, direct_s=1.5)
    relayed = Try(Outcome.RELAYED, "relay", first_byte_s=0.7)
    seen = {
        wanted.name: summed(wanted, [direct, direct, relayed]),
        other.name: summed(other, [Try(Outcome.IMPOSSIBLE, took_reply_code=True)], "a later run"),
    }
    page = report.page(seen)
    assert f"1 of {len(CELLS)} cells as expected" in page
    assert "| direct | **2/3** | quic 2, relay 1 | 0.50 / 0.70 s | 1.50 / 1.50 s |" in page
    assert "| `home-home+relay` | direct: both punch" in page
    assert "| S 1/1 |" in page
    assert "| a later run | 1 | 1 |\n| not noted | 1 | 3 |" in page


def test_a_cell_that_is_slow_in_its_median_is_told_by_name() -> None:
    late, fine, far = CELLS["home-home+relay"], CELLS["lan"], CELLS["sym-home+relay"]
    seen = {
        late.name: summed(late, [Try(Outcome.DIRECT, "quic", False, 9.0, 4.9)]),
        far.name: summed(far, [Try(Outcome.DIRECT, "quic", False, 0.9, 12.5)]),
        fine.name: summed(fine, [Try(Outcome.DIRECT, "tcp", False, 0.1, 0.1)]),
    }
    page = report.page(seen)
    assert "2 of them [slower" in page
    told = page.partition("## Slower than the goals")[2].partition("\n## ")[0]
    assert "| `home-home+relay` | 9.00 / 9.00 s **(too long)** | 4.90 / 4.90 s  |" in told
    assert "| `sym-home+relay` | 0.90 / 0.90 s  | 12.50 / 12.50 s **(too long)** |" in told
    assert "`lan`" not in told
    quick = report.page({fine.name: seen[fine.name]})
    assert "none of them [slower" in quick
    assert "None of the cells tried has a median beyond 2 s" in quick


def test_the_page_is_that_of_what_was_seen() -> None:
    assert report.PAGE.read_text() == report.page(load())


def test_a_guess_may_miss_now_and_then_and_nothing_else_may() -> None:
    direct, relayed = Try(Outcome.DIRECT), Try(Outcome.RELAYED)
    for name, good in (("sym-home+relay", True), ("home-home+relay", False)):
        cell = CELLS[name]
        assert summed(cell, [direct] * 19 + [relayed]).is_good(cell) is good
    assert not Seen().is_good(CELLS["lan"])
