"""`mesh engine …`, as a user types it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from meshnode.cli.engine import engine_group
from meshnode.engine.build import find_engine
from meshnode.engine.errors import EngineMissing
from tests.meshnode.engine.conftest import Fake


def mesh_engine(*arguments: str) -> Result:
    return CliRunner().invoke(engine_group, arguments, catch_exceptions=False)


@pytest.mark.usefixtures("compiler")
def test_build_path_and_json_agree_and_progress_stays_off_stdout(fake: Fake) -> None:
    built = json.loads(mesh_engine("build", "--backend", "cpu", "--json").stdout)
    first = find_engine()
    assert first is not None
    assert built["bin_dir"] == str(first)
    assert built["backend"] == "cpu"
    assert mesh_engine("path").stdout == f"{first}\n"
    result = mesh_engine("build", "--backend", "cpu")
    assert (result.stdout, result.stderr) == (f"engine {built['key']} (cpu) in {first}\n", "")


@pytest.mark.usefixtures("compiler")
def test_without_a_terminal_progress_is_plain_lines(fake: Fake) -> None:
    result = mesh_engine("build", "--backend", "cpu", "--stock")
    lines = result.stderr.splitlines()
    assert lines[:2] == ["unpacking mesh-fake-llama 1.0", "configuring"]
    assert lines[-1].startswith("[8/8] ")


@pytest.mark.usefixtures("compiler")
def test_on_a_terminal_a_bar_moves(fake: Fake) -> None:
    script = (
        "from pathlib import Path; from meshnode.engine import patches\n"
        f"patches.patches_folder = lambda: Path({str(fake.patches)!r})\n"
        "from meshnode.cli.engine import engine_group\n"
        "engine_group(['build', '--backend', 'cpu'])\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stderr=theirs, stdout=subprocess.PIPE, env=environment
    ) as build:
        os.close(theirs)
        shown = b""
        while chunk := _read_terminal(ours):
            shown += chunk
        assert build.wait() == 0
    os.close(ours)
    text = shown.decode()
    assert "configuring" in text
    assert text.count("8/8") >= 1
    assert "━" in text


def _read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux: the other side has closed
        return b""


def test_info_and_path_say_what_to_run_when_nothing_is_built(fake: Fake) -> None:
    for command in ("info", "path"):
        with pytest.raises(EngineMissing, match="run `mesh engine build --stock` first"):
            mesh_engine(command, "--stock")


def test_edit_export_and_the_check_of_both(fake: Fake, tmp_path: Path) -> None:
    tree = str(tmp_path / "tree")
    assert "one commit a patch (1)" in mesh_engine("edit", tree).stdout
    assert mesh_engine("export", tree).stdout == "nothing changed\n"
    assert "changed no byte" in mesh_engine("check-patches").stdout


@pytest.mark.engine
def test_info_tells_what_a_bug_report_needs(engine_bin: Path) -> None:
    if find_engine() != engine_bin:
        pytest.skip("MESH_TEST_ENGINE names an engine that mesh engine did not build")
    facts = json.loads(mesh_engine("info", "--json").stdout)
    assert facts["bin_dir"] == str(engine_bin)
    assert facts["devices"][-1]["name"] == "CPU"
    assert facts["key"] in mesh_engine("info").stdout
