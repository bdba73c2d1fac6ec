"""How many files and connections this process may have open."""

from __future__ import annotations

import resource
from contextlib import suppress

WANTED_OPEN_FILES = 8192
"""A worker costs its orchestrator about ten: links, streams, sockets to llama-server. Many systems
start a program with 256 or 1,024, and let it have more for the asking."""


def raise_open_files() -> int:
    """The limit from here on, as near to what is wanted as the system allows; what is started from
    here inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= WANTED_OPEN_FILES:
        return soft
    wanted = WANTED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_OPEN_FILES)
    with suppress(OSError, ValueError):  # macOS has a further limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
