"""A draft model guesses tokens for one whose layers lie with workers: the answers stay the same.

The draft is the model itself with noise on its weights, and so guesses right more often than not.
It may be kept on this machine, or lie with workers too, which are then sent its weights.
"""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from tests.engine.answers import ask_at_once, ask_in_turn
from tests.engine.architectures import GENERATING
from tests.engine.blocks import Shape
from tests.engine.processes import llama_server, loads, mesh_env, rpc_servers
from tests.engine.random_models import F32, Encoded, random_weights, write_model
from tests.engine.test_architectures import PRECISE, PROMPTS, SEEDS, tokens

pytestmark = pytest.mark.engine

NOISE = 0.03


def noisy(name: str, shape: Shape) -> Encoded | None:
    if len(shape) == 1:
        return None
    values = random_weights(name, shape, SEEDS["llama"], tied=False)
    rng = np.random.default_rng(crc32(name.encode()))
    return Encoded(F32, values * (1 + NOISE * rng.standard_normal(shape, dtype=np.float32)))


@pytest.mark.parametrize("draft_is_lent", [False, True], ids=["draft kept", "draft lent"])
def test_a_draft_model_changes_nothing(engine_bin: Path, folder: Path, draft_is_lent: bool) -> None:
    model = write_model(folder / "model.gguf", GENERATING["llama"](), seed=SEEDS["llama"])
    draft = write_model(
        folder / "draft.gguf", GENERATING["llama"](), seed=SEEDS["llama"], encode=noisy
    )
    guesses = ["--spec-type", "draft-simple", "-md", str(draft), "-ctkd", "f32", "-ctvd", "f32"]
    if not draft_is_lent:
        guesses += ["--spec-draft-device", "none"]
    with llama_server(engine_bin, folder, model, *PRECISE, name="alone") as server:
        alone = ask_in_turn(server, PROMPTS)
    arguments = (*PRECISE, *guesses)
    with (
        rpc_servers(engine_bin, folder, model, 2) as workers,
        llama_server(
            engine_bin, folder, model, *arguments, rpc=workers, env=mesh_env(folder)
        ) as server,
    ):
        in_turn = ask_in_turn(server, PROMPTS)
        together = ask_at_once(server, PROMPTS)
    assert tokens(in_turn) == tokens(together) == tokens(alone)
    for answers in (in_turn, together):
        assert 0 < sum(a.accepted for a in answers) < sum(a.drafted for a in answers)
    sent = sum(load.sent_tensors for load in loads(folder / "report.jsonl"))
    assert (sent > 0) == draft_is_lent
