"""A real file system that runs full: told beforehand, told midway, and gone on from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import require
from tests.meshnode.models.store import small_disk
from tests.meshnode.models.store.slices import make_whole

OWN_DISK = ("unshare", "--user", "--map-root-user", "--mount", "/bin/sh", "-c")
MOUNT = 'mount -t tmpfs -o size="$1" mesh "$0" && shift && exec "$@"'


def test_a_disk_that_runs_full_loses_nothing_that_was_done(tmp_path: Path) -> None:
    works = subprocess.run(
        [*OWN_DISK, "mount -t tmpfs t /mnt"], check=False, capture_output=True, text=True
    )
    require("namespaces", works.returncode == 0, works.stderr.strip())
    whole = make_whole(tmp_path / "source", layers=4, width=256, ffn=512)
    size_bytes = whole.facts.path.stat().st_size
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        [
            *(*OWN_DISK, MOUNT, str(tmp_path / "disk"), str(int(size_bytes * 1.6))),
            *(sys.executable, small_disk.__file__, str(tmp_path / "disk"), str(whole.facts.path)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    told = json.loads(done.stdout)
    assert "MiB more in" in told["beforehand"]
    assert "what was pulled so far stays" in told["midway"]
    assert 0 < told["held"] < len(whole.all_names)
    assert told["complete"]
    assert told["same"]
