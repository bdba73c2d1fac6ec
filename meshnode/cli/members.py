"""`mesh invites`, `revoke`, `members`, `remove`, `leave`: who is in a mesh, and who is not.

The running node answers; where none runs on the home, the command does the work there itself, and
the other members hear of it when the node runs next.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from meshnode.administration import Administration
from meshnode.cli.settings import home_option
from meshnode.cli.shown import shown_cell
from meshnode.control import NoNode, ask_node
from meshnode.errors import HomeError
from meshnode.joining import Joining
from meshnode.membership import Membership
from meshnode.state import Home, HomeInUse, default_home, is_home

PATIENCE_S = 10.0
LOOK_AGAIN_S = 0.2

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object.")
Answer = Mapping[str, Any]


def ask(home: Path | None, request: Mapping[str, Any]) -> Answer:
    """The running node's answer, or, where none runs, the same done on the home itself.

    A node that starts or stops has the home and does not answer yet, or any more: it is waited for,
    as is another such command.
    """
    folder = home or default_home()
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask_node(folder, request)
        except NoNode:
            if not is_home(folder):
                raise
        try:
            return _answer_on(folder, request)
        except HomeInUse:
            if time.monotonic() > give_up_at:
                raise HomeError(
                    f"the node on {folder} starts or stops, and does not answer: try again when it "
                    "has told that it listens"
                ) from None
        time.sleep(LOOK_AGAIN_S)


def _answer_on(folder: Path, request: Mapping[str, Any]) -> Answer:
    with Home(folder) as opened:
        membership = Membership(opened, opened.identity("node.key"), "this node")
        return Administration(membership, Joining(membership.ledger), lambda: ()).answer(request)


def _show(answer: Answer, as_json: bool, text: Callable[[Answer], str]) -> None:
    click.echo(json.dumps(answer) if as_json else text(answer))


@click.command()
@home_option
@json_option
def invites(home: Path | None, as_json: bool) -> None:
    """List the invites that this node has given out."""
    _show(ask(home, {"op": "invites"}), as_json, _invites_text)


@click.command()
@click.argument("invite_id", metavar="ID")
@home_option
@json_option
def revoke(invite_id: str, home: Path | None, as_json: bool) -> None:
    """Withdraw an invite: nobody joins by it any more."""
    _show(ask(home, {"op": "revoke", "id": invite_id}), as_json, _revoked_text)


@click.command()
@home_option
@json_option
def members(home: Path | None, as_json: bool) -> None:
    """List the members of this node's meshes."""
    _show(ask(home, {"op": "members"}), as_json, _members_text)


@click.command()
@click.argument("peer", metavar="PEER")
@click.option("--mesh", help="Which mesh, where the peer is in several.")
@home_option
@json_option
def remove(peer: str, mesh: str | None, home: Path | None, as_json: bool) -> None:
    """Put a member out: by name, by id, or by its id's first eight letters."""
    _show(ask(home, {"op": "remove", "peer": peer, "mesh": mesh}), as_json, _removed_text)


@click.command()
@click.argument("mesh", required=False)
@home_option
@json_option
def leave(mesh: str | None, home: Path | None, as_json: bool) -> None:
    """Leave a mesh that this node has joined."""
    _show(ask(home, {"op": "leave", "mesh": mesh}), as_json, _left_text)


# -- what is shown ----------------------------------------------------------------------------


def _invites_text(answer: Answer) -> str:
    rows = [
        (
            invite["id"],
            invite["mesh_name"],
            invite["role"],
            invite["state"],
            f"{invite['uses_left']} of {invite['uses']}",
            _date(invite["expires_at"]),
            ", ".join(joiner["name"] for joiner in invite["redeemed_by"]) or "-",
        )
        for invite in answer["invites"]
    ]
    if not rows:
        return "no invites: `mesh invite` makes one"
    return table(("id", "mesh", "role", "state", "uses left", "expires", "joined"), rows)


def _revoked_text(answer: Answer) -> str:
    lines = [f"the invite {answer['id']} is withdrawn: nobody joins by it any more"]
    stay = [joiner for joiner in answer["redeemed_by"] if joiner["member"]]
    if stay:
        lines.append("who has joined by it stays a member; to put one out, run:")
        lines += [f"mesh remove {joiner['peer']}  # {joiner['name']}" for joiner in stay]
    return "\n".join(lines)


def _members_text(answer: Answer) -> str:
    parts = []
    for mesh in answer["meshes"]:
        rows = [
            (
                member["name"],
                member["peer"][:8],
                member["role"],
                member["invited_by"] or "founder",
                _date(member["expires_at"]),
                _presence(member),
            )
            for member in mesh["members"]
        ]
        titles = ("name", "peer", "role", "invited by", "expires", "last seen")
        parts.append(f"{mesh['name']} ({mesh['mesh'][:8]})\n{table(titles, rows)}")
    return "\n\n".join(parts)


def _presence(member: Mapping[str, Any]) -> str:
    if member["this_node"]:
        return "this node"
    if member["connected"]:
        return "connected"
    return _date(member["last_seen"]) if member["last_seen"] else "never"


def _removed_text(answer: Answer) -> str:
    text = f"{answer['name']} ({answer['peer'][:8]}) is removed from {answer['mesh_name']}"
    lines = [f"{text}; {_told_text(answer)}"]
    if answer["stay"]:
        lines.append(f"whom it invited stays: {', '.join(answer['stay'])}")
    return "\n".join(lines)


def _left_text(answer: Answer) -> str:
    return f"this node has left {answer['mesh_name']}; {_told_text(answer)}"


def _told_text(answer: Answer) -> str:
    """How far it is known: what one member has heard, the others hear from it."""
    told, others = answer["told"], answer["members"]
    if not others:
        return "there are no other members to tell"
    later = "" if told == others else ", the others hear it when they connect"
    return f"{told} of {others} other members are told at once{later}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [tuple(titles), *(tuple(map(shown_cell, row)) for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(titles))]
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in padded)


def _date(moment_s: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment_s))
