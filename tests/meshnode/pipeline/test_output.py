"""Where the output layer computes, why, and whose memory it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshnode.config import Split
from meshnode.errors import ResourceError, UsageError
from meshnode.pipeline.costs import PlanModel
from meshnode.pipeline.layers import parse_layers, parse_tensor_split
from meshnode.pipeline.output import LAST_WORKER, LastWorker, choose_output
from meshnode.pipeline.plan import Plan, PlanDevice, PlanNode, PlanRequest
from meshnode.pipeline.planner import make_plan
from tests.meshnode.pipeline.plans import GIB, MIB, local
from tests.meshnode.pipeline.plans import MODEL as EIGHT_LAYERS

# A token's logits are 39.1 KiB, its state 4 KiB.
MODEL = replace(EIGHT_LAYERS, n_embd=1024, n_attn=1024, n_ff=2048, n_vocab=10_000)


def lender(name: str, size_bytes: int = 16 * GIB, gpu: bool = False, **link: Any) -> PlanNode:
    return PlanNode(name, False, (PlanDevice("D0", size_bytes, gpu),), **link)


def plan(*nodes: PlanNode, model: PlanModel = MODEL, **changes: Any) -> Plan:
    fields: dict[str, Any] = {"split": Split.ALWAYS, "output_may_stay": True}
    return make_plan(PlanRequest(model, nodes, 1024, **(fields | changes)))


def by_hand(text: str, *nodes: PlanNode, **changes: Any) -> Plan:
    return plan(*nodes, layers=parse_layers(text), split=Split.AUTO, **changes)


def with_output(found: Plan) -> list[tuple[str, str]]:
    return [(share.node, share.device) for share in found.shares if share.has_output]


# -- by rule ----------------------------------------------------------------------------------


def test_logits_stay_off_the_wire_where_a_worker_holds_the_last_layers() -> None:
    found = plan(local(), lender("a"))
    assert found.output.device == "CPU"
    assert found.output.why.startswith(
        "the output stays here: a token is 4.0 KiB on the wire instead of 39.1 KiB of logits (about"
    )
    assert with_output(found) == [("local", "CPU")]


def test_what_llama_server_is_told_still_counts_the_output_as_the_last_devices() -> None:
    away = plan(local(), lender("a"), lender("b"), output_may_stay=False)
    found = plan(local(), lender("a"), lender("b"))
    assert away.output == LAST_WORKER
    assert sum(found.tensor_split) == found.gpu_layers
    assert found.gpu_layers == 1 + sum(share.n_layers for share in found.shares[1:])
    assert found.device_order == away.device_order == ("RPC0", "RPC1")


def test_its_memory_is_the_orchestrators_and_not_the_last_workers() -> None:
    asked = ("tower=0:7", local(), lender("tower"))
    away, home = by_hand(*asked, output_may_stay=False), by_hand(*asked)
    assert home.shares[0].weight_bytes - away.shares[0].weight_bytes == 20 * MIB
    assert away.shares[1].weight_bytes - home.shares[1].weight_bytes == 20 * MIB
    logits_bytes = 16 * 10_000 * 4
    assert away.shares[1].compute_bytes - home.shares[1].compute_bytes == logits_bytes
    assert home.gpu_layers == away.gpu_layers == 9


def test_a_tied_output_has_no_second_copy() -> None:
    tied = replace(MODEL, embedding_bytes=300 * MIB, output_bytes=301 * MIB, tied_bytes=300 * MIB)
    found = by_hand("tower=0:7", local(), lender("tower"), model=tied)
    assert found.shares[0].weight_bytes == 301 * MIB
    assert found.shares[1].weight_bytes == 800 * MIB


def test_a_gpu_here_with_room_for_no_layer_is_no_place_for_the_end_of_the_model() -> None:
    """Without its output the model would end on that GPU, which nothing would be gained by."""
    found = plan(local(900 * MIB, 20 * MIB), lender("a", 200 * MIB, gpu=True))
    assert with_output(found) == [("a", "D0")]
    assert found.output == LAST_WORKER


def test_an_orchestrator_without_room_for_it_leaves_it_to_the_last_worker() -> None:
    found = by_hand("tower=0:7", local(30 * MIB), lender("tower"))
    assert found.output == LAST_WORKER
    assert with_output(found) == [("tower", "D0")]


def test_a_last_worker_without_room_for_it_leaves_it_here() -> None:
    wide = replace(MODEL, output_bytes=400 * MIB)
    small = lender("tower", 900 * MIB)
    found = by_hand("tower=0:7", local(), small, model=wide)
    assert found.output.why == "the output stays here: there is no room for it on tower"
    with pytest.raises(ResourceError):
        by_hand("tower=0:7", local(), small, model=wide, output_may_stay=False)


def test_alone_or_with_the_last_layers_here_there_is_nothing_to_choose() -> None:
    assert plan(local(), lender("a"), split=Split.AUTO).output == LAST_WORKER
    found = plan(local(16 * GIB, 300 * MIB), lender("a"))
    assert found.output == LAST_WORKER
    assert with_output(found) == [("local", "CUDA0")]


def test_a_plan_that_cannot_be_is_refused_in_the_same_words() -> None:
    with pytest.raises(ResourceError, match="does not fit on local, a: "):
        plan(local(200 * MIB), lender("a", 200 * MIB))


# -- by cost ----------------------------------------------------------------------------------


def test_a_fast_card_on_a_fast_link_is_better_than_a_large_matrix_read_here() -> None:
    large = replace(MODEL, output_bytes=600 * MIB, n_vocab=150_000)
    fast = lender("tower", gpu=True, bytes_per_s=1e9)
    found = plan(local(), fast, model=large)
    assert (found.output.device, with_output(found)) == ("", [("tower", "D0")])
    assert found.output.why == (
        "the output is left to tower, though a token is 4.0 KiB on the wire instead of 585.9 KiB "
        "of logits here (about 41.9 ms here, 2.7 ms on tower)"
    )
    slow = replace(fast, bytes_per_s=10e6)
    assert plan(local(), slow, model=large).output.device == "CPU"
    assert plan(local(), replace(fast, bytes_per_s=None), model=large).output.device == ""


def test_between_two_processors_the_wire_decides() -> None:
    for bytes_per_s in (None, 1e6, 1e10):
        last = LastWorker("tower", is_gpu=False, bytes_per_s=bytes_per_s)
        assert choose_output(MODEL, last, "CPU").device == "CPU"


def test_speeds_that_are_known_decide_where_the_output_is() -> None:
    quick = LastWorker("tower", is_gpu=False, bytes_per_s=1e9, reads_bytes_per_s=1e12)
    assert choose_output(MODEL, quick, "CPU", 1e12).device == "CPU"
    found = choose_output(MODEL, quick, "CPU", 1e9)
    assert found.device == ""
    here_ms = (MODEL.output_bytes / 1e9 + MODEL.n_embd * 4 / 1e9) * 1e3
    assert f"(about {here_ms:.1f} ms here, " in found.why


# -- by hand ----------------------------------------------------------------------------------


def test_the_output_can_be_given_to_either_side_by_name() -> None:
    nodes = (local(), lender("tower"))
    here = by_hand("local=0:3,tower=4:7,local=output", *nodes)
    assert (here.output.device, here.output.why) == ("CPU", "the output stays here, as told")
    assert by_hand("local=output,tower=0:7", *nodes).output.device == "CPU"
    there = by_hand("local=0:3,tower=4:output", *nodes)
    assert (there.output, with_output(there)) == (LAST_WORKER, [("tower", "D0")])
    assert by_hand("local=0:3,tower=4:7", *nodes).output.device == "CPU"
    assert by_hand("local=0:7,local=output", *nodes).alone


def test_a_card_here_takes_the_output_alone_as_the_last_of_the_items() -> None:
    nodes = (local(16 * GIB, GIB), lender("tower"))
    found = by_hand("tower=0:7,local=output", *nodes)
    assert (found.output, with_output(found)) == (LAST_WORKER, [("local", "CUDA0")])
    found = by_hand("local=0:3,tower=4:7,local=output", *nodes)
    assert (found.output.device, with_output(found)) == ("CPU", [("local", "CPU")])


def test_an_output_told_to_stay_without_room_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"no room for the output of glm, 20\.0 MiB: leave it"):
        by_hand("tower=0:7,local=output", local(30 * MIB), lender("tower"))


def test_an_engine_that_cannot_is_not_asked_to() -> None:
    nodes = (local(), lender("tower"))
    with pytest.raises(UsageError, match="local cannot hold the layers from 8 on"):
        by_hand("tower=0:7,local=output", *nodes, output_may_stay=False)


def test_proportions_say_nothing_of_the_output() -> None:
    found = plan(local(), lender("a"), tensor_split=parse_tensor_split("1,1"), split=Split.AUTO)
    assert (found.output.device, found.tensor_split) == ("CPU", (5,))


def test_layers_that_predict_further_tokens_stay_with_it() -> None:
    further = replace(MODEL, n_nextn=1)
    asked = ("tower=0:7", local(), lender("tower"))
    away = by_hand(*asked, model=further, output_may_stay=False)
    home = by_hand(*asked, model=further)
    moved = home.shares[0].total_bytes - away.shares[0].total_bytes
    cache_bytes = 1024 * 1024
    assert moved == (100 + 20) * MIB + cache_bytes + 16 * 10_000 * 4
    assert away.shares[1].total_bytes - home.shares[1].total_bytes == moved
    assert home.tensor_split == away.tensor_split
