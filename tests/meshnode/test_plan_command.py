"""`mesh plan`: what it shows, and what it refuses, without an engine and without a node."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from meshnode.cli import plan as command
from meshnode.cli.settings import choose_split
from meshnode.config import Split, WireType
from meshnode.errors import BadMessage, HomeError, UsageError
from meshnode.pipeline.machines import links_of, machines_row, read_machines
from meshnode.pipeline.plan import PlanDevice, PlanNode
from meshnode.pipeline.speeds import Link, Links
from tests.engine.synthetic import make_model

THREE = """
[[node]]
name = "laptop"
memory = "24M"
decode_gb_s = 20
[[node]]
name = "tower"
memory = "32M"
decode_gb_s = 50
has_model = false
[[node]]
name = "attic"
memory = "32M"
decode_gb_s = 5
[[link]]
between = ["laptop", "tower"]
rtt_ms = 1
[[link]]
between = ["laptop", "attic"]
rtt_ms = 40
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "glm.gguf", layers=6)


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    path = tmp_path / "nodes.toml"
    path.write_text(THREE)
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(command, "find_built", lambda: None)

    def run(*arguments: str | Path) -> Result:
        home = ("--home", str(tmp_path / "home"))
        return CliRunner().invoke(command.plan, [*map(str, arguments), *home])

    return run


def planned(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.output)
    return answer


def test_imagined_machines_are_planned_for_with_reasons(run: Any, model: Path, nodes: Path) -> None:
    answer = planned(run("--model", model, "--what-if", nodes, "--ctx", "64", "--json"))
    assert answer["n_layers"] == 6
    assert answer["nodes"] == ["laptop"]
    assert any("laptop" in why and "tok/s" in why for why in answer["why"])
    assert {left["node"] for left in answer["left_out"]} == {"tower", "attic"}
    assert answer["predicted"]["decode_tok_s"] > 0
    covered = [
        (share["first_layer"], share["last_layer"])
        for share in answer["shares"]
        if share["first_layer"] is not None
    ]
    assert covered[0][0] == 0
    assert covered[-1][1] == 5


def test_a_node_without_the_model_is_ready_later(run: Any, model: Path, nodes: Path) -> None:
    by_hand = ("--layers", "tower=0:output", "--ctx", "64", "--json")
    ready_s = []
    for pull in ("1", "1000"):
        nodes.write_text(
            THREE.replace("has_model = false", f"has_model = false\npull_mbit_s = {pull}")
        )
        answer = planned(run("--model", model, "--what-if", nodes, *by_hand))
        ready_s.append(answer["predicted"]["ready_s"])
    assert ready_s[0] > ready_s[1] + 1


def test_machines_that_are_left_out_for_one_reason_share_a_line(
    run: Any, model: Path, nodes: Path
) -> None:
    names = ("laptop", *(f"n{number}" for number in range(7)))
    described = (f'[[node]]\nname = "{name}"\nmemory = "16G"\ndecode_gb_s = 9\n' for name in names)
    nodes.write_text("".join(described))
    shown = run("--model", model, "--what-if", nodes, "--ctx", "64")
    assert shown.exit_code == 0, shown.output
    told = [line for line in shown.output.splitlines() if line.startswith("left out")]
    assert told == [
        "left out: n0, n1, n2, n3 and 3 more: no faster than what is used, which has room for "
        "everything"
    ]


def test_the_picture_shows_layers_over_nodes(run: Any, model: Path, nodes: Path) -> None:
    layout = "laptop=0:0,attic=1:3,tower=4:output"
    shown = run("--model", model, "--what-if", nodes, "--ctx", "64", "--layers", layout)
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert "laptop  █····· ·" in lines
    assert "attic   ·███·· ·" in lines
    assert "tower   ····██ █" in lines
    assert "        0    5 output" in lines
    assert any(line.startswith("predicted") for line in lines)


def test_only_the_nodes_that_were_named_are_used(run: Any, model: Path, nodes: Path) -> None:
    wanted = ("--nodes", "attic", "--balanced", "--ctx", "64", "--json")
    answer = planned(run("--model", model, "--what-if", nodes, *wanted))
    assert answer["nodes"] == ["laptop", "attic"]
    refused = run("--model", model, "--what-if", nodes, "--nodes", "cellar")
    assert isinstance(refused.exception, UsageError)
    assert "there are laptop, tower, attic" in str(refused.exception)


def test_without_a_description_it_is_this_machine(run: Any, tmp_path: Path) -> None:
    answer = planned(run("--json", "--for", "latency"))
    assert answer["model"] == "mesh-demo"
    assert answer["alone"]
    assert not answer["predicted"]["measured"]
    assert "assumed, not measured: the speed of local" in answer["why"][-1]
    assert not (tmp_path / "home").exists()
    shown = run().output
    assert "with speeds that nobody measured" in shown


def test_the_mesh_of_a_running_node_is_planned_for(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = PlanNode("local", True, (PlanDevice("CPU", 2**33, False),))
    there = PlanNode("tower", False, (PlanDevice("CUDA0", 2**34, True),), 1e8, 0.004)
    fast = Link(0.004, 5e7, age_s=3.0)
    links = Links({("tower", "local"): fast, ("local", "tower"): Link(0.004, 1e8, False)})
    row = machines_row((here, there), replace(links, parted=frozenset({("tower", "attic")})))
    monkeypatch.setattr(command, "ask_node", lambda home, request: json.loads(json.dumps(row)))
    answer = planned(run("--json", "--for", "latency"))
    assert answer["left_out"] or answer["nodes"] == ["tower"]
    found = read_machines(row)
    assert found.nodes == (here, there)
    assert found.links.pairs == links.pairs
    assert found.links.parted == {("tower", "attic")}
    assert links_of((here, there)).pairs["tower", "local"].rtt_s == 0.004
    assert links_of((here, PlanNode("far", False, ()))).pairs == {}
    with pytest.raises(BadMessage, match="of another version"):
        read_machines({"machines": [{"name": "x"}]})


def test_files_that_cannot_be_read_are_told_in_a_sentence(run: Any, tmp_path: Path) -> None:
    missing = run("--what-if", tmp_path / "none.toml")
    assert "cannot be read: No such file" in str(missing.exception)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    assert "no text in UTF-8" in str(run("--what-if", tmp_path / "bytes.toml").exception)
    (tmp_path / "long.toml").write_text("#" * (command.MAX_FILE_BYTES + 1))
    assert "longer than" in str(run("--what-if", tmp_path / "long.toml").exception)
    (tmp_path / "odd.toml").write_text('[[node]]\nname = "a"\nmemry = "1G"\n')
    odd = str(run("--what-if", tmp_path / "odd.toml").exception)
    assert "odd.toml, line 3: 'memry' is unknown" in odd


def test_balanced_is_a_layout_and_excludes_others() -> None:
    nothing = {"split": None, "layers": None, "tensor_split": None, "objective": None}
    assert choose_split({**nothing, "balanced": True}) is Split.ALWAYS
    assert choose_split({**nothing, "balanced": False}) is None
    assert choose_split({**nothing, "balanced": False, "split": "never"}) is Split.NEVER
    for option, name in (("objective", "--for"), ("tensor_split", "--tensor-split")):
        with pytest.raises(UsageError, match=f"--balanced and {name} exclude each other"):
            choose_split({**nothing, "balanced": True, option: "x"})


def test_what_crosses_the_wire_has_a_size() -> None:
    assert [one.number_bytes for one in WireType] == [4, 2, 34 / 32]
    assert HomeError.exit_code == 8
