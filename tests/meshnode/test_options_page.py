"""Every option of a node stands in docs/serving.md, and every option there is one."""

from __future__ import annotations

import re

import click

from meshnode.cli.node import relay, serve, worker
from tests.sansio import ROOT

PAGE = (ROOT / "docs" / "serving.md").read_text()
LONG = re.compile(r"`(--[a-z][a-z-]*)")


def section(command: str) -> str:
    return PAGE.partition(f"\n## `mesh {command}`\n")[2].partition("\n## ")[0]


def told(command: str) -> set[str]:
    """The options in the first column of the command's table."""
    rows = [line.split(" | ")[0] for line in section(command).splitlines() if line[:1] == "|"]
    return {option for row in rows for option in LONG.findall(row)}


def options(command: click.Command) -> set[str]:
    found = [one for one in command.params if isinstance(one, click.Option)]
    return {option for one in found for option in (*one.opts, *one.secondary_opts)}


def test_each_option_of_a_worker_is_in_its_table() -> None:
    assert told("worker") == options(worker)


def test_each_option_of_serve_is_in_its_table_or_in_the_workers() -> None:
    assert told("serve") == options(serve) - options(worker)
    assert options(worker) <= options(serve), "all options of `worker`, the page says"


def test_a_relay_has_the_workers_options_but_those_that_the_page_names() -> None:
    assert set(LONG.findall(section("relay"))) == options(worker) - options(relay)
    assert options(relay) <= options(worker)
