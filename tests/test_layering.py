"""The house rules that imports can show: who may know whom, and who may touch the world."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sansio import ROOT, sans_io_modules

PACKAGES = ("tunnels", "discovery", "meshnode")
MAY_NOT_KNOW = {
    "tunnels": {"discovery", "meshnode"},
    "discovery": {"meshnode"},
    "meshnode": set(),
}
WORLD = {"trio", "asyncio", "socket", "time", "random", "os", "secrets", "threading"}
ASYNCIO_ISLAND = "tunnels/_asyncio_island.py"
MAY_PRINT = ("meshnode/cli/", "meshnode/demo/")


def modules() -> list[str]:
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def imports_of(source: str) -> set[str]:
    """Top-level packages that a module imports, anywhere in it. Relative ones stay inside."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def prints_of(source: str) -> Iterator[int]:
    """Lines on which something is printed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "print",
            "click.echo",
            "sys.stdout.write",
            "sys.stderr.write",
        }:
            yield node.lineno


def read(module: str) -> str:
    return (ROOT / module).read_text(encoding="utf-8")


def test_the_rules_see_what_they_forbid() -> None:
    """A rule that sees nothing would hold whatever is written."""
    assert imports_of("def f():\n import trio.abc\n from os import path") == {"trio", "os"}
    assert imports_of("from . import trio\nfrom .os import x") == set()
    assert list(prints_of("x = 1\nprint(x)\nlog.print(x)")) == [2]
    assert {"tunnels/frames.py", "meshnode/config.py", "meshnode/pipeline/plan.py"} <= set(
        sans_io_modules()
    )


@pytest.mark.parametrize("module", modules())
def test_a_module_knows_only_the_packages_below_its_own(module: str) -> None:
    package = module.partition("/")[0]
    assert not imports_of(read(module)) & MAY_NOT_KNOW[package]


@pytest.mark.parametrize("module", sans_io_modules())
def test_a_sans_io_module_has_no_clock_no_dice_and_no_wires(module: str) -> None:
    assert Path(ROOT / module).is_file(), f"docs/architecture.md lists {module}"
    assert not imports_of(read(module)) & WORLD


@pytest.mark.parametrize("module", modules())
def test_asyncio_stays_on_its_island(module: str) -> None:
    assert module == ASYNCIO_ISLAND or "asyncio" not in imports_of(read(module))


@pytest.mark.parametrize("module", modules())
def test_only_the_command_line_prints(module: str) -> None:
    assert module.startswith(MAY_PRINT) or not list(prints_of(read(module)))
