"""How far a member is from others, as it says in its record: coarse, and legible to its mesh alone.

A record goes to all meshes that its member is in. A distance names the other end by a tag: a hash
of its key under the mesh's, so that who does not know the mesh learns neither who is in it nor who
is near. A distance is one of STEPS, each twice the one before, and stays until a round trip is
clearly beyond it: what wavers makes no news. Sans-IO.
"""

from __future__ import annotations

from blake3 import blake3

from tunnels.peer import PeerId

TAG_BYTES = 8
FIRST_STEP_S = 0.001
STEPS = 14
"""Step 0 is up to a millisecond, step 13 more than four seconds."""
CLEARLY = 1.25  # beyond a step's end, in either direction

Distance = tuple[bytes, int]
"""Tag and step."""


def tag(mesh: bytes, peer: PeerId) -> bytes:
    return blake3(peer.key, key=mesh).digest(TAG_BYTES)


def step_of(rtt_s: float, before: int | None = None) -> int:
    """The step of a round trip; the one `before` while it is not clearly another."""
    step = next((n for n in range(STEPS - 1) if rtt_s <= FIRST_STEP_S * 2**n), STEPS - 1)
    if before is None:
        return step
    least_s = FIRST_STEP_S * 2 ** (before - 1) / CLEARLY if before else 0.0
    most_s = FIRST_STEP_S * 2**before * CLEARLY
    return before if least_s <= rtt_s <= most_s else step


def at_most_s(step: int) -> float:
    """The longest round trip of a step, in seconds."""
    return float("inf") if step >= STEPS - 1 else FIRST_STEP_S * 2**step
