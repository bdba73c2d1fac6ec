"""What a node tells its user: one `Event` for each thing that happened.

The node raises events, the CLI shows them (plain lines, JSON, live view). A secret is only ever
in an `invite` event, which is the product of the command, never in a log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    INVITE = "invite"  # data: line, join command for the other machine
    REPLY = "reply"  # data: line, what to run on the inviter's machine
    NODE = "node"  # who and where this node is
    MODELS = "models"
    PEER = "peer"  # a peer came or went
    PATH = "path"  # a peer is reached another way; data: link, address, relayed
    LEASE = "lease"  # lent or borrowed memory came or went
    PLAN = "plan"  # data: shares
    PROGRESS = "progress"  # a worker's load or pull goes on; data: node, done_bytes, total_bytes
    LOAD = "load"  # data: node, local_bytes, sent_bytes
    STAGE = "stage"  # the deployment's stage changed
    READY = "ready"  # data: url
    WARNING = "warning"


@dataclass(frozen=True)
class Event:
    kind: Kind
    text: str
    data: Mapping[str, object] = field(default_factory=dict)


Emit = Callable[[Event], None]
