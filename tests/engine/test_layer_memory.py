"""What the layers keep of conversations: our figures are the engine's, to the last cell.

llama-server logs what each cache and each state takes, in hundredths of a MiB, which these contexts
make fine enough: a cell too many shows.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from meshnode.models.facts import ModelFacts, read_facts
from meshnode.models.kv import CacheOptions, cells_bytes
from meshnode.models.layer_memory import WITHOUT_CACHE
from tests.engine.architectures import GENERATING, bert
from tests.engine.processes import free_port
from tests.engine.random_models import write_model

pytestmark = pytest.mark.engine

MIB = 2**20
CTX_TOKENS = 16 * 1024
SLOTS = 8
WAYS: dict[str, tuple[tuple[str, ...], CacheOptions]] = {
    "plain": ((), CacheOptions(CTX_TOKENS, SLOTS)),
    "one-slot": (("-np", "1"), CacheOptions(CTX_TOKENS, 1)),
    "odd-context": (("-c", "9000", "-np", "5"), CacheOptions(9000, 5)),
    "unified": (("--kv-unified",), CacheOptions(CTX_TOKENS, SLOTS, unified=True)),
    "whole-windows": (("--swa-full",), CacheOptions(CTX_TOKENS, SLOTS, whole_windows=True)),
    "small-batches": (("-ub", "128"), CacheOptions(CTX_TOKENS, SLOTS, ubatch_tokens=128)),
    "no-flash-attention": (("-fa", "off"), CacheOptions(CTX_TOKENS, SLOTS, flash_attention=False)),
    "q8_0": (
        ("-ctk", "q8_0", "-ctv", "q8_0"),
        CacheOptions(CTX_TOKENS, SLOTS, k_type="q8_0", v_type="q8_0"),
    ),
}
_CACHE = re.compile(r"seqs\), K \(\w+\): +([\d.]+) MiB, V \(\w+\): +([\d.]+) MiB")
_STATE = re.compile(r"R \(f32\): +([\d.]+) MiB, S \(f32\): +([\d.]+) MiB")


def logged(engine_bin: Path, model: Path, options: tuple[str, ...]) -> dict[str, list[float]]:
    """MiB of keys, values and states, a figure a cache."""
    argv = [str(engine_bin / "llama-server"), "-m", str(model), "-v", "--no-warmup", "--offline"]
    argv += ["--host", "127.0.0.1", "--port", str(free_port()), "-fit", "off", "--device", "none"]
    argv += ["-c", str(CTX_TOKENS), "-np", str(SLOTS), "-t", "1", *options]
    log = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as it:
        assert it.stdout is not None
        for line in it.stdout:
            log.append(line)
            if "sched_reserve" in line:
                break
        it.kill()
    text = "".join(log)
    assert "sched_reserve" in text, text[-3000:]
    caches, states = _CACHE.findall(text), _STATE.findall(text)
    return {
        "keys": [float(keys) for keys, _ in caches],
        "values": [float(values) for _, values in caches],
        "states": [float(mib) for pair in states for mib in pair],
    }


def computed(facts: ModelFacts, options: CacheOptions) -> dict[str, float]:
    """The same, summed, from the header alone."""
    both = [cells_bytes(cells, options) for layer in facts.memory for cells in layer.caches]
    states_bytes = sum(layer.state_bytes for layer in facts.memory) * options.slots
    return {
        "keys": sum(keys for keys, _ in both) / MIB,
        "values": sum(values for _, values in both) / MIB,
        "states": states_bytes / MIB,
    }


@pytest.mark.parametrize("architecture", GENERATING)
def test_the_engine_takes_what_the_header_says(
    engine_bin: Path, tmp_path: Path, architecture: str
) -> None:
    model = write_model(tmp_path / "model.gguf", GENERATING[architecture]())
    facts = read_facts(model)
    for way, (arguments, options) in WAYS.items():
        figures = logged(engine_bin, model, arguments)
        for kind, mib in computed(facts, options).items():
            rounding = 0.0051 * len(figures[kind])
            assert mib == pytest.approx(sum(figures[kind]), abs=rounding), (way, kind)


def test_an_encoder_keeps_nothing(engine_bin: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", bert())
    assert logged(engine_bin, model, ("--embedding",)) == {"keys": [], "values": [], "states": []}
    assert sum(computed(read_facts(model), CacheOptions(CTX_TOKENS, SLOTS)).values()) == 0
    assert "bert" in WITHOUT_CACHE
