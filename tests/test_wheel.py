"""What `pip install .` installs is whole: the patches and the demo model travel in the wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches" / "llama.cpp"


def test_the_wheel_carries_patches_model_and_command(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*build, "--wheel-dir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        packed = {
            Path(name).name: archive.read(name)
            for name in names
            if name.startswith("meshnode/engine/_patches/llama.cpp/")
        }
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "mesh = meshnode.cli.main:main" in archive.read(entry_points).decode()
    assert packed == {path.name: path.read_bytes() for path in PATCHES.iterdir()}
    assert "meshnode/demo/mesh-demo.gguf" in names
    assert not [name for name in names if name.startswith("tests/")]
