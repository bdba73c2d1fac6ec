"""How a secret may look in a text, and whether it is there."""

from __future__ import annotations

import base64
import functools
import re

BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_TO_BECH32 = str.maketrans(_BASE32, BECH32)
_WORD = re.compile(rb"[A-Za-z0-9+/_=:-]{16,}")
_WHOLE_TOKEN = re.compile(r"mesh1[0-9a-z]{100,}", re.IGNORECASE)
_TOKEN_SECRET_AT = 75  # offset in the payload: discovery/token.py
_MIN_LETTERS = 18  # of a form: fewer say nothing


@functools.lru_cache(maxsize=65536)
def forms(secret: bytes) -> tuple[tuple[str, bytes], ...]:
    """(kind, text) of each way to write it, wherever in a longer run of letters it stands."""
    found = {
        ("hex", secret.hex()),
        ("hex", secret.hex().upper()),
        ("hex with colons", secret.hex(":")),
    }
    for shift in range(3):
        text = _inside(secret, shift, 3, 4, base64.b64encode)
        found |= {("base64", text), ("base64", text.replace("+", "-").replace("/", "_"))}
    for shift in range(5):
        text = _inside(secret, shift, 5, 8, base64.b32encode).lower()
        found |= {("base32", text), ("base32", text.upper())}
        bech = text.translate(_TO_BECH32)
        found |= {("token letters", bech), ("token letters", bech.upper())}
    return tuple(sorted((kind, text.encode()) for kind, text in found if len(text) >= _MIN_LETTERS))


def _inside(secret: bytes, shift: int, group: int, letters: int, encode) -> str:  # type: ignore[no-untyped-def]
    """The letters that depend on nothing but `secret` when `shift` bytes stand before it."""
    text = encode(bytes(shift) + secret + bytes(group)).decode()
    bits = 8 * group // letters
    first, last = -(-8 * shift // bits), 8 * (shift + len(secret)) // bits
    return str(text[first:last])


@functools.lru_cache(maxsize=65536)
def raw_forms(secret: bytes) -> tuple[tuple[str, bytes], ...]:
    """Those that are no run of letters."""
    return (
        ("raw bytes", secret),
        ("a repr", repr(secret)[2:-1].encode()),
        ("a list of numbers", ", ".join(map(str, secret)).encode()),
    )


def find_secret(data: bytes, secrets: set[bytes]) -> str | None:
    """The kind of the first secret found in `data`, never the secret itself."""
    words = b"\n".join(_WORD.findall(data))
    for secret in secrets:
        for kind, text in forms(secret):
            if text in words:
                return kind
        for kind, text in raw_forms(secret):
            if text in data:
                return kind
    return None


def token_secrets(text: str) -> set[bytes]:
    """The secrets of the whole tokens in a text, by their place in the layout."""
    found = set()
    for token in _WHOLE_TOKEN.findall(text):
        letters = token[len("mesh1") :].lower().translate(str.maketrans(BECH32, _BASE32))
        try:
            payload = base64.b32decode(letters.upper() + "=" * (-len(letters) % 8))
        except ValueError:
            continue
        found.add(payload[_TOKEN_SECRET_AT : _TOKEN_SECRET_AT + 16])
    return found
