"""What a plan is made of, and what it says: which node holds which layers. Sans-IO.

What llama.cpp can place (src/llama-model.cpp, `load_tensors`; common/arg.cpp): a model is a row of
items, its layers and then the output. `-ngl` counts the items, from the end, that leave the local
CPU; so the local CPU holds the first items or none. The rest goes to the devices of `--device`, in
that order, by `--tensor-split`, which is exact when its numbers are counts that sum to `-ngl`. The
token embedding stays on the local CPU always. RPC devices are RPC0, RPC1, … in the order of the
`--rpc` endpoints and of each server's devices, used or not.

The order of places is the local CPU, the lenders, the local accelerators: one trip over the wire a
lender and token, and the logits, which are large, come off a local device where there is one. Where
there is none, the output layer may compute on the local CPU all the same (`output.py`): the counts
go on including it, as one on the last device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from meshnode.config import Objective, Split
from meshnode.models.kv import CacheOptions
from meshnode.pipeline.costs import PlanModel
from meshnode.pipeline.layers import LayerRange
from meshnode.pipeline.output import LAST_WORKER, OutputChoice
from meshnode.pipeline.speeds import (
    ASSUMED_CPU,
    ASSUMED_GPU,
    Links,
    Speed,
    Storage,
)
from meshnode.pipeline.stock import Stock


@dataclass(frozen=True)
class PlanDevice:
    """A device and what of its memory may be used. `name` is the node's own ("CPU", "CUDA0").
    `measured`: how fast it is, where that is known."""

    name: str
    usable_bytes: int
    is_gpu: bool
    measured: Speed | None = None

    @property
    def speed(self) -> Speed:
        return self.measured or (ASSUMED_GPU if self.is_gpu else ASSUMED_CPU)


@dataclass(frozen=True)
class PlanNode:
    """A machine. A lender's `devices` are those its rpc-server shows, in its order; the local
    node's end with its CPU. `bytes_per_s`: what its link carries, `rtt_s`: there and back, where
    that is known."""

    name: str
    is_local: bool
    devices: tuple[PlanDevice, ...]
    bytes_per_s: float | None = None
    rtt_s: float | None = None

    @property
    def in_use(self) -> tuple[PlanDevice, ...]:
        """The devices that layers may lie on: of a lender its accelerators, or else its CPU."""
        gpus = tuple(device for device in self.devices if device.is_gpu)
        return self.devices if self.is_local else gpus or self.devices

    @property
    def is_measured(self) -> bool:
        return all(device.measured for device in self.in_use)


@dataclass(frozen=True)
class PlanRequest:
    """`nodes`: one local, any number of lenders. `ctx_tokens` is what all `slots` share. `cache`
    stands for these and `kv_type` where llama-server is told more of caches.

    `layers` or `tensor_split` (one number a node, the local one first, then as in `nodes`)
    override the proportions. `output_may_stay`: the engine can compute the output on the local CPU
    though the last layers are a lender's.

    `objective`: what the plan is to be best at. None: at one answer's speed where every speed is
    measured; else alone where it fits, in proportion to memory where not.
    `stock`: what is on whose disk; None: all that a plan may ask for.
    `wire_bytes`: of one number of an activation on the wire.
    """

    model: PlanModel
    nodes: tuple[PlanNode, ...]
    ctx_tokens: int
    slots: int = 1
    kv_type: str = "f16"
    cache: CacheOptions | None = None
    split: Split = Split.AUTO
    layers: tuple[LayerRange, ...] | None = None
    tensor_split: tuple[float, ...] | None = None
    output_may_stay: bool = False
    objective: Objective | None = None
    links: Links = field(default_factory=Links)
    storage: Mapping[str, Storage] = field(default_factory=dict)
    stock: Stock | None = None
    wire_bytes: float = 4.0

    @property
    def local(self) -> PlanNode:
        return next(node for node in self.nodes if node.is_local)

    @property
    def is_measured(self) -> bool:
        """Whether nothing has to be assumed about speeds and links."""
        others = [node.name for node in self.nodes if not node.is_local]
        ways = ((self.local.name, name) for name in others)
        return all(node.is_measured for node in self.nodes) and all(
            self.links.is_measured(*pair) for pair in ways
        )


@dataclass(frozen=True)
class Share:
    """What one device holds: layers `first_layer` up to but not including `last_layer`.

    The local CPU has a share always, the first: the embedding is there even without layers.
    """

    node: str
    device: str
    first_layer: int
    last_layer: int
    has_output: bool
    weight_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def n_layers(self) -> int:
        return self.last_layer - self.first_layer

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True)
class Plan:
    """Shares in the order of the layers, and what llama-server is told.

    `rpc_nodes`: the lenders with a share, in the order of `--rpc`. `gpu_layers`: `-ngl`.
    `device_order`: `--device`, with a count each in `tensor_split`; both empty: the CPU alone.
    `output`: where the output computes, if not on the device of the last count. `why`: sentences
    for the user, of what decided; `left_out`: names of nodes and why they hold nothing.
    """

    shares: tuple[Share, ...]
    alone: bool
    gpu_layers: int
    tensor_split: tuple[int, ...]
    device_order: tuple[str, ...]
    rpc_nodes: tuple[str, ...]
    output: OutputChoice = LAST_WORKER
    why: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def weight_bytes(self) -> dict[str, int]:
        """What each node is to load, on all of its devices."""
        loads: Counter[str] = Counter()
        for share in self.shares:
            loads[share.node] += share.weight_bytes
        return loads
