"""What one check of `mesh doctor` came to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    OK = "ok"
    NOTE = "note"  # it works, with less
    BAD = "bad"  # it will not work, or not as it should


@dataclass(frozen=True)
class Check:
    """`text`: what was found, and what to do where that is not well."""

    name: str
    verdict: Verdict
    text: str
