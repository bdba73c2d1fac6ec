"""Addresses on the web, as the user wrote them, as they go on the wire and as they may be shown.

What an address carries besides scheme, host and path may be secret: a password before the host, the
signature of a link that is good for an hour behind the question mark. Neither is ever shown, but
for a few queries that are known to be no secret.
"""

from __future__ import annotations

import base64
import ipaddress
from dataclasses import dataclass, field, replace
from urllib.parse import quote, unquote, urljoin, urlsplit

from meshnode.errors import UsageError

_PORTS = {"http": 80, "https": 443}
_SAFE = "/%:@!$&'()*+,;=~-._?[]"
_HIDDEN = "…"
_HARMLESS = frozenset(("download", "download=1", "download=true"))
"""What pages add to links they offer (Hugging Face's do): no secret, and part of the address."""


@dataclass(frozen=True)
class Origin:
    """Whom a secret may be told: scheme, host in lower case (IDNA), port."""

    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them."""
        host, _, port = self.authority_with_port.rpartition(":")
        return host if self.port == _PORTS[self.scheme] else f"{host}:{port}"

    @property
    def authority_with_port(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Url:
    """One address. `authorization` is the value of the header that its user and password make."""

    origin: Origin
    path: str
    query: str = field(default="", repr=False)
    authorization: str | None = field(default=None, repr=False)

    @property
    def target(self) -> str:
        """What the first line of a request asks for."""
        return f"{self.path}?{self.query}" if self.query else self.path

    @property
    def shown(self) -> str:
        query = self.query if self.query in _HARMLESS else self.query and _HIDDEN
        end = f"?{query}" if query else ""
        return f"{self.origin.scheme}://{self.origin.authority}{self.path}{end}"

    @property
    def is_secret(self) -> bool:
        """Whether it carries what `shown` leaves out."""
        return self.authorization is not None or self.query not in {"", *_HARMLESS}

    @property
    def is_curtailed(self) -> bool:
        """Whether it was made from what is shown of an address, so that its query is lost."""
        return self.query == quote(_HIDDEN)

    @property
    def file_name(self) -> str:
        """The last part of the path, decoded: `model.gguf`."""
        return unquote(self.path.rpartition("/")[2])

    def follow(self, location: str) -> Url:
        """Where a redirect leads, without a password of the server's invention. Raises
        `UsageError` where that is no address of the web."""
        base = f"{self.origin.scheme}://{self.origin.authority}{self.target}"
        try:
            led_to = urljoin(base, location)
        except ValueError:
            raise UsageError("this is no address") from None
        return replace(parse_url(led_to), authorization=None)


def parse_url(text: str) -> Url:
    """Raises `UsageError`, which does not repeat the text: it may hold a password."""
    try:
        parts = urlsplit(text.strip())
        host, port = _host(parts.hostname or ""), parts.port
    except (ValueError, UnicodeError):
        raise UsageError("this is no address: write https://host/path/model.gguf") from None
    if parts.scheme not in _PORTS or not host:
        raise UsageError("an address begins with https:// or http:// and a host")
    if port == 0:
        raise UsageError("port 0 is nobody's: leave it out or name another")
    origin = Origin(parts.scheme, host, port or _PORTS[parts.scheme])
    authorization = None
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode()
    path = quote(parts.path or "/", safe=_SAFE)
    return Url(origin, path, quote(parts.query, safe=_SAFE), authorization)


def _host(name: str) -> str:
    """As it is looked up: an IP literal, or a name in ASCII. Raises ValueError."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        ascii_name = name.encode("idna").decode().lower()
    if not all(letter.isalnum() or letter in "-._" for letter in ascii_name):
        raise ValueError(name)
    return ascii_name
