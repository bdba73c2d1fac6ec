from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshnode.errors import ModelError
from meshnode.models.presence import engine_presence


def test_each_file_has_its_own_tensors_and_the_end_counts_them() -> None:
    slices = {Path("/m/a.gguf"): ["blk.0.x", "blk.1.x"], Path("/m/b.gguf"): []}
    assert engine_presence(slices) == (
        "mesh-presence\t1\n"
        "file\t0\t/m/a.gguf\n"
        "file\t1\t/m/b.gguf\n"
        "held\t0\tblk.0.x\n"
        "held\t0\tblk.1.x\n"
        "end\t2\n"
    )


def test_a_path_is_absolute_and_may_be_no_utf8(tmp_path: Path) -> None:
    text = engine_presence({Path(os.fsdecode(b"caf\xe9\tb.gguf")): []})
    data = text.encode(errors="surrogateescape")
    assert os.fsencode(Path.cwd()) + b"/caf\xe9\tb.gguf\n" in data


@pytest.mark.parametrize("slices", [{Path("/m/a\nb"): []}, {Path("/m/a"): ["b\nend\t0"]}])
def test_a_name_that_could_forge_a_line_is_refused(slices: dict[Path, list[str]]) -> None:
    with pytest.raises(ModelError, match="has a line break in its name"):
        engine_presence(slices)
