"""How fast a device is: what is asked, what is believed, what is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from meshnode.engine import probe_model
from meshnode.engine.cache import Engine
from meshnode.engine.devices import Device, DeviceKind
from meshnode.engine.errors import EngineFailed
from meshnode.engine.probe_model import NARROW, TINY, WIDE
from meshnode.engine.probe_times import Times, speed_from
from meshnode.engine.speed import BUSY_PERCENT, Speeds, is_busy, measure, parse_bench
from meshnode.models.facts import ModelFacts, read_facts
from meshnode.pipeline.costs import plan_model
from meshnode.pipeline.speeds import Speed
from meshnode.pipeline.work import Load, work_of
from tests.meshnode.engine.bench_answer import answer

CPU = Device("CPU", "x86_64, 2 cores", DeviceKind.CPU, 1 << 34, 1 << 33)
CARD = Device("CUDA0", "a card", DeviceKind.GPU, 1 << 34, 1 << 33)
RUNS = 3
"""Of llama-bench, to measure one device."""
BENCH = """#!/bin/sh
echo "$@" >> "{folder}/asked"
cat "{folder}/answer"
exit "$(cat "{folder}/status")"
"""


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Its llama-bench says what `answer` holds."""
    program = tmp_path / "llama-bench"
    program.write_text(BENCH.format(folder=tmp_path))
    program.chmod(0o700)
    (tmp_path / "answer").write_text(json.dumps(answer()))
    (tmp_path / "status").write_text("0")
    return Engine(tmp_path, "key", "cpu", False, "source", "c++", "a CPU")


def asked(engine: Engine) -> list[str]:
    log = engine.bin_dir / "asked"
    return log.read_text().splitlines() if log.exists() else []


def test_the_best_sample_counts() -> None:
    rows = answer()
    speed = parse_bench(json.dumps(rows))
    for row in rows:
        row["samples_ts"] = [max(row["samples_ts"]), 1.0]
    assert parse_bench(json.dumps(rows[:2]), json.dumps(rows[2:])) == speed
    assert speed.is_measured


ODD = (answer(0), answer(float("nan")), answer(1e12), answer()[:1])


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", *map(json.dumps, ODD)])
def test_an_answer_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(EngineFailed, match="did not say how fast"):
        parse_bench(text)


def test_a_device_is_measured_once(engine: Engine, tmp_path: Path) -> None:
    speeds = Speeds(tmp_path, engine)
    assert speeds.known(CPU) is None
    first = speeds.speed(CPU)
    assert Speeds(tmp_path, engine).speed(CPU) == speeds.known(CPU) == first
    assert len(asked(engine)) == RUNS
    assert "--device none" in asked(engine)[0]
    assert "-lm none" in asked(engine)[0]


def test_other_threads_cards_and_engines_are_measured_anew(engine: Engine, tmp_path: Path) -> None:
    speeds = Speeds(tmp_path, engine)
    speeds.speed(CPU)
    speeds.speed(replace(CPU, free_bytes=5))
    assert len(asked(engine)) == RUNS
    speeds.speed(CPU, threads=3)
    speeds.speed(CARD)
    Speeds(tmp_path, replace(engine, key="another")).speed(CPU)
    assert len(asked(engine)) == 4 * RUNS
    assert asked(engine)[RUNS].endswith("-t 3")
    assert "--device CUDA0 -ngl 99" in asked(engine)[2 * RUNS]


def test_what_a_busy_machine_does_is_not_kept(engine: Engine, tmp_path: Path) -> None:
    speeds = Speeds(tmp_path, engine)
    assert speeds.speed(CPU, is_busy=lambda: True).is_measured
    assert speeds.known(CPU) is None
    assert speeds.speed(CPU, is_busy=lambda: False) == speeds.known(CPU)


def test_a_machine_is_busy_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter((BUSY_PERCENT, 3.0))
    monkeypatch.setattr(psutil, "cpu_percent", lambda _look_s: next(shares))
    assert is_busy()
    assert not is_busy()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 3}', "[" * 100_000])
def test_what_was_kept_and_is_damaged_is_measured_again(
    engine: Engine, tmp_path: Path, text: str
) -> None:
    speeds = Speeds(tmp_path, engine)
    first = speeds.speed(CPU)
    (tmp_path / "speeds.json").write_text(text)
    assert speeds.speed(CPU) == first
    kept = json.loads((tmp_path / "speeds.json").read_text())
    (key,) = [one for one in kept if one != "x"]
    for odd in (3, {}, {"decode_bytes_per_s": "fast"}, {"decode_bytes_per_s": -1}):
        (tmp_path / "speeds.json").write_text(json.dumps({key: odd}))
        assert speeds.known(CPU) is None


def test_an_engine_that_fails_is_told(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("1")
    with pytest.raises(EngineFailed, match="engine key could not be measured"):
        measure(engine, CPU)
    with pytest.raises(EngineFailed, match="could not be measured"):
        measure(replace(engine, bin_dir=tmp_path / "none"), CPU)


@pytest.mark.parametrize("shape", probe_model.SHAPES, ids=lambda shape: shape.name)
def test_a_model_that_is_measured_with_is_a_header_and_a_hole(
    tmp_path: Path, shape: probe_model.Shape
) -> None:
    facts = written(tmp_path, shape)
    assert (facts.n_layers, facts.n_embd) == (shape.layers, shape.width)
    assert facts.layer_bytes == (shape.layer_bytes,) * shape.layers
    assert sum(facts.layer_bytes) + facts.output_bytes == shape.token_bytes
    assert facts.path.stat().st_size == shape.size_bytes
    assert facts.path.stat().st_blocks * 512 < 1 << 20


def written(folder: Path, shape: probe_model.Shape) -> ModelFacts:
    path = folder / f"{shape.name}.gguf"
    with path.open("wb") as file:
        file.write(probe_model.header(shape))
        file.truncate(shape.size_bytes)
    return read_facts(path)


# -- what times mean ------------------------------------------------------------------------------


def told(folder: Path, speed: Speed) -> Times:
    """What the three models take on a device of this speed, by the planner's own formula."""
    work = {shape: work_of(plan_model(written(folder, shape))) for shape in probe_model.SHAPES}

    def prompt_s(shape: probe_model.Shape, tokens: int) -> float:
        return work[shape].piece_sums(speed, tokens, tokens / 2)[-1] / tokens

    def answer_s(shape: probe_model.Shape) -> float:
        return work[shape].answer_sums(speed, Load(0, 1, depth_tokens=0))[-1]

    return Times(
        prompt_s(WIDE, 128), answer_s(WIDE), prompt_s(NARROW, 128), prompt_s(NARROW, 512),
        answer_s(TINY),
    )  # fmt: skip


@pytest.mark.parametrize(
    "speed",
    [
        Speed(26e9, 140e9, layer_s=4e-6, number_s=4e-9, attention_s=6e-11),
        Speed(700e9, 60e12, layer_s=3e-5, number_s=2e-11, attention_s=1e-12),
    ],
    ids=["a core", "a card"],
)
def test_a_devices_speed_is_found_again_in_its_times(tmp_path: Path, speed: Speed) -> None:
    found = speed_from(told(tmp_path, speed))
    assert found.decode_bytes_per_s == pytest.approx(speed.decode_bytes_per_s, rel=0.03)
    assert found.prefill_bytes_per_s == pytest.approx(speed.prefill_bytes_per_s, rel=0.03)
    assert found.attention_s == pytest.approx(speed.attention_s, rel=0.05)
    # The smallest layers have some weights and numbers, and the last of them less of those.
    assert found.number_s == pytest.approx(speed.number_s, rel=0.1)
    assert found.layer_s == pytest.approx(speed.layer_s, rel=0.6)


@pytest.mark.parametrize("which", ["narrow_prompt", "narrow_long", "tiny_answer", "wide_prompt"])
@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_disturbed_measurement_ends_in_a_speed_all_the_same(
    tmp_path: Path, which: str, factor: float
) -> None:
    times = told(tmp_path, Speed(26e9, 140e9, layer_s=4e-6, number_s=4e-9, attention_s=6e-11))
    found = speed_from(replace(times, **{which: factor * getattr(times, which)}))
    assert 13e9 < found.decode_bytes_per_s < 52e9
    assert 20e9 < found.prefill_bytes_per_s < 2000e9
    assert min(found.layer_s, found.number_s, found.attention_s) >= 0


@pytest.mark.engine
def test_this_machine_is_measured_in_seconds(engine_bin: Path, tmp_path: Path) -> None:
    real = Engine(engine_bin, "key", "cpu", False, "source", "c++", "a CPU")
    found = measure(real, CPU, threads=1)
    assert 1e8 < found.decode_bytes_per_s < 1e12
    assert found.decode_bytes_per_s < found.prefill_bytes_per_s
