"""`mesh plan`: which nodes would compute which layers, and how fast, without deploying anything."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from meshnode.cli.members import json_option
from meshnode.cli.models import MODELS_FOLDER, folder_option
from meshnode.cli.plan_view import EMPTY, FULL, plan_json, plan_lines
from meshnode.cli.settings import (
    balanced_option,
    choose_split,
    for_option,
    home_option,
    offline_option,
)
from meshnode.cli.sources import begin_slice
from meshnode.config import DEFAULT_CTX_TOKENS, Objective, Split, WireType
from meshnode.control import NoNode, ask_node
from meshnode.engine.abilities import OUTPUT_AT_HOME
from meshnode.engine.build import find_built
from meshnode.engine.devices import Device, cpu_device, list_devices
from meshnode.engine.speed import KEPT_FOLDER, Speeds, is_busy
from meshnode.errors import EngineError, UsageError
from meshnode.models.catalog import Catalog
from meshnode.models.facts import ModelFacts, read_facts
from meshnode.models.shelf import DEMO_MODEL
from meshnode.models.store.slice import Slice, slice_of
from meshnode.models.web import is_reference
from meshnode.pipeline.costs import plan_model
from meshnode.pipeline.holdings import stock_of
from meshnode.pipeline.layers import parse_layers, parse_tensor_split
from meshnode.pipeline.machines import read_machines
from meshnode.pipeline.plan import PlanNode, PlanRequest
from meshnode.pipeline.planner import make_plan
from meshnode.pipeline.predict import predict
from meshnode.pipeline.speeds import Links, Speed
from meshnode.pipeline.stock import Stock
from meshnode.pipeline.survey import local_node
from meshnode.pipeline.what_if import WhatIf, parse_what_if
from meshnode.pipeline.work import work_of
from meshnode.state import default_home, subfolder_beside_node

MAX_FILE_BYTES = 1 << 20
_ASCII = str.maketrans({FULL: "#", EMPTY: "."})


@click.command()
@click.option(
    "--model",
    help="GGUF file, name of a model in --models, or hf:…, https:…, ollama:… (default: the demo).",
)
@folder_option
@home_option
@offline_option
@click.option("--ctx", type=click.IntRange(64), default=DEFAULT_CTX_TOKENS, show_default=True)
@click.option("--parallel", type=click.IntRange(1, 256), default=1, help="Requests at once.")
@for_option
@balanced_option
@click.option("--split", type=click.Choice([split.value for split in Split]), default=None)
@click.option("--layers", help="Layers by node, like local=0:3,tower=4:output.")
@click.option("--tensor-split", help="Shares by node, like 1,3.")
@click.option("--nodes", help="Only these workers, by name, with commas between.")
@click.option(
    "--wire-dtype",
    type=click.Choice([one.value for one in WireType]),
    default=WireType.EXACT.value,
    help="What crosses between machines.",
)
@click.option(
    "--what-if",
    type=click.Path(path_type=Path),
    metavar="NODES.TOML",
    help="Plan for machines that this file describes.",
)
@json_option
def plan(**options: Any) -> None:
    """Show which machine would compute which layers, how fast, and why.

    Nothing is deployed; of a model on the web the header is fetched. Without --what-if: over this
    machine, whose devices are measured for some seconds at first, or over the mesh of the node that
    runs on this home.
    """
    facts = _facts(options)
    found = _machines(options, facts)
    request = _request(options, facts, found)
    made = make_plan(request)
    prediction = predict(request, made)
    if options["as_json"]:
        click.echo(json.dumps(plan_json(request, made, prediction)))
        return
    text = "\n".join(plan_lines(request, made, prediction))
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    click.echo(text if encoding.startswith("utf") else text.translate(_ASCII))


def _facts(options: Mapping[str, Any]) -> ModelFacts:
    """From the header alone: of a model that is here in part, too, or not at all yet."""
    text: str | None = options["model"]
    if text is None:
        return read_facts(DEMO_MODEL)
    home = options["home"] or default_home()
    if is_reference(text):
        folder = subfolder_beside_node(home.absolute(), MODELS_FOLDER)
        return begin_slice(folder, text, offline=options["offline"]).facts
    own = home / MODELS_FOLDER
    folders = (*([own] if own.is_dir() else []), *options["folders"], DEMO_MODEL.parent)
    catalog = Catalog(folders)
    catalog.scan()
    return read_facts(catalog.resolve(text))


def _machines(options: Mapping[str, Any], facts: ModelFacts) -> WhatIf:
    path = options["what_if"]
    if path is None:
        found = _present(options["home"] or default_home(), slice_of(facts.path))
    else:
        token_bytes = sum(work_of(plan_model(facts)).done)
        found = parse_what_if(_text(path), str(path), token_bytes)
    if options["nodes"] is None:
        return found
    wanted = [name.strip() for name in options["nodes"].split(",")]
    names = [node.name for node in found.nodes]
    for name in wanted:
        if name not in names:
            raise UsageError(f"--nodes names {name!r}: there are {', '.join(names)}")
    chosen = tuple(node for node in found.nodes if node.is_local or node.name in wanted)
    return replace(found, nodes=chosen)


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text in UTF-8") from None
    if len(text) > MAX_FILE_BYTES:
        raise UsageError(f"{path} is longer than {MAX_FILE_BYTES} characters: it is no description")
    return text


def _present(home: Path, part: Slice | None) -> WhatIf:
    """This machine, or the mesh of the node that runs on this home, whose members are asked what
    they hold where the model is only here in part."""
    engine = find_built()
    devices = list_devices(engine) if engine else (cpu_device(),)
    question = {"op": "machines", **({"model": part.identity.provisional} if part else {})}
    try:
        found, is_idle = read_machines(ask_node(home, question)), False
    except NoNode:
        found, is_idle = WhatIf((local_node(devices),), Links(), {}, frozenset()), True
    if engine is None:
        return found
    speeds = Speeds(subfolder_beside_node(home, KEPT_FOLDER), engine)
    measured = {device.name: _speed(speeds, device, is_idle) for device in devices}
    nodes = tuple(_with_speeds(node, measured) if node.is_local else node for node in found.nodes)
    return replace(found, nodes=nodes)


def _speed(speeds: Speeds, device: Device, is_idle: bool) -> Speed | None:
    """Measured now where no node is at work; one that cannot be is not known."""
    try:
        return speeds.speed(device, is_busy=is_busy) if is_idle else speeds.known(device)
    except EngineError:
        return None


def _with_speeds(node: PlanNode, measured: Mapping[str, Speed | None]) -> PlanNode:
    devices = (
        replace(one, measured=one.measured or measured.get(one.name)) for one in node.devices
    )
    return replace(node, devices=tuple(devices))


def _request(options: Mapping[str, Any], facts: ModelFacts, found: WhatIf) -> PlanRequest:
    layers, tensor_split = options["layers"], options["tensor_split"]
    objective, split = options["objective"], choose_split(options) or Split.AUTO
    if options["what_if"] and split is Split.AUTO and not layers and not tensor_split:
        objective = objective or Objective.LATENCY.value  # of imagined speeds as of measured ones
    return PlanRequest(
        model=plan_model(facts),
        nodes=found.nodes,
        ctx_tokens=options["ctx"],
        slots=options["parallel"],
        split=split,
        layers=None if layers is None else parse_layers(layers),
        tensor_split=None if tensor_split is None else parse_tensor_split(tensor_split),
        output_may_stay=OUTPUT_AT_HOME,
        objective=Objective(objective) if objective else None,
        links=found.links,
        storage=found.storage,
        stock=_stock(facts, found),
        wire_bytes=WireType(options["wire_dtype"]).number_bytes,
    )


def _stock(facts: ModelFacts, found: WhatIf) -> Stock | None:
    """What is on whose disk; None: all that is asked for. A description says who has the model; of
    a slice it is known what is here, and what members say that they hold."""
    if found.storage:
        if not found.without_model:
            return None
        everything = frozenset(tensor.name for tensor in facts.tensors)
        names = {node.name for node in found.nodes} - found.without_model
        return Stock(facts, dict.fromkeys(names, everything), _local_name(found))
    part = slice_of(facts.path)
    return stock_of(part, _local_name(found), found.held) if part else None


def _local_name(found: WhatIf) -> str:
    return next(node.name for node in found.nodes if node.is_local)
