"""A node knows the numbers of the GGUF format, and has not loaded what computes with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGUFValueType

from meshnode.models import gguf_constants

ROOT = Path(__file__).parent.parent.parent.parent


def test_the_numbers_are_those_of_the_package() -> None:
    ours = {int(kind): sizes for kind, sizes in gguf_constants.GGML_QUANT_SIZES.items()}
    assert ours == {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    assert {one.name: int(one) for one in gguf_constants.GGUFValueType} == {
        one.name: int(one) for one in GGUFValueType
    }


def test_a_node_does_not_load_numpy() -> None:
    """It was a fifth of an idle node's memory."""
    script = "import sys, meshnode.cli.node; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
