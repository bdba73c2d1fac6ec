"""A part of the engine's benchmark with a table of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.engine_sides import MESH, STOCK, Side


@dataclass(frozen=True)
class Run:
    """What the command line asked for."""

    sides: tuple[Side, ...]
    rounds: int
    tokens: int
    models: Path | None
    say: Callable[[str], None]

    def side(self, name: str) -> Side | None:
        return next((side for side in self.sides if side.name == name), None)

    @property
    def stock(self) -> Side | None:
        return self.side(STOCK)

    @property
    def mesh(self) -> Side | None:
        return self.side(MESH)


@dataclass(frozen=True)
class Chapter:
    """`tell` measures, by turns, and returns Markdown."""

    name: str
    title: str
    tell: Callable[[Run], str]


def verdict(is_reached: bool) -> str:
    return "yes" if is_reached else "**no**"
