"""What a node was asked to do: frozen values, and the parsers of the texts they come from.

Sans-IO: nothing here touches the disk, the network or the environment. Every parser raises
`UsageError` with a sentence that names the accepted form.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from discovery.token import Token
from meshnode.errors import UsageError
from tunnels.stun import DEFAULT_PORT, Server
from tunnels.turn import TurnServer

DEFAULT_HTTP_PORT = 8090
DEFAULT_HTTP = f"127.0.0.1:{DEFAULT_HTTP_PORT}"
DEFAULT_CTX_TOKENS = 4096
DEFAULT_INVITE_USES = 8
DEFAULT_INVITE_LIFETIME_S = 24 * 3600
DEFAULT_STUN = "stun.l.google.com:19302,stun.cloudflare.com:3478,stun.nextcloud.com:443"
"""Run by three who have nothing to do with each other; the last is on a port that few block."""
MAX_INVITE_LIFETIME_S = 3650 * 24 * 3600  # ten years

_HOST = re.compile(r"[\w.:-]{1,253}")
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)
_SIZE_FACTORS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DURATION = re.compile(r"(\d{1,18})\s*([smhd])", re.IGNORECASE)
_DURATION_FACTORS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Split(Enum):
    """When a model is spread over nodes."""

    AUTO = "auto"  # only when the orchestrator cannot hold it alone
    ALWAYS = "always"
    NEVER = "never"


class Objective(Enum):
    """What a plan is to be best at."""

    LATENCY = "latency"  # the tokens of one answer follow each other fast
    THROUGHPUT = "throughput"  # many requests at once are done soon, prompts included
    MEMORY = "memory"  # every machine gives the same part of what it has


class WireType(Enum):
    """What activations cross the wire as."""

    EXACT = "f32"  # as they were computed
    F16 = "f16"
    Q8 = "q8"

    @property
    def number_bytes(self) -> float:
        return {"f32": 4.0, "f16": 2.0, "q8": 34 / 32}[self.value]


class PullSource(Enum):
    """Where a worker fetches its part of a model from, when an orchestrator asks it to."""

    HUB = "hub"  # Hugging Face and Ollama's registry
    URL = "url"  # any web server
    PEERS = "peers"  # other members that have it


DEFAULT_PULL_SOURCES = frozenset((PullSource.HUB, PullSource.PEERS))


class SandboxMode(Enum):
    """Whether a worker's rpc-servers must be confined."""

    REQUIRE = "require"  # wholly, or the worker does not start
    AUTO = "auto"  # as far as this system can, which the worker says
    OFF = "off"


@dataclass(frozen=True)
class Address:
    """A host and port to bind or to reach; `host` None means every interface."""

    host: str | None
    port: int

    def __str__(self) -> str:
        host = self.host or "*"
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


@dataclass(frozen=True)
class NodeConfig:
    """What `mesh worker`, `mesh serve` and `mesh relay` have in common."""

    home: Path | None = None
    name: str | None = None
    listen: Address | None = None  # None: every interface, the port of last time
    transports: tuple[str, ...] = ()  # kinds of links to peers; none: whichever is best
    joins: tuple[Token, ...] = ()
    model_folders: tuple[Path, ...] = ()
    accept_wait_s: int = 0  # for a reply code to be carried to an inviter that cannot be reached
    mdns: bool = True  # announced on the local network, and members followed there
    relays: bool = False  # members' traffic is carried; else introductions alone
    tcp_port: int | None = None  # a second one, for networks that let out nothing else
    portmap: bool = True  # the router is asked to forward our port
    stun: tuple[Server, ...] = ()  # asked, beside members, how this node looks from outside
    turn: TurnServer | None = None  # carries WebRTC links where nothing else gets through
    offline: bool = False  # no packet leaves the networks that this machine is in
    upload_bytes_per_s: float | None = None  # of models to members, all together; None: no limit
    measures: bool = True  # how fast its devices and links are, for plans


@dataclass(frozen=True)
class LendConfig:
    """What a worker lends. `memory_bytes` None: what is free, less a reserve. `http`: where it
    answers for its models, if anywhere; a node that serves has a place for that already."""

    memory_bytes: int | None = None
    devices: tuple[str, ...] = ()
    threads: int | None = None
    sandbox: SandboxMode = SandboxMode.AUTO
    allow_pull: frozenset[PullSource] = DEFAULT_PULL_SOURCES
    pull_limit_bytes: int | None = None  # of models in the home, once others have it pull
    http: Address | None = None


@dataclass(frozen=True)
class ServeConfig:
    """What an orchestrator serves. `model` None: the demo model. `source`: where the rest of it
    comes from, as the user wrote it, which may hold a secret."""

    model: str | None = None
    source: str | None = field(default=None, repr=False)
    http: Address = Address("127.0.0.1", DEFAULT_HTTP_PORT)
    ctx_tokens: int | None = None  # None: DEFAULT_CTX_TOKENS
    layers: str | None = None
    tensor_split: str | None = None
    split: Split | None = None
    objective: Objective | None = None
    bare_rpc: tuple[Address, ...] = ()
    engine_options: tuple[str, ...] = ()
    threads: int | None = None
    wire_type: WireType = WireType.EXACT
    speculate: str = "off"  # auto, ngram, off, or a draft model's file or name


def parse_size(text: str) -> int:
    """Bytes in `12G`, `800M`, `1.5GiB` or a bare count of bytes; powers of 1024."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise UsageError(f"{text!r} is not a size: write it like 12G, 800M or 1.5G")
    size_bytes = int(float(found[1]) * _SIZE_FACTORS[found[2].upper()])
    if size_bytes <= 0:
        raise UsageError(f"{text!r} is nothing at all: write a size like 12G")
    return size_bytes


def parse_duration(text: str) -> int:
    """Seconds in `90s`, `30m`, `2h`, `7d`; ten years (3650d) at most."""
    found = _DURATION.fullmatch(text.strip())
    if not found or int(found[1]) == 0:
        raise UsageError(f"{text!r} is not a duration: write it like 30m, 2h or 7d")
    duration_s = int(found[1]) * _DURATION_FACTORS_S[found[2].lower()]
    if duration_s > MAX_INVITE_LIFETIME_S:
        raise UsageError(f"{text!r} is too long a time: write at most 3650d, ten years")
    return duration_s


def parse_address(text: str, *, what: str) -> Address:
    """`HOST:PORT`, `[V6]:PORT`, `:PORT` (every interface) or a bare port."""
    host, separator, port_text = text.rpartition(":")
    if not separator:
        host, port_text = "", text
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(f"{what} {text!r}: put an IPv6 address in brackets, like [::1]:8090")
    # Nine digits: of thousands Python makes no number.
    if not port_text.isdecimal() or len(port_text) > 9 or int(port_text) > 65535:
        raise UsageError(f"{what} {text!r} has no port from 0 to 65535: write it as HOST:PORT")
    return Address(None if host in ("", "*") else host, int(port_text))


def parse_pull_sources(text: str) -> frozenset[PullSource]:
    """Sources in `hub,url,peers`; nothing for `none`."""
    names = {name.strip().lower() for name in text.split(",")}
    if names == {"none"}:
        return frozenset()
    if not names <= {source.value for source in PullSource}:
        kinds = ", ".join(source.value for source in PullSource)
        raise UsageError(
            f"--allow-pull {text!r}: name some of {kinds} with commas between; or none"
        )
    return frozenset(map(PullSource, names))


def parse_transports(text: str, known: Collection[str]) -> tuple[str, ...]:
    """Kinds of links in `tcp,quic`, each once; nothing for `auto`."""
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",")))
    if names == ("auto",):
        return ()
    if not set(names) <= set(known):
        kinds = ", ".join(known)
        raise UsageError(
            f"--transport {text!r}: name kinds of links with commas between, of {kinds}; or auto"
        )
    return names


def parse_servers(text: str) -> tuple[Server, ...]:
    """STUN servers in `HOST:PORT,HOST`, each once; nothing for `none`."""
    if text.strip().lower() == "none":
        return ()
    servers = []
    for one in text.split(","):
        name = one.strip()
        address = parse_address(name if ":" in name else f"{name}:{DEFAULT_PORT}", what="--stun")
        if address.host is None or not address.port or not _HOST.fullmatch(address.host):
            raise UsageError(f"--stun {one!r}: name servers as HOST:PORT,HOST:PORT; or none")
        servers.append(Server(address.host, address.port))
    return tuple(dict.fromkeys(servers))


def human_bytes(size_bytes: float) -> str:
    """`12.3 GiB` and the like: three significant digits, powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def human_duration(seconds: float) -> str:
    """In the two largest units that say something. A clock set back makes it nothing."""
    seconds = max(seconds, 0)
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"
