"""Text as a terminal may have it: names of files and what others say can hold escape sequences."""

from __future__ import annotations


def shown(text: str) -> str:
    """Without what a terminal would obey, of one line or of several."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


def shown_cell(text: str) -> str:
    """The same, in one line."""
    return shown(text).replace("\n", "?")
