"""`mesh peers`, `mesh ping`: how other nodes are reached, and how far away they are."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from meshnode.cli.members import json_option, table
from meshnode.cli.settings import home_option
from meshnode.cli.views import bytes_text, loss_text, ms_text, path_text
from meshnode.config import human_duration
from meshnode.control import ask_node
from meshnode.errors import NetworkError
from meshnode.state import default_home

DEFAULT_ROUNDS = 4
MAX_ROUNDS = 1000
PAUSE_S = 0.5  # a peer takes offence at more than ten pings a second on a link
TITLES = ("name", "peer", "link", "address", "path", "RTT", "jitter", "loss", "received", "sent")

Row = Mapping[str, Any]


@click.command()
@home_option
@json_option
def peers(home: Path | None, as_json: bool) -> None:
    """List the nodes that are connected: by which link, how far away, since when."""
    answer = ask_node(home or default_home(), {"op": "peers"})
    click.echo(json.dumps(answer) if as_json else _peers_text(answer["peers"], time.time()))


def _peers_text(rows: Sequence[Row], now: float) -> str:
    if not rows:
        return "no node is connected: `mesh members` lists who belongs to this node's meshes"
    return table((*TITLES, "for"), [cells for row in rows for cells in _cells(row, now)])


def _cells(row: Row, now: float) -> Iterator[tuple[str, ...]]:
    """A line for the link in use, and one for each that stands by."""
    name = row["name"] if row["member"] else f"{row['name']} (no member)"
    yield (name, row["peer"][:8], *_link_cells(row, now))
    for link in row["links"][1:]:
        yield ("", "", *_link_cells(link, now))


def _link_cells(row: Row, now: float) -> tuple[str, ...]:
    return (
        row["link"] or "-",
        row["address"] or "-",
        _path_cell(row),
        ms_text(row["smoothed_rtt_ms"]),
        ms_text(row["jitter_ms"]),
        loss_text(row["loss"]),
        bytes_text(row["bytes_in"]),
        bytes_text(row["bytes_out"]),
        human_duration(now - row["since"]),
    )


def _path_cell(row: Row) -> str:
    """Figures of a path are of when it was heard: of one that is silent that is said with it."""
    if not row["suspected"]:
        return path_text(row)
    silent_s = row.get("silent_s")  # of the peer, over all links
    silence = "silent" if silent_s is None else f"silent for {silent_s:.0f} s"
    return f"{path_text(row)}, {silence}" if row["link"] else silence


@click.command()
@click.argument("peer", metavar="PEER")
@click.option("-c", "--count", "rounds", type=click.IntRange(1, MAX_ROUNDS), default=DEFAULT_ROUNDS)
@home_option
@json_option
def ping(peer: str, rounds: int, home: Path | None, as_json: bool) -> None:
    """Measure round trips to a node, over each link to it.

    PEER is its name, its id, or the first letters of its id. Ends with exit code 4 when nothing
    answers.
    """
    answers: list[Row] = []
    for number in range(rounds):
        if number:
            time.sleep(PAUSE_S)
        answer = ask_node(home or default_home(), {"op": "ping", "peer": peer})
        peer = answer["peer"]  # a name may be given to another meanwhile
        answers.append(answer)
        if not as_json:
            click.echo("\n".join(_round_lines(answer, number + 1)))
    summary = [_summary(path, took) for path, took in _by_path(answers)]
    name = answers[-1]["name"]
    if as_json:
        click.echo(json.dumps({"name": name, "peer": peer, "rounds": rounds, "links": summary}))
    else:
        click.echo("\n".join(_summary_line(one) for one in summary))
    if not any(one["answered"] for one in summary):
        raise NetworkError(f"{name} ({peer[:8]}) is connected and does not answer: try again")


def _round_lines(answer: Row, number: int) -> Iterator[str]:
    who = f"{answer['name']} ({answer['peer'][:8]})"
    if not answer["links"]:
        yield f"{number}: {who} has no path at the moment"
    for link in answer["links"]:
        took = link["took_ms"]
        said = "no answer" if took is None else ms_text(took)
        where = f"{link['link']} at {link['address']} ({path_text(link)})"
        yield f"{number}: {who} over {where}: {said}"


def _by_path(answers: Sequence[Row]) -> list[tuple[Row, list[float | None]]]:
    """For each link that was seen, what its rounds took."""
    links: dict[tuple[str, str], tuple[Row, list[float | None]]] = {}
    for link in (link for answer in answers for link in answer["links"]):
        _, took = links.setdefault((link["link"], link["address"]), (link, []))
        took.append(link["took_ms"])
    return list(links.values())


def _summary(link: Row, took: Sequence[float | None]) -> dict[str, Any]:
    answered = [one for one in took if one is not None]
    return {
        "link": link["link"],
        "address": link["address"],
        "relayed": link["relayed"],
        "asked": len(took),
        "answered": len(answered),
        "least_ms": min(answered, default=None),
        "mean_ms": round(fmean(answered), 3) if answered else None,
        "most_ms": max(answered, default=None),
    }


def _summary_line(one: Row) -> str:
    where = f"{one['link']} at {one['address']} ({path_text(one)})"
    line = f"{where}: {one['answered']} of {one['asked']} answered"
    if not one["answered"]:
        return line
    times = "/".join(ms_text(one[key])[: -len(" ms")] for key in ("least_ms", "mean_ms", "most_ms"))
    return f"{line}, least/mean/most {times} ms"
