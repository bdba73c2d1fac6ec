"""Sentences for other machines: with the remedy, without what this one's folders are called.

They tell the user's name, and what else lies here. Whose own folders these are reads them in the
log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_HIDDEN = "…"
_BEFORE = r"(?<![\w/:.~…?&=%-])"
"""Nothing that a path is a part of: an address goes on with what looks like one."""
_ABSOLUTE = re.compile(rf"{_BEFORE}(?:~|/[^\s/:;,'\"`()]+)/[^\s:;,'\"`()]*")
"""A path of two parts or more."""


def without_paths(text: str, folders: Iterable[Path] = ()) -> str:
    """folders: known ones, in whose names there may be spaces."""
    known = {str(one) for folder in (*folders, Path.home()) for one in _ways_to(folder)}
    for folder in sorted(known, key=len, reverse=True):
        if len(folder) > 1:  # the root of all is in every path
            text = re.sub(rf"{_BEFORE}{re.escape(folder)}(?![\w-])", _HIDDEN, text)
    return _ABSOLUTE.sub(_HIDDEN, text)


def _ways_to(folder: Path) -> tuple[Path, Path]:
    return folder.absolute(), folder.resolve()
