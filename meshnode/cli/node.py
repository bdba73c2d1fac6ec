"""`mesh worker`, `mesh serve` and `mesh relay`: a node in the foreground, until Ctrl-C."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import trio

from meshnode.cli.engine import ensure_engine
from meshnode.cli.logs import LOG_NAME, log_to
from meshnode.cli.prompt import DEFAULT_ACCEPT_WAIT_S, follow_pasted_codes, is_at_terminal
from meshnode.cli.settings import (
    DEFAULT_HTTP,
    TURN_PASSWORD_VARIABLE,
    Invocation,
    balanced_option,
    choose_split,
    for_option,
    home_option,
    measure_option,
    offline_option,
    portmap_option,
    read_settings,
    read_turn,
    refuse_beyond,
    stun_option,
)
from meshnode.cli.signals import run_until_signal
from meshnode.cli.sources import begin_slice
from meshnode.cli.views import choose_view
from meshnode.config import (
    DEFAULT_CTX_TOKENS,
    DEFAULT_PULL_SOURCES,
    Address,
    LendConfig,
    NodeConfig,
    Objective,
    SandboxMode,
    ServeConfig,
    Split,
    WireType,
    parse_address,
    parse_duration,
    parse_pull_sources,
    parse_servers,
    parse_size,
    parse_transports,
)
from meshnode.descriptors import raise_open_files
from meshnode.engine.children import PARENT_FD_VARIABLE
from meshnode.errors import UsageError
from meshnode.events import Emit, Event, Kind
from meshnode.models.fetching import FROM_MEMBERS
from meshnode.models.pull.reference import parse_reference
from meshnode.models.web import is_reference
from meshnode.node import Node
from meshnode.state import Home, default_home
from tunnels.kinds import Kinds
from tunnels.link import LINK_KINDS

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _common_options(command: _Command) -> _Command:
    """The options of all three commands, last one first."""
    folder = click.Path(path_type=Path)
    for decorate in (
        click.option("--log-format", type=click.Choice(["auto", "plain", "json"]), default="auto"),
        home_option,
        click.option("--name", help="What other nodes call this one (default: the host's name)."),
        click.option("--listen", default=None, help="HOST:PORT for peers (default: any, stable)."),
        click.option(
            "--tcp",
            type=click.IntRange(1, 65535),
            metavar="PORT",
            help="Listen on this TCP port too, like 443: some networks let nothing else out.",
        ),
        click.option("--transport", default="auto", help="Links to use, like tcp,quic (auto)."),
        click.option(
            "--mdns/--no-mdns",
            default=True,
            help="Announce this node on the local network, and find members there.",
        ),
        stun_option,
        click.option(
            "--turn",
            metavar="turn:HOST:PORT,USER",
            help="A TURN server for WebRTC links; ?transport=udp, tcp or tls before the user.",
        ),
        click.option(
            "--turn-password-file",
            type=folder,
            help=f"Holds the password for --turn (default: ${TURN_PASSWORD_VARIABLE}).",
        ),
        offline_option,
        click.option(
            "--wait-accept",
            metavar="TIME",
            help="How long to wait for `mesh accept` where the inviter cannot be reached, like 10m "
            "(default: that, at a terminal).",
        ),
        portmap_option,
        click.option("--join-file", multiple=True, type=folder, help="File that holds a token."),
        click.option("--join", multiple=True, help="Invite token; - reads standard input."),
        click.argument("settings", nargs=-1, metavar="[join=TOKEN]..."),
    ):
        command = decorate(command)
    return command


def _node_options(command: _Command) -> _Command:
    """The options of those that compute, last one first."""
    folder = click.Path(path_type=Path)
    for decorate in (
        click.option("--relay", is_flag=True, help="Carry other members' traffic too."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads of the engine."),
        click.option("--device", help="Devices to lend, by name, with commas between."),
        click.option("--memory", help="Memory to lend at most, like 12G."),
        click.option(
            "--sandbox",
            type=click.Choice([mode.value for mode in SandboxMode]),
            help="Confine what computes for others: wholly, as far as possible (auto), not.",
        ),
        click.option(
            "--allow-pull",
            metavar="hub,url,peers",
            help="Where others may have this worker fetch models from (hub,peers).",
        ),
        click.option(
            "--pull-limit",
            metavar="SIZE",
            help="What models may take up here in all, once others have this worker fetch some, "
            "like 200G (what leaves a tenth of the disk, 10G at most).",
        ),
        click.option(
            "--upload-limit",
            metavar="SIZE",
            help="What other members may take of models from here a second, like 10M (no limit).",
        ),
        click.option("--models", multiple=True, type=folder, help="Folder with GGUF files."),
        measure_option,
        _common_options,
    ):
        command = decorate(command)
    return command


@click.command()
@click.option("--http", default=None, help="HOST:PORT at which it answers for its models (none).")
@_node_options
@click.pass_obj
def worker(invocation: Invocation, /, **options: Any) -> None:
    """Lend this machine's memory and devices to the mesh."""
    node_config, bare_rpc = _node_config(options, invocation)
    if bare_rpc:
        raise UsageError("rpc=HOST:PORT is for `mesh serve`")
    http = _http_address(options["http"]) if options["http"] else None
    if node_config.offline:
        refuse_beyond((), http)
    lend = replace(_lend_config(options), http=http)
    _run(Launch(node_config, lend, None), options["log_format"])


def _http_address(text: str) -> Address:
    http = parse_address(text, what="--http")
    return Address(http.host or "0.0.0.0", http.port)  # noqa: S104 - as the user asked


@click.command()
@click.option(
    "--model",
    help="GGUF file, name of a model in --models, or hf:…, https:…, ollama:… (default: the demo).",
)
@click.option("--http", default=DEFAULT_HTTP, help="HOST:PORT of the chat endpoint.")
@click.option("--ctx", type=click.IntRange(64), help=f"Context tokens ({DEFAULT_CTX_TOKENS}).")
@click.option("--layers", help="Layers by node, like local=0:3,tower=4:output.")
@click.option("--tensor-split", help="Shares by node, like 1,3.")
@click.option("--split", type=click.Choice([split.value for split in Split]), default=None)
@for_option
@balanced_option
@click.option(
    "--speculate",
    default=ServeConfig.speculate,
    show_default=True,
    metavar="auto|ngram|FILE|off",
    help="Guess ahead, for several tokens a trip: by repetition, or with a draft model.",
)
@click.option(
    "--wire-dtype",
    type=click.Choice([one.value for one in WireType]),
    default=WireType.EXACT.value,
    show_default=True,
    help="What crosses between machines: exact numbers, halves or a quarter of them.",
)
@click.option("--lend", is_flag=True, help="Be a worker for others too.")
@_node_options
@click.pass_obj
def serve(invocation: Invocation, /, **options: Any) -> None:
    """Serve a model over the mesh's machines as an OpenAI-compatible endpoint.

    What follows a bare -- goes to llama-server as it is.
    """
    _refuse_lending_options(options)
    node_config, bare_rpc = _node_config(options, invocation)
    http = _http_address(options["http"])
    if node_config.offline:
        refuse_beyond(bare_rpc, http)
    objective = options["objective"]
    serve_config = ServeConfig(
        model=options["model"],
        http=http,
        ctx_tokens=options["ctx"],
        layers=options["layers"],
        tensor_split=options["tensor_split"],
        split=choose_split(options),
        objective=Objective(objective) if objective else None,
        bare_rpc=bare_rpc,
        engine_options=invocation.engine_options,
        threads=options["threads"],
        speculate=options["speculate"],
        wire_type=WireType(options["wire_dtype"]),
    )
    lend = _lend_config(options) if options["lend"] else None
    _run(Launch(node_config, lend, serve_config), options["log_format"])


def _refuse_lending_options(options: dict[str, Any]) -> None:
    """A limit on what is lent must not be taken for a limit on what is used here."""
    for option in ("memory", "device", "sandbox", "allow_pull", "pull_limit"):
        if options[option] and not options["lend"]:
            name = option.replace("_", "-")
            raise UsageError(
                f"--{name} says what is lent to others: add --lend, or leave it out "
                "(--layers and --tensor-split say what is computed here)"
            )


@click.command()
@_common_options
@click.pass_obj
def relay(invocation: Invocation, /, **options: Any) -> None:
    """Carry the traffic of members that cannot reach each other.

    It cannot read what it carries. Run it where the others reach it: no engine, no models.
    """
    node_config, bare_rpc = _node_config({**options, "relay": True, "models": ()}, invocation)
    if bare_rpc:
        raise UsageError("rpc=HOST:PORT is for `mesh serve`")
    _run(Launch(node_config, None, None), options["log_format"])


@dataclass(frozen=True)
class Launch:
    """Everything a node is told at its start."""

    node: NodeConfig
    lend: LendConfig | None
    serve: ServeConfig | None


def _node_config(
    options: dict[str, Any], invocation: Invocation
) -> tuple[NodeConfig, tuple[Address, ...]]:
    joins, bare_rpc = read_settings(
        options["settings"],
        join=options["join"],
        join_file=options["join_file"],
        join_text=invocation.join_text,
    )
    listen, transports = options["listen"], parse_transports(options["transport"], LINK_KINDS)
    _refuse_unused(options, transports)
    config = NodeConfig(
        home=options["home"],
        name=options["name"],
        listen=parse_address(listen, what="--listen") if listen else None,
        transports=transports,
        joins=joins,
        model_folders=options["models"],
        accept_wait_s=_accept_wait_s(options["wait_accept"]),
        mdns=options["mdns"],
        relays=options["relay"],
        tcp_port=options["tcp"],
        portmap=options["portmap"],
        stun=parse_servers(options["stun"]),
        turn=read_turn(options["turn"], options["turn_password_file"]),
        offline=options["offline"],
        measures=options.get("measure", False),
        upload_bytes_per_s=parse_size(limit) if (limit := options.get("upload_limit")) else None,
    )
    return config, bare_rpc


def _refuse_unused(options: dict[str, Any], transports: tuple[str, ...]) -> None:
    """What is asked for must not be left out in silence."""
    made = Kinds(transports or LINK_KINDS).made
    named = f"--transport {options['transport']}"
    if options["tcp"] and "tcp" not in made:
        raise UsageError(
            f"--tcp {options['tcp']} opens a port for TCP, which {named} leaves out: add tcp "
            "there, or leave --tcp out"
        )
    if options["turn"] and "webrtc" not in made:
        raise UsageError(
            f"--turn is for WebRTC links, which {named} leaves out: add webrtc there, or leave "
            "--turn out"
        )


def _accept_wait_s(given: str | None) -> int:
    if given is None:
        return DEFAULT_ACCEPT_WAIT_S if is_at_terminal() else 0
    return parse_duration(given)


def _lend_config(options: dict[str, Any]) -> LendConfig:
    allowed = options["allow_pull"]
    return LendConfig(
        memory_bytes=parse_size(options["memory"]) if options["memory"] else None,
        devices=tuple(options["device"].split(",")) if options["device"] else (),
        threads=options["threads"],
        sandbox=SandboxMode(options["sandbox"] or SandboxMode.AUTO.value),
        allow_pull=DEFAULT_PULL_SOURCES if allowed is None else parse_pull_sources(allowed),
        pull_limit_bytes=parse_size(limit) if (limit := options["pull_limit"]) else None,
    )


def _run(launch: Launch, log_format: str) -> None:
    raise_open_files()
    with Home(launch.node.home or default_home()) as home:
        log_to(home.subfolder("logs") / LOG_NAME)
        computes = launch.lend or launch.serve
        engine = ensure_engine(offline=launch.node.offline) if computes else None
        view = choose_view(log_format)
        serve = launch.serve and begin_model(home, launch.node, launch.serve, view.emit)
        node = Node(home, launch.node, lend=launch.lend, serve=serve, engine=engine, emit=view.emit)
        trio.run(
            run_until_signal,
            node.run,
            lambda: view.run(node.status),
            lambda: follow_pasted_codes(node.accept),
            _until_our_parent_ends,
        )


def begin_model(home: Home, node: NodeConfig, serve: ServeConfig, emit: Emit) -> ServeConfig:
    """Of a model that is named by its source, the header at least is here before a node starts: it
    is then served by its slice's path."""
    if serve.model is not None and serve.model.lower().startswith(FROM_MEMBERS):
        raise UsageError(
            f"{serve.model}: only a running node knows what members have: pull it first (`mesh "
            "worker join=…`, and beside it `mesh pull mesh:NAME`), then serve it by its path"
        )
    if serve.model is None or not is_reference(serve.model):
        return serve
    source = str(parse_reference(serve.model))
    emit(Event(Kind.NODE, f"reading the header of {source}", {"source": source}))
    part = begin_slice(home.subfolder("models"), serve.model, offline=node.offline)
    return replace(serve, model=str(part.facts.path), source=serve.model)


async def _until_our_parent_ends() -> None:
    """Returns at the end of the inherited pipe: whoever started us (the demo, a test) is gone."""
    parent_fd = os.environ.get(PARENT_FD_VARIABLE, "")
    if parent_fd.isdecimal():
        await trio.lowlevel.wait_readable(int(parent_fd))
    else:
        await trio.sleep_forever()
