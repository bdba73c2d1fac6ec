"""Arguments of `mesh worker` and `mesh serve` as the shell gives them, made into configurations.

Beside options these commands take `key=value` settings (`join=TOKEN`, `rpc=HOST:PORT`), and
`serve` hands what follows a bare `--` to llama-server as it is.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from discovery.token import BadToken, Token, parse_untrusted
from meshnode.config import DEFAULT_STUN, Address, Objective, ServeConfig, Split, parse_address
from meshnode.errors import AccessError, UsageError
from tunnels.network import HostNetwork
from tunnels.turn import TurnServer, parse_turn

MAX_TOKEN_FILE_BYTES = 64 * 1024
JOIN_VARIABLE = "MESH_JOIN"
OFFLINE_VARIABLE = "MESH_OFFLINE"
"""Set to 1, it is `--offline` for every node that is started, and for what builds an engine."""
MEASURE_VARIABLE = "MESH_MEASURE"
"""Set to 0, it is `--no-measure` for every node that is started."""
TURN_PASSWORD_VARIABLE = "MESH_TURN_PASSWORD"  # noqa: S105 - its name
MAX_PASSWORD_FILE_BYTES = 4096
DEFAULT_HTTP = str(ServeConfig.http)


def _checked_home(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> Path | None:
    if text == "":  # --home "$UNSET" must not make the current folder a home
        raise UsageError("--home is empty: name a folder, or leave it out")
    return None if text is None else Path(text)


home_option = click.option(
    "--home", callback=_checked_home, default=None, help="Folder of the node's state (MESH_HOME)."
)


stun_option = click.option(
    "--stun",
    default=DEFAULT_STUN,
    show_default=True,
    metavar="HOST:PORT,...",
    help="Servers that tell this node how it looks from outside; or none.",
)
portmap_option = click.option(
    "--portmap/--no-portmap",
    default=True,
    help="Ask the router to forward this node's port (PCP, NAT-PMP, UPnP).",
)
offline_option = click.option(
    "--offline/--no-offline",
    envvar=OFFLINE_VARIABLE,
    default=False,
    help="Send no packet beyond the networks that this machine is in.",
)
measure_option = click.option(
    "--measure/--no-measure",
    envvar=MEASURE_VARIABLE,
    default=True,
    help="Measure how fast this machine's devices and links are, so that plans can go by speed.",
)
for_option = click.option(
    "--for",
    "objective",
    type=click.Choice([one.value for one in Objective]),
    help="What to be best at: one answer's speed, many requests at once, an even use of memory.",
)
balanced_option = click.option(
    "--balanced", is_flag=True, help="Over all machines, in proportion to memory."
)


@dataclass(frozen=True)
class Invocation:
    """What click does not parse: what followed a bare `--`, and the token in MESH_JOIN."""

    engine_options: tuple[str, ...] = ()
    join_text: str = field(default="", repr=False)


def take_invocation(arguments: Sequence[str]) -> tuple[list[str], Invocation]:
    """The arguments that click parses, and the rest of the invocation.

    MESH_JOIN leaves the environment here: what we start (pip, cmake, compilers) would inherit it.
    Raises `UsageError` where a command other than `serve` is given options for llama-server.
    """
    join_text = os.environ.pop(JOIN_VARIABLE, "")
    listed = list(arguments)
    cut = listed.index("--") if "--" in listed else len(listed)
    own, engine_options = listed[:cut], tuple(listed[cut + 1 :])
    if engine_options and own[:1] != ["serve"]:
        raise UsageError(
            "options after a bare -- are llama-server's, which only `mesh serve` starts: give "
            "them there, or leave them out"
        )
    return own, Invocation(engine_options, join_text)


def read_settings(
    settings: Sequence[str], *, join: Sequence[str], join_file: Sequence[Path], join_text: str = ""
) -> tuple[tuple[Token, ...], tuple[Address, ...]]:
    """Tokens and bare rpc-servers named on the command line, in files, or else in `join_text`.

    Raises `UsageError` for an unknown setting and `AccessError` for a text that is no token.
    """
    texts = list(join)
    bare_rpc = []
    for setting in settings:
        key, separator, value = setting.partition("=")
        if key == "join" and separator:
            texts.append(value)
        elif key == "rpc" and separator:
            address = parse_address(value, what="rpc=")
            if address.host is None or address.port == 0:
                raise UsageError(f"rpc={value!r} needs a host and a port, like rpc=10.0.0.5:50052")
            bare_rpc.append(address)
        else:
            shown = key if separator else _shorten(setting)
            raise UsageError(
                f"{shown!r} is not a setting: known are join=TOKEN and rpc=HOST:PORT "
                "(options begin with --; llama-server's own follow a bare --)"
            )
    texts += [_read_token_file(path) for path in join_file]
    if not texts and join_text:
        texts.append(join_text)
    if texts.count("-") > 1:
        raise UsageError("join=- reads one token from standard input, so give it once")
    tokens = [_parse(_read_stdin_token() if text == "-" else text) for text in texts]
    return tuple(tokens), tuple(bare_rpc)


def choose_split(options: Mapping[str, Any]) -> Split | None:
    """--split, or what --balanced stands for. Raises `UsageError` where both are given."""
    if not options["balanced"]:
        return Split(options["split"]) if options["split"] else None
    for option in ("split", "layers", "tensor_split", "objective"):
        if options[option]:
            name = "for" if option == "objective" else option.replace("_", "-")
            raise UsageError(f"--balanced and --{name} exclude each other: drop one")
    return Split.ALWAYS


def refuse_beyond(bare_rpc: Sequence[Address], http: Address | None) -> None:
    """Of a node that is to stay within this machine's networks. A name would have to be looked up.
    Raises UsageError."""
    network = HostNetwork()
    for address in bare_rpc:
        if not _is_literal(address.host) or not network.is_near(address.host or ""):
            raise UsageError(
                f"rpc={address} may lie beyond this machine's networks, and no packet may leave "
                "them: name an address within, or leave out --offline (MESH_OFFLINE)"
            )
    if http and http.host not in (None, "localhost") and not _is_literal(http.host):
        raise UsageError(
            f"--http {http}: no name is looked up offline: use an address of this machine, or "
            "leave out --offline (MESH_OFFLINE)"
        )


def _is_literal(host: str | None) -> bool:
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return True


def _parse(text: str) -> Token:
    try:
        return parse_untrusted(text)
    except BadToken as error:
        raise AccessError(str(error)) from None


def _read_token_file(path: Path) -> str:
    try:
        with path.open("r", encoding="ascii", errors="replace") as file:
            return file.read(MAX_TOKEN_FILE_BYTES)
    except OSError as error:
        raise AccessError(f"the token file {path} cannot be read: {error.strerror}") from None


def read_turn(text: str | None, password_file: Path | None) -> TurnServer | None:
    """What --turn names. A password in the environment is taken out of it: what this node starts
    shall not inherit it. Raises UsageError, AccessError."""
    password = os.environ.pop(TURN_PASSWORD_VARIABLE, "")
    if text is None:
        return None
    if password_file is not None:
        try:
            with password_file.open("r", encoding="utf-8", errors="replace") as file:
                password = file.read(MAX_PASSWORD_FILE_BYTES)
        except OSError as error:
            raise AccessError(f"{password_file} cannot be read: {error.strerror}") from None
    try:
        return parse_turn(text, password.strip())
    except ValueError as error:
        remedy = "" if password else f"; set {TURN_PASSWORD_VARIABLE}, or --turn-password-file"
        raise UsageError(f"--turn: {error}{remedy}") from None


def _read_stdin_token() -> str:
    try:
        # Closed by whoever started us (`<&-`): Python then has no stdin at all.
        text = sys.stdin.readline(MAX_TOKEN_FILE_BYTES) if sys.stdin else ""
    except (OSError, ValueError):  # a folder, or bytes that are no text
        text = ""
    if not text.strip():
        raise AccessError("join=- found no token on standard input: paste it, then press Enter")
    return text


def _shorten(text: str) -> str:
    """A pasted token may stand here by mistake: show too little of it to be of use."""
    return text if len(text) <= 16 else text[:8] + "…"
