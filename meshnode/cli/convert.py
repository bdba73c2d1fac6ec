"""`mesh models convert`: a folder of safetensors made into a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from meshnode.cli.members import json_option
from meshnode.cli.settings import OFFLINE_VARIABLE, home_option
from meshnode.config import human_bytes
from meshnode.engine.patches import read_series
from meshnode.engine.source import named_source, open_source
from meshnode.models.convert import TYPES, Conversion, check, make_environment
from meshnode.models.convert import convert as convert_folder
from meshnode.models.facts import read_facts
from meshnode.state import default_home, subfolder_beside_node


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--type", "kind", type=click.Choice(TYPES), default="auto", help="Of the weights.")
@click.option("--name", help="What to call the model. Default: the folder's name.")
@click.option(
    "--python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One that has torch and transformers. Default: an environment made for it.",
)
@click.option("--trust-code", "runs_code", is_flag=True, help="Run Python code that is in DIR.")
@click.option(
    "--offline/--no-offline",
    envvar=OFFLINE_VARIABLE,
    default=False,
    help="Fetch nothing: convert with what is here, or not at all.",
)
@home_option
@json_option
def convert(
    folder: Path,
    kind: str,
    name: str | None,
    python: Path | None,
    runs_code: bool,
    offline: bool,
    home: Path | None,
    as_json: bool,
) -> None:
    """Make a GGUF file of a model in safetensors, with llama.cpp's own converter.

    The result lies in MESH_HOME/models. Torch and transformers, which it needs, are fetched once
    into an environment of their own.
    """
    wanted = Conversion(folder, name or folder.absolute().name, kind, runs_code)
    check(wanted)
    models = subfolder_beside_node(home or default_home(), "models")
    source = open_source(
        named_source(None),
        read_series().upstream,
        lambda _done, _total, line: _tell(line),
        offline=offline,
    )
    python = python or make_environment(source.tree, _tell, offline=offline)
    made = convert_folder(wanted, source.tree, python, models, _tell)
    if as_json:
        click.echo(json.dumps({"name": wanted.name, "path": str(made)}))
    else:
        click.echo(f"{made}: {human_bytes(read_facts(made).weight_bytes)}")


def _tell(line: str) -> None:
    click.echo(line, err=True)
