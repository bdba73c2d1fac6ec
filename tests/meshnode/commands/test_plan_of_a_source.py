"""`mesh plan --model URL`: from a header that is fetched once, of a model that nobody here has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshnode.cli import plan as command
from meshnode.models.store.store import Store
from tests.conftest import require
from tests.engine.synthetic import make_model
from tests.lab.nginx import nginx_program, running_nginx
from tests.meshnode.commands.lines import Mesh

USAGE, NETWORK = 2, 4
HEADER_BYTES = 4 << 20
NODES = """
[[node]]
name = "laptop"
memory = "1G"
[[node]]
name = "tower"
memory = "2G"
has_model = false
pull_mbit_s = 1
"""


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_built", lambda: None)


@contextmanager
def web_server(tmp_path: Path) -> Iterator[str]:
    """The model's address, while the server runs."""
    program = nginx_program()
    require("nginx", program is not None, "needs nginx (./just setup)")
    assert program is not None
    served, scratch = tmp_path / "served", tmp_path / "scratch"
    for folder in (served, scratch):
        folder.mkdir(exist_ok=True)
    make_model(served / "small.gguf", layers=4, width=256, ffn=512)
    with running_nginx(program, served, scratch) as address:
        yield f"{address}small.gguf"


def planned(mesh: Mesh, *arguments: str) -> Any:
    code, out, complaint = mesh("plan", *arguments, "--ctx", "64", "--json")
    assert (code, complaint) == (0, "")
    return json.loads(out)


def layout(plan: Any) -> list[tuple[str, int, int]]:
    shares = plan["shares"]
    return [(one["node"], one["first_layer"], one["weight_bytes"]) for one in shares]


def test_its_header_is_enough_and_stays_for_whoever_comes_next(
    mesh: Mesh, tmp_path: Path, store: Store
) -> None:
    with web_server(tmp_path) as url:
        plan = planned(mesh, "--model", url)
        assert (plan["model"], plan["n_layers"], plan["alone"]) == ("synthetic", 4, True)
        (begun,) = store.slices()
        assert begun.held == ()
        assert sum(path.stat().st_blocks * 512 for path in begun.facts.files) < HEADER_BYTES
    assert layout(planned(mesh, "--model", url)) == layout(plan), "the server is gone"
    assert [found.folder for found in store.slices()] == [begun.folder]
    assert layout(planned(mesh, "--model", "small")) == layout(plan)


def test_what_is_to_be_pulled_still_takes_its_time(mesh: Mesh, tmp_path: Path) -> None:
    with web_server(tmp_path) as url:
        before = planned(mesh, "--model", url)
        assert mesh("pull", url)[0] == 0
        after = planned(mesh, "--model", url)
    assert after["predicted"]["ready_s"] < before["predicted"]["ready_s"]


def test_imagined_machines_are_planned_for_too(mesh: Mesh, tmp_path: Path) -> None:
    nodes = tmp_path / "nodes.toml"
    nodes.write_text(NODES)
    by_hand = ("--what-if", str(nodes), "--layers", "laptop=0:1,tower=2:output")
    with web_server(tmp_path) as url:
        plan = planned(mesh, "--model", url, *by_hand)
    assert plan["nodes"] == ["laptop", "tower"]
    tower_bytes = sum(one["weight_bytes"] for one in plan["shares"] if one["node"] == "tower")
    assert plan["predicted"]["ready_s"] > 0.9 * tower_bytes / 125e3, "at a megabit a second"


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        (lambda url: url.replace("small", "other"), NETWORK, "404"),
        (lambda url: url.replace("127.0.0.1", ""), USAGE, "address"),
        (lambda _url: "hf:small", USAGE, "hf:org/repo"),
    ],
)
def test_what_is_not_there_is_told_and_leaves_nothing(
    mesh: Mesh, tmp_path: Path, store: Store, change: Callable[[str], str], code: int, told: str
) -> None:
    with web_server(tmp_path) as url:
        ended, out, complaint = mesh("plan", "--model", change(url))
    assert (ended, out) == (code, "")
    assert told in complaint
    assert "Traceback" not in complaint
    assert list(store.slices()) == []


def test_what_is_no_model_is_told_and_leaves_nothing(
    mesh: Mesh, tmp_path: Path, store: Store
) -> None:
    with web_server(tmp_path) as url:
        (tmp_path / "served" / "page.gguf").write_text("<html>log in first</html>" * 100)
        code, _, complaint = mesh("plan", "--model", url.replace("small", "page"))
    assert code == 6
    assert "page.gguf" in complaint
    assert store.folders() == []


def test_offline_nothing_is_asked_beyond_this_network(mesh: Mesh, store: Store) -> None:
    code, _, complaint = mesh("plan", "--offline", "--model", "https://203.0.113.7/small.gguf")
    assert code == NETWORK
    assert "offline" in complaint
    assert store.folders() == []


def test_a_secret_in_the_address_stays_out_of_sight(mesh: Mesh, tmp_path: Path) -> None:
    with web_server(tmp_path) as url:
        secret = url.replace("http://", "http://ann:hunter2@") + "?token=geheim"
        told = json.dumps(planned(mesh, "--model", secret)) + mesh("models")[1]
    for path in (tmp_path / "home").rglob("*"):
        told += path.read_bytes().decode("latin-1") if path.is_file() else ""
    assert "hunter2" not in told
    assert "geheim" not in told
