"""Round numbers along an axis of time. Sans-IO."""

from __future__ import annotations

from itertools import count

from meshnode.trace.wording import ms_number


def ticks(length_ns: int, at_most: int) -> list[tuple[int, str]]:
    """Times in ns and what is written at them: multiples of 1, 2 or 5 times a power of ten."""
    steps = (unit * 10**power for power in count() for unit in (1, 2, 5))
    step_ns = next(step for step in steps if length_ns // step < at_most)
    return [(at, _label(at, step_ns)) for at in range(0, length_ns + 1, step_ns)]


def _label(at_ns: int, step_ns: int) -> str:
    """As many digits as the step needs."""
    if step_ns >= 10**6:
        return f"{at_ns // 10**6:,}" if at_ns < 10**15 else ms_number(at_ns)
    digits = 6 - (len(str(step_ns)) - 1)
    return f"{at_ns / 1e6:.{digits}f}"
