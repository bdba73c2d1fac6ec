"""The numbers of the GGUF format, from the gguf package's own table.

That file alone is loaded: the package as a whole brings numpy, 19 MB of memory for a node that does
nothing with it.
"""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


def _table() -> ModuleType:
    package = find_spec("gguf")  # of a package at the top this imports nothing
    assert package is not None, "gguf is among the dependencies"
    assert package.origin is not None
    path = Path(package.origin).with_name("constants.py")
    spec = spec_from_file_location(f"{__name__}_table", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_TABLE = _table()
GGML_QUANT_SIZES: dict[Any, tuple[int, int]] = _TABLE.GGML_QUANT_SIZES
GGUFValueType: Any = _TABLE.GGUFValueType


def file_type_name(number: object) -> str:
    """Of `general.file_type`, as the files are called by it: `Q4_K_M`; empty for an unknown one."""
    if not isinstance(number, int) or isinstance(number, bool):
        return ""
    known = {int(kind): kind.name for kind in _TABLE.LlamaFileType}
    return str(known.get(number, "")).removeprefix("MOSTLY_").removeprefix("ALL_")
