"""Machines described in a file, and files that describe none."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import UsageError
from meshnode.pipeline.speeds import Link, Storage
from meshnode.pipeline.what_if import WhatIf, parse_what_if

GIB = 2**30
TWO = """
[[node]]
name = "laptop"
memory = "16G"
decode_gb_s = 60
prefill_tok_s = 90

[[node]]
name = "tower"
memory = "32G"
has_model = false
pull_mbit_s = 200
disk_mb_s = 1000
[[node.device]]
name = "CUDA0"
memory = "24G"
decode_gb_s = 700
token_ms = 0.5

[[link]]
between = ["laptop", "tower"]
rtt_ms = 3
mbit_s = 400
"""


def read(text: str) -> WhatIf:
    return parse_what_if(text, "nodes.toml", token_bytes=1e9)


def test_machines_links_and_disks_are_read() -> None:
    found = read(TWO)
    laptop, tower = found.nodes
    assert (laptop.is_local, tower.is_local) == (True, False)
    assert [(d.name, d.usable_bytes, d.is_gpu) for d in tower.devices] == [
        ("CUDA0", 24 * GIB, True),
        ("CPU", 32 * GIB, False),
    ]
    assert laptop.devices[0].speed.decode_bytes_per_s == 60e9
    assert laptop.devices[0].speed.prefill_bytes_per_s == 90 * 1e9
    card = tower.devices[0].speed
    assert (card.decode_bytes_per_s, card.token_s) == (700e9, 0.0005)
    assert card.prefill_bytes_per_s == pytest.approx(40 * 700e9)
    assert tower.devices[1].measured is None
    assert found.links.pairs["laptop", "tower"] == Link(0.003, 50e6)
    assert found.links.pairs["tower", "laptop"] == Link(0.003, 50e6)
    assert found.links.ring
    assert found.storage["tower"] == Storage(0, 1e9, 25e6)
    assert found.without_model == {"tower"}


def test_a_link_may_be_given_for_one_direction_and_a_ring_denied() -> None:
    found = read(
        'ring = false\nlink = [{from = "a", to = "b", rtt_ms = 8}]\n'
        '[[node]]\nname = "a"\nmemory = "1G"\n[[node]]\nname = "b"\nmemory = "1G"\n'
    )
    assert set(found.links.pairs) == {("a", "b")}
    assert not found.links.ring


def test_a_worker_may_have_cards_alone() -> None:
    found = read(TWO.replace('memory = "32G"\n', ""))
    assert [device.name for device in found.nodes[1].devices] == ["CUDA0"]


NODE = '[[node]]\nname = "a"\nmemory = "1G"\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("node = [", "its end: this is no TOML: Invalid value"),
        ("[[node]\n", r"nodes.toml, line 1: this is no TOML: "),
        ("", "line 1: it describes no node"),
        ("colour = 3\n" + NODE, "line 1: 'colour' is unknown: there are node, link, ring"),
        (NODE + "decode_gbs = 3\n", "line 4: 'decode_gbs' is unknown: there are name, memory"),
        (NODE + 'speed.of = "x"\n', "line 4: 'speed' is unknown"),
        (NODE + NODE, "line 5: two nodes are named a"),
        ('[[node]]\nmemory = "1G"\n', "line 1: name is missing"),
        ('[[node]]\nname = "a"\n', "line 1: memory is missing"),
        ('[[node]]\nname = "a"\nmemory = "lots"\n', "line 3: 'lots' is not a size"),
        ('[[node]]\nname = "a"\nmemory = 12\n', "line 3: memory is text, not 12: write memory ="),
        (NODE + "decode_gb_s = 0\n", "line 4: decode_gb_s is a number from 1e-06 to 1e.12, not 0"),
        (NODE + "decode_gb_s = nan\n", "line 4: decode_gb_s is a number from .*, not nan"),
        (NODE + "token_ms = true\n", "line 4: token_ms is a number"),
        (NODE + 'has_model = "no"\n', "line 4: has_model is true or false, not 'no'"),
        (NODE + 'device = ["x"]\n', r"line 4: write \[\[device\]\] for each device"),
        ("node = 3\n", r"line 1: write \[\[node\]\] for each node"),
        (NODE + '[[node.device]]\nname = "CPU"\nmemory = "1G"\n', "line 1: devices need names"),
        (NODE + '[[node.device]]\nname = "X"\nkind = 1\n', "line 6: 'kind' is unknown"),
        (NODE + "[[link]]\nrtt_ms = 3\n", "line 4: a link needs between"),
        (NODE + '[[link]]\nbetween = "a"\n', "line 4: a link needs between"),
        (NODE + '[[link]]\nbetween = ["a", "b"]\n', "line 5: a link is between two .* a and b"),
        (NODE + "[[link]]\nbetween = [[], {}]\n", "line 5: a link is between two"),
        (NODE + "token_ms = 1" + 400 * "0", "line 4: token_ms is a number"),
        ("node = " + 5000 * "[", "its end: this is no TOML: brackets too deep"),
        (NODE + '[[link]]\nfrom = "a"\n', "line 4: a link needs between"),
        (NODE + '[[link]]\nbetween = ["a", "b"]\nfrom = "a"\n', "line 4: a link needs between"),
        (NODE + "decode_gb_s = 1e308\n", r"line 4: .* from 1e-06 to 1e.12, not 1e.308"),
        (NODE + "prefill_tok_s = 5e-324\n", r"line 4: prefill_tok_s is a number from 1e-06"),
        (NODE + "token_ms = -1\n", "line 4: token_ms is a number from 0 to"),
        (NODE + f"token_ms = {'9' * 5000}\n", "its end: this is no TOML: a number too long"),
        (NODE.replace('"a"', '"x\\ny"'), r"line 2: 'x\\ny' is no name: 64 visible characters"),
        (NODE.replace('"a"', '"\\u001b[31m"'), r"line 2: .* is no name"),
        (NODE.replace('"a"', '"\\u202Ea"'), r"line 2: .* is no name"),
        (NODE.replace('"a"', '"a=0,b"'), r"line 2: 'a=0,b' is no name: .* no , or ="),
        (NODE.replace('"a"', f'"{"n" * 65}"'), "line 2: .* is no name"),
        (NODE * 257, "line 769: it describes 257 nodes: 256 at most"),
    ],
)
def test_what_makes_no_sense_is_told_with_its_line(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        read(text)


def test_a_link_is_described_once() -> None:
    two = NODE + NODE.replace('"a"', '"b"')
    there = '[[link]]\nfrom = "a"\nto = "b"\nrtt_ms = 1\n'
    back = '[[link]]\nfrom = "b"\nto = "a"\nrtt_ms = 9\n'
    found = read(two + there + back).links.pairs
    assert (found["a", "b"].rtt_s, found["b", "a"].rtt_s) == (1e-3, 9e-3)
    with pytest.raises(UsageError, match="line 15: a second link from a to b: write one"):
        read(two + there + back + '[[link]]\nbetween = ["a", "b"]\n')


def test_the_fastest_device_there_could_be_needs_no_prompts() -> None:
    (node,) = read(NODE + "decode_gb_s = 1e12\n").nodes
    assert node.devices[0].speed.prefill_bytes_per_s > 1e21


def test_names_may_be_of_any_script() -> None:
    (node,) = read(NODE.replace('"a"', '"läptop 🦊"')).nodes
    assert node.name == "läptop 🦊"


@given(st.text(alphabet='[]node="ax1.,\n{}link betwmry', max_size=60))
def test_any_text_is_read_or_refused_in_a_sentence(text: str) -> None:
    with contextlib.suppress(UsageError):
        read(text)
