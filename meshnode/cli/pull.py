"""`mesh pull`: a model, or some layers of it, onto this machine's disk, or another member's.

From the web it needs no running node; what members have goes through the node on this home.
"""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

from meshnode.cli.members import json_option
from meshnode.cli.models import MODELS_FOLDER
from meshnode.cli.progress import shown_bytes
from meshnode.cli.settings import home_option, offline_option
from meshnode.cli.shown import shown_cell
from meshnode.config import human_bytes
from meshnode.control import NoNode, follow_node
from meshnode.models.fetching import Fetcher, OnProgress
from meshnode.models.proof import UNPROTECTED, is_members, is_unprotected, unproven
from meshnode.models.pull.reference import MeshReference, parse_reference
from meshnode.models.store.store import Store
from meshnode.models.web import Web
from meshnode.pipeline.commission import check_no_secrets
from meshnode.pipeline.pulling import Proof, Puller, Wish
from meshnode.state import default_home, subfolder_beside_node

_PROVEN = {
    Proof.DIGESTS.value: "each tensor was compared with the digest that the model's identity is of",
    Proof.SHA256.value: "all of it was compared with the sha256 that its source names",
}


@click.command()
@click.argument("source")
@click.option("--layers", metavar="FIRST:LAST", help="Some layers only, like 27:52 or 27:output.")
@click.option("--for", "node", metavar="NODE", help="Have another node fetch it, by name or id.")
@offline_option
@home_option
@json_option
def pull(
    source: str,
    layers: str | None,
    node: str | None,
    offline: bool,
    home: Path | None,
    as_json: bool,
) -> None:
    """Fetch a model: hf:org/repo/file.gguf, https://…, ollama:name, or mesh:NAME from members.

    What is here already is not fetched again, and a pull that was cut goes on where it was.
    """
    reference = parse_reference(source)
    folder = (home or default_home()).absolute()
    with shown_bytes("pulling", quiet=as_json) as progress:
        tell = progress or _tell_nobody
        if node is not None:
            source = check_no_secrets(source, node)
        if node is not None or isinstance(reference, MeshReference):
            told = _through_node(folder, {"source": source, "layers": layers, "node": node}, tell)
            told.setdefault("source", source)  # what another node pulled has that alone
        else:
            told = _alone(folder, Wish(source, layers), offline, tell)
    click.echo(json.dumps(told) if as_json else _text(told))
    if _is_open(told) and not as_json:
        click.echo(f"warning: {UNPROTECTED}", err=True)


def _alone(home: Path, wish: Wish, offline: bool, tell: OnProgress) -> dict[str, Any]:
    """From the web, whether or not a node runs on the home."""
    store = Store(subfolder_beside_node(home, MODELS_FOLDER))
    fetcher = Fetcher(store, Web(offline=offline, named=wish.source).open_for_user)
    pulled = trio.run(partial(Puller(fetcher, store).pull, wish, tell))
    return pulled.row()


def _through_node(home: Path, request: dict[str, Any], tell: OnProgress) -> dict[str, Any]:
    try:
        return follow_node(home, {"op": "pull", **request}, tell)
    except NoNode:
        raise NoNode(
            f"no node runs on {home}, and only a running one knows the members: start it with "
            "`mesh worker join=…` and pull again beside it, or name its home with --home"
        ) from None


def _is_open(told: dict[str, Any]) -> bool:
    """Whether nothing stands for its bytes' being the source's."""
    return told["proof"] == Proof.WORD.value and is_unprotected(told["source"])


def _text(told: dict[str, Any]) -> str:
    """What there is then, and what stands for it."""
    fetched = told["pulled_bytes"]
    came = f"{human_bytes(fetched)} came" if fetched else "nothing had to come"
    held = (
        "all of it is"
        if told["complete"]
        else f"{human_bytes(told['held_bytes'])} of {human_bytes(told['weight_bytes'])} are"
    )
    path = told.get("path")  # of what is here
    where = "here" if path else f"on {told['node']}"
    source = told.get("source") or ""
    proof = _PROVEN.get(told["proof"], unproven(source))
    named = shlex.quote(shown_cell(path if is_members(source) else source)) if path else ""
    serve = f"; serve it with: mesh serve --model {named}" if path else ""
    return f"{told['name']}: {came}, {held} {where}{serve}\n{proof}"


def _tell_nobody(_done_bytes: int, _total_bytes: int) -> None:
    """Nobody watches."""
