"""docs/benchmarks.md: what benchmarks write stands between markers, the words around it stay."""

from __future__ import annotations

from pathlib import Path

import click

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def has(name: str) -> bool:
    return _begin(name) in PAGE.read_text()


def part(name: str) -> str:
    """What stands there now."""
    return _cut(name)[1].strip()


def put(name: str, text: str) -> None:
    before, _, after = _cut(name)
    PAGE.write_text(f"{before}{_begin(name)}\n{text}\n{_end(name)}{after}")


def _cut(name: str) -> tuple[str, str, str]:
    before, found, rest = PAGE.read_text().partition(_begin(name))
    if not found:
        raise click.ClickException(
            f"{PAGE.name} has no {_begin(name)}: put it and {_end(name)} where the result belongs"
        )
    inside, _, after = rest.partition(_end(name))
    return before, inside, after


def _begin(name: str) -> str:
    return f"<!-- {name} -->"


def _end(name: str) -> str:
    return f"<!-- end of {name} -->"
