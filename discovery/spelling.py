"""Bytes as one line of text that people copy: letters, a check for mistakes, no more.

In the bech32 alphabet (BIP 173: no 1, b, i, o; upper and lower case mean the same), five bits a
character, zero-padded at the end. The last four bytes are the CRC-32 of all before, little-endian:
it sees every error burst of up to 32 bits, and so any one changed character, wherever it is. White
space anywhere is skipped: terminals and mail wrap lines.
"""

from __future__ import annotations

import base64
import binascii
import struct

_ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_BASE32 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_TO_BECH32 = str.maketrans(_BASE32, _ALPHABET)
_TO_BASE32 = str.maketrans(_ALPHABET, _BASE32)
_CRC = struct.Struct("<I")
CHECK_BYTES = _CRC.size


class Misspelt(Exception):
    """The letters are not what was written; the sentence says in what way."""


def spell(data: bytes) -> str:
    """`data` and its check, in letters."""
    checked = data + _CRC.pack(binascii.crc32(data))
    return base64.b32encode(checked).decode("ascii").rstrip("=").translate(_TO_BECH32)


def squeeze(text: str) -> str:
    """Without white space, in lower case. lower() of some letters outside ASCII gives ASCII ones:
    what has any of those stays as it is."""
    squeezed = "".join(text.split())
    return squeezed.lower() if squeezed.isascii() else squeezed


def read_untrusted(letters: str) -> tuple[bytes, bool]:
    """What `spell` was given, and whether the check is right. Raises Misspelt."""
    strange = set(letters) - set(_ALPHABET)
    if strange:
        raise Misspelt(f"is corrupted, it cannot contain {min(strange)!r}: copy it again")
    if len(letters) % 8 in (1, 3, 6):  # no whole number of bytes is this long in base32
        raise Misspelt("has the wrong length, a piece is missing or added: copy it again")
    padded = letters.translate(_TO_BASE32) + "=" * (-len(letters) % 8)
    data = base64.b32decode(padded)
    if base64.b32encode(data).decode("ascii") != padded:
        raise Misspelt("is corrupted, a character in it is wrong: copy it again")
    checked, check = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
    return checked, check == _CRC.pack(binascii.crc32(checked))
