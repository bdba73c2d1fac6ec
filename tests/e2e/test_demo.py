"""`./just demo` without the build: the promise on the README's first page."""

from __future__ import annotations

import re

import pytest

from tests.e2e.conftest import Mesh

pytestmark = pytest.mark.engine


def test_the_demo_answers_on_two_nodes_and_proves_it(mesh: Mesh) -> None:
    finished = mesh("demo")
    finished.check(0)
    said = finished.stdout
    assert re.search(r"^layers on local: 0-\d and output$", said, re.MULTILINE)
    assert re.search(r"^layers on worker: \d-\d+$", said, re.MULTILINE)
    assert re.search(r"^weight bytes over the wire: 0$", said, re.MULTILINE)
    assert re.search(r"^wire bytes per token: [1-9]\d*$", said, re.MULTILINE)
    assert re.search(r"^tok/s on the mesh: [1-9]", said, re.MULTILINE)
    assert re.search(r"^tok/s alone: [1-9]", said, re.MULTILINE)
    assert re.search(r"^same tokens as alone: yes$", said, re.MULTILINE)
    answer = said.partition("What is mesh?\n")[2].partition("\n\n")[0]
    assert "machines" in answer, "a sensible answer"


def test_nothing_to_stop_is_said(mesh: Mesh, tmp_path: object) -> None:
    mesh("demo", "--stop", env={"MESH_CACHE": str(tmp_path)}).check(8, "./just local")
