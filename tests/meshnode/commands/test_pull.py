"""`mesh pull`: what a person fetches by hand, from a web server as there are many."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnode.cli.node import begin_model
from meshnode.config import NodeConfig, ServeConfig
from meshnode.errors import UsageError
from meshnode.state import Home
from tests.conftest import require
from tests.engine.synthetic import make_model
from tests.lab.nginx import nginx_program, running_nginx
from tests.meshnode.commands.lines import Mesh, told

USAGE, NETWORK, MODEL, NO_NODE = 2, 4, 6, 8


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    program = nginx_program()
    require("nginx", program is not None, "needs nginx (./just setup)")
    assert program is not None
    served, scratch = tmp_path / "served", tmp_path / "scratch"
    for folder in (served, scratch):
        folder.mkdir()
    make_model(served / "small.gguf", layers=4, width=256, ffn=512)
    with running_nginx(program, served, scratch) as address:
        yield f"{address}small.gguf"


def test_a_model_is_fetched_once_and_whole(mesh: Mesh, url: str) -> None:
    first = told(mesh, "pull", url)
    assert first["pulled_bytes"] == first["held_bytes"] == first["weight_bytes"]
    assert first["root"] is not None
    code, out, _ = mesh("pull", url)
    assert code == 0
    assert "nothing had to come, all of it is here" in out
    (listed,) = told(mesh, "models")["models"]
    assert listed["complete"]


def test_the_line_to_serve_it_with_is_one_that_a_shell_takes(mesh: Mesh, url: str) -> None:
    _, out, _ = mesh("pull", f"{url}?version=1&token=x")
    assert f"mesh serve --model '{url}?…'" in out, "bare, a ? is a pattern"


def test_some_layers_come_alone_and_others_later(mesh: Mesh, url: str) -> None:
    first = told(mesh, "pull", url, "--layers", "0:1")
    assert 0 < first["held_bytes"] < first["weight_bytes"]
    assert first["root"] is None
    more = told(mesh, "pull", url, "--layers", "2:output")
    assert more["held_bytes"] == first["held_bytes"] + more["pulled_bytes"]
    again = told(mesh, "pull", url, "--layers", "1")
    assert again["pulled_bytes"] == 0


@pytest.mark.parametrize("layers", ["4", "3:2", "0:4", "all", "output:1", ""])
def test_layers_that_are_none_are_told_so(mesh: Mesh, url: str, layers: str) -> None:
    code, _, complaint = mesh("pull", url, "--layers", layers)
    assert code == USAGE
    assert "--layers" in complaint
    assert "Traceback" not in complaint


@pytest.mark.parametrize("source", ["small.gguf", "mesh:", "ftp://example.org/x", "hf:small"])
def test_what_is_no_source_is_told_so(mesh: Mesh, source: str) -> None:
    code, _, complaint = mesh("pull", source)
    assert (code, complaint.count("\n")) == (USAGE, 1)


def test_members_are_asked_through_a_node_that_runs(mesh: Mesh) -> None:
    code, _, complaint = mesh("pull", "mesh:small")
    assert (code, complaint.count("\n")) == (NO_NODE, 1)
    assert "start it with `mesh worker join=" in complaint


def test_what_members_have_is_pulled_before_it_is_served(tmp_path: Path) -> None:
    serve = ServeConfig(model="mesh:glm")
    with Home(tmp_path / "home") as home, pytest.raises(UsageError, match="pull it first"):
        begin_model(home, NodeConfig(), serve, lambda _event: None)


def test_a_file_that_is_not_there_is_told_so(mesh: Mesh, url: str) -> None:
    code, _, complaint = mesh("pull", url.replace("small", "other"))
    assert code == NETWORK
    assert "404" in complaint


def test_a_page_in_the_models_place_is_told_of_with_who_gave_it(
    mesh: Mesh, url: str, tmp_path: Path
) -> None:
    (tmp_path / "served" / "page.gguf").write_text("<html>Please sign in</html>")
    code, _, complaint = mesh("pull", url.replace("small", "page"))
    assert code == MODEL
    assert "what 127.0.0.1 gives as page.gguf is no GGUF file" in complaint
    assert "name a .gguf file" not in complaint, "one was named"


def test_a_password_in_an_address_is_never_shown_nor_kept(
    mesh: Mesh, url: str, tmp_path: Path
) -> None:
    secret = url.replace("http://", "http://ann:hunter2@") + "?token=geheim"
    answer = told(mesh, "pull", secret)
    for text in (json.dumps(answer), mesh("models")[1], *kept(tmp_path / "home")):
        assert "hunter2" not in text
        assert "geheim" not in text


def kept(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.read_bytes().decode("latin-1")
