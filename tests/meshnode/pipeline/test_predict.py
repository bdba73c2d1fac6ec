"""Predictions against arithmetic by hand, and against what docs/benchmarks.md measured."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from meshnode.models.kv import Cells, LayerMemory
from meshnode.pipeline.costs import PlanModel
from meshnode.pipeline.layers import parse_layers
from meshnode.pipeline.plan import PlanDevice, PlanNode, PlanRequest
from meshnode.pipeline.planner import make_plan
from meshnode.pipeline.predict import Pricing, Site, Stage, load_s, predict, ready_s
from meshnode.pipeline.speeds import ASSUMED_LINK, Link, Links, Speed, Storage
from meshnode.pipeline.work import ANSWER, PROMPT, Load, Work, work_of
from tests.meshnode.pipeline.plans import GIB, MIB, MODEL

HOME = Site("local", "CPU", Speed(10.0, 1000.0), is_local=True)
FAST = 1e15


def worker(name: str, speed: Speed | None = None, device: str = "D0") -> Site:
    return Site(name, device, speed or HOME.speed)


def evenly(sites: list[Site], n_items: int) -> list[Stage]:
    """Layers in equal parts, the output with the last."""
    cuts = [n_items * part // len(sites) for part in range(len(sites) + 1)]
    return [Stage(s, a, b) for s, (a, b) in zip(sites, itertools.pairwise(cuts), strict=True)]


def seconds(
    stages: list[Stage],
    load: Load = ANSWER,
    *,
    work: Work | None = None,
    links: Links | None = None,
    at_home: bool = False,
) -> float:
    work = work or Work((10.0,) * 8 + (20.0,), (10.0,) * 8 + (0.0,), 0.0, 0.0)
    pricing = Pricing(work, links or far(0.0), load, HOME)
    return load_s(pricing, HOME, stages, output_at_home=at_home)


def far(rtt_s: float, bytes_per_s: float = FAST, *, ring: bool = True) -> Links:
    everyone = ("local", "a", "b", "c")
    pairs = itertools.permutations(everyone, 2)
    return Links({pair: Link(rtt_s, bytes_per_s) for pair in pairs}, ring=ring)


# -- tokens -----------------------------------------------------------------------------------


def test_alone_a_token_takes_as_long_as_its_weights_take_to_read() -> None:
    assert seconds([Stage(HOME, 0, 9)]) == pytest.approx(100 / 10)


def test_machines_more_add_no_speed_to_one_answer() -> None:
    spread = evenly([HOME, worker("a"), worker("b")], 9)
    assert seconds(spread) == pytest.approx(100 / 10)


@pytest.mark.parametrize("workers", ["a", "ab", "abc"])
def test_a_ring_has_one_hop_more_than_workers_and_a_star_two_each(workers: str) -> None:
    stages = evenly([worker(name) for name in workers], 9)
    alone_s = 100 / 10
    assert seconds(stages, links=far(2.0)) == pytest.approx(alone_s + (len(workers) + 1) * 1.0)
    star = far(2.0, ring=False)
    assert seconds(stages, links=star) == pytest.approx(alone_s + 2 * len(workers) * 1.0)


def test_a_parted_pair_goes_by_way_of_the_orchestrator() -> None:
    links = replace(far(2.0), parted=frozenset({("b", "a")}))
    stages = evenly([worker("a"), worker("b")], 9)
    assert seconds(stages, links=links) == pytest.approx(10 + 4 * 1.0)


def test_two_devices_of_one_worker_hand_over_by_way_of_the_orchestrator() -> None:
    stages = evenly([worker("a"), worker("a", device="D1")], 9)
    assert seconds(stages, links=far(2.0)) == pytest.approx(10 + 4 * 1.0)


def test_local_devices_need_no_hop_and_an_end_here_no_way_back() -> None:
    gpu = Site("local", "CUDA0", HOME.speed, is_local=True)
    assert seconds(evenly([HOME, gpu], 9), links=far(2.0)) == pytest.approx(10)
    around = evenly([HOME, worker("a"), gpu], 9)
    assert seconds(around, links=far(2.0)) == pytest.approx(10 + 2 * 1.0)


def test_logits_cross_the_wire_unless_the_output_is_at_home() -> None:
    work = Work((10.0,) * 8 + (20.0,), (10.0,) * 8 + (0.0,), hidden_bytes=4.0, logits_bytes=400.0)
    links = far(0.0, 100.0)
    stages = [Stage(worker("a", Speed(20.0, FAST)), 0, 9)]
    assert seconds(stages, work=work, links=links) == pytest.approx(100 / 20 + 0.04 + 4.0)
    assert seconds(stages, work=work, links=links, at_home=True) == pytest.approx(
        80 / 20 + 20 / 10 + 0.04 + 0.04
    )


def test_each_device_in_use_takes_its_fixed_time() -> None:
    slow_to_start = Speed(10.0, FAST, token_s=0.5)
    stages = evenly([worker("a", slow_to_start), worker("b", slow_to_start)], 9)
    assert seconds(stages) == pytest.approx(10 + 2 * 0.5)


def test_streams_share_what_is_read_until_arithmetic_is_the_bound() -> None:
    whole = [Stage(HOME, 0, 9)]
    assert seconds(whole, Load(0, 1, 50)) == pytest.approx(10)
    assert seconds(whole, Load(0, 1, 200)) == pytest.approx(200 * 100 / 1000)


def test_each_stream_has_a_cache_of_its_own() -> None:
    work = Work((10.0,) * 8 + (20.0,), (10.0,) * 8 + (0.0,), 0.0, 0.0, kept=(0.5,) * 8)
    whole = [Stage(HOME, 0, 9)]
    assert seconds(whole, work=work) == pytest.approx((100 + 512 * 4) / 10)
    short = Load(0, 3, 2, depth_tokens=5)
    assert seconds(whole, short, work=work) == pytest.approx(3 * (100 + 2 * 5 * 4) / 10)


def test_each_layer_takes_what_it_takes_of_any_batch_and_of_each_tokens_numbers() -> None:
    speed = Speed(10.0, FAST, layer_s=0.25, number_s=0.001)
    work = Work((10.0,) * 8 + (20.0,), (10.0,) * 8 + (0.0,), 0.0, 0.0, numbers=(30.0,) * 8)
    whole = [Stage(worker("a", speed), 0, 9)]
    assert seconds(whole, work=work) == pytest.approx(10 + 8 * (0.25 + 0.03))
    assert seconds(whole, PROMPT, work=work) == pytest.approx(8 * (0.25 + 512 * 0.03))


# -- prompts ----------------------------------------------------------------------------------


def test_a_prompt_is_arithmetic_and_its_last_token_alone_reaches_the_output() -> None:
    assert seconds([Stage(HOME, 0, 9)], PROMPT) == pytest.approx(512 * 80 / 1000)


def test_a_prompts_tokens_attend_to_those_before_them_half_of_it() -> None:
    work = Work((10.0,) * 8 + (20.0,), (10.0,) * 8 + (0.0,), 0.0, 0.0, queries=(2.0,) * 8)
    whole = [Stage(worker("a", Speed(10.0, 1000.0, attention_s=0.001)), 0, 9)]
    attending_s = 512 * 256 * 8 * 2 * 0.001
    assert seconds(whole, PROMPT, work=work) == pytest.approx(512 * 80 / 1000 + attending_s)


def test_a_prompt_skips_what_follows_the_last_layers_attention() -> None:
    """Its queries and keys have a quarter of 100 MiB, and 64 + 64 + 512 numbers are no more."""
    narrow = replace(MODEL, memory=(LayerMemory((Cells(64, 64),)),) * 8, n_ff=256)
    work = work_of(narrow)
    share = 64 * 4 / (64 * 4 + 3 * 256)
    assert work.done[:8] == (100 * MIB,) * 7 + (100 * MIB * share,)
    assert work.read[7] == 100 * MIB
    slow = Speed(FAST, FAST, number_s=1.0)
    sums = work.piece_sums(slow, 1.0, 0.0)
    assert sums[8] - sums[7] == pytest.approx((2 * 64 + 64 + 256) * share)
    guessing = work_of(replace(narrow, n_nextn=1))
    assert guessing.done[5:8] == (100 * MIB, 100 * MIB * share, 0)


def test_pieces_follow_each_other_through_a_ring() -> None:
    """Four pieces over two equal workers: five times half of a piece's time."""
    stages = [Stage(worker("a"), 0, 4), Stage(worker("b"), 4, 9)]
    half_s = 128 * 40 / 1000
    assert seconds(stages, PROMPT) == pytest.approx(5 * half_s)
    assert seconds(stages, PROMPT, links=far(0.0, ring=False)) == pytest.approx(8 * half_s)


def test_a_slow_wire_bounds_the_pieces() -> None:
    work = Work((10.0,) * 8 + (20.0,), (10.0,) * 8 + (0.0,), hidden_bytes=1.0, logits_bytes=0.0)
    stages = [Stage(worker("a"), 0, 4), Stage(worker("b"), 4, 9)]
    half_s = 128 * 40 / 1000
    links = far(0.0, 10.0)  # a piece takes 12.8 s to a, and to b
    assert seconds(stages, PROMPT, work=work, links=links) == pytest.approx(
        2 * half_s + 2 * 12.8 + 3 * 12.8
    )


# -- what was measured ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "rtt_ms", "tok_s"),
    # docs/benchmarks.md: "By delay", ours, the output at home; RTT and one-way columns
    [
        *((2, rtt, tok) for rtt, tok in ((5, 44.5), (10, 32.1), (20, 21.1), (30, 16.6))),
        *((2, rtt, tok) for rtt, tok in ((40, 13.4), (60, 9.4))),
        *((3, rtt, tok) for rtt, tok in ((5, 40.3), (10, 29.5), (20, 18.5), (30, 12.8))),
        *((3, rtt, tok) for rtt, tok in ((40, 10.6), (60, 7.3))),
    ],
)
def test_what_was_measured_under_delays_is_predicted(
    workers: int, rtt_ms: float, tok_s: float
) -> None:
    no_delay_s = {2: 1 / 60.3, 3: 1 / 70.9}[workers]
    work = Work((1.0,) * 22 + (0.0,), (1.0,) * 22 + (0.0,), 0.0, 0.0)
    speed = Speed(22 / no_delay_s, FAST)
    stages = evenly([worker(name, speed) for name in "abc"[:workers]], 23)
    predicted = 1 / seconds(stages, work=work, links=far(rtt_ms / 1000))
    assert predicted == pytest.approx(tok_s, rel=0.12)


# -- whole plans ------------------------------------------------------------------------------

MEASURED = Speed(10e9, 200e9)


def request(**changes: object) -> PlanRequest:
    here = PlanNode("local", True, (PlanDevice("CPU", 16 * GIB, False, MEASURED),))
    lenders = [
        PlanNode(name, False, (PlanDevice("CPU", 16 * GIB, False, MEASURED),)) for name in "ab"
    ]
    return replace(
        PlanRequest(MODEL, (here, *lenders), ctx_tokens=1024, links=far(10e-3, 1e8)),
        **changes,  # type: ignore[arg-type]
    )


def test_a_plan_comes_to_what_its_stages_do() -> None:
    what = request(layers=parse_layers("local=0:1,a=2:4,b=5:output"))
    found = predict(what, make_plan(what))
    read = 820 * MIB + 8 * 1024 * 512  # weights, and the cache of 512 tokens
    hops_s = 3 * 5e-3 + (2 * 64 * 4 + 1000 * 4) / 1e8
    assert 1 / found.decode_tok_s == pytest.approx(read / 10e9 + hops_s)
    assert found.is_measured
    assert 512 / found.prefill_tok_s > 512 * 800 * MIB / 200e9 / 2
    assert found.crowd_tok_s > found.decode_tok_s
    assert set(found.memory_bytes) == {"local", "a", "b"}
    assert found.ready_s == pytest.approx(0.3 + 320 * MIB / 500e6 + 7 * 10e-3)


def test_an_output_at_home_is_counted_there() -> None:
    away = request(layers=parse_layers("a=0:output"))
    home = request(layers=parse_layers("a=0:7,local=output"), output_may_stay=True)
    plans = make_plan(away), make_plan(home)
    assert plans[1].output.device == "CPU"
    saved_s = (1000 - 64) * 4 / 1e8
    assert 1 / predict(away, plans[0]).decode_tok_s - 1 / predict(
        home, plans[1]
    ).decode_tok_s == pytest.approx(saved_s)


def test_of_a_mixture_and_of_guessing_layers_only_what_a_token_uses_is_read() -> None:
    mixture = replace(MODEL, read_bytes=(25 * MIB,) * 8, n_nextn=1)
    work = work_of(mixture, wire_bytes=2.0)
    assert work.read[:8] == (25 * MIB,) * 7 + (0,)
    assert work.kept == (1024,) * 7 + (0,)
    assert work.queries == (64,) * 7 + (0,)
    no_cache = replace(mixture, memory=(LayerMemory(),) * 8)
    assert work_of(no_cache).queries == (0,) * 8
    assert work.read[work.output] == 20 * MIB
    assert work.done[work.output] == 0
    assert (work.hidden_bytes, work.logits_bytes) == (128, 4000)


def test_the_slowest_node_decides_when_all_is_ready() -> None:
    storage = {"a": Storage(missing_bytes=600, disk_bytes_per_s=100, pull_bytes_per_s=10)}
    found = ready_s({"local": 100, "a": 1000}, storage, far(1.0), "local")
    assert found == pytest.approx(0.3 + 60 + 10 + 7)
    assert ready_s({"local": 500}, {}, Links(), "local") == pytest.approx(0.3 + 500 / 500e6)


def test_what_nobody_measured_is_assumed_and_says_so() -> None:
    links = Links({("local", "a"): Link(8e-3, 5e6), ("b", "local"): Link(4e-3, 9e6)})
    assert links.between("local", "b", "local") is ASSUMED_LINK
    guessed = links.between("b", "a", "local")
    assert guessed == Link(8e-3, 5e6, is_measured=False)
    assert not replace(request(), links=links).is_measured
    bare = replace(MODEL, name="m")
    assert isinstance(bare, PlanModel)
    unmeasured = PlanDevice("CPU", GIB, False), PlanDevice("X", GIB, True)
    assert unmeasured[0].speed.decode_bytes_per_s < unmeasured[1].speed.decode_bytes_per_s
    assert not any(device.speed.is_measured for device in unmeasured)
