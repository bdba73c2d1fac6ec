"""Commands as a user types them, run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Mesh = Callable[..., tuple[int, str, str]]
"""Its arguments make exit code, what it says, what it complains of."""


def told(mesh: Mesh, *arguments: object) -> Any:
    """What it says in JSON, and that it complains of nothing."""
    code, out, complaint = mesh(*arguments, "--json")
    assert (code, complaint) == (0, "")
    return json.loads(out)
