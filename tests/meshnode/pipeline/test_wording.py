from __future__ import annotations

import pytest

from meshnode.pipeline.wording import layers_text, work_text


@pytest.mark.parametrize(
    ("first", "last", "output", "layers", "work"),
    [
        (0, 4, False, "0-3", "layers 0-3"),
        (4, 8, True, "4-7 and output", "layers 4-7 and output"),
        (7, 8, False, "7", "layer 7"),
        (7, 8, True, "7 and output", "layer 7 and output"),
        (8, 8, True, "output", "output"),
        (0, 0, False, "none", "input"),
    ],
)
def test_a_share_in_words(first: int, last: int, output: bool, layers: str, work: str) -> None:
    assert layers_text(first, last, output) == layers
    assert work_text(first, last, output) == work
