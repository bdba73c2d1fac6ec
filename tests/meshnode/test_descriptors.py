"""A node takes the open files that many workers need, where the system lets it."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from meshnode.descriptors import raise_open_files
print(raise_open_files(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "becomes"),
    [(256, 20_000, 8192), (256, 1024, 1024), (9000, 20_000, 9000), (64, 64, 64)],
)
def test_the_limit_is_raised_as_far_as_it_goes_and_never_lowered(
    soft: int, hard: int, becomes: int
) -> None:
    code = LIMITED.format(soft=soft, hard=hard)
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == [str(becomes), str(becomes), str(hard)]
