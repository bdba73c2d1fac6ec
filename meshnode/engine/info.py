"""What `mesh engine info` tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meshnode.engine.build import find_built
from meshnode.engine.cache import Engine, engine_cache_dir
from meshnode.engine.devices import Device, list_devices
from meshnode.engine.errors import EngineMissing
from meshnode.engine.patches import read_series


@dataclass(frozen=True)
class EngineInfo:
    engine: Engine
    patches: tuple[str, ...]
    upstream: str
    stock: Path | None  # the unpatched engine's bin folder, if it is built
    devices: tuple[Device, ...]
    cache: Path


def engine_info(*, stock: bool = False, backend: str | None = None) -> EngineInfo:
    """Raises `EngineMissing` when nothing is built for the present source and patches."""
    engine = find_built(stock=stock, backend=backend)
    if engine is None:
        raise EngineMissing(stock=stock)
    series = read_series()
    unpatched = find_built(stock=True, backend=engine.backend)
    return EngineInfo(
        engine=engine,
        patches=() if stock else tuple(patch.stem for patch in series.patches),
        upstream=f"{series.upstream.package} {series.upstream.version}",
        stock=unpatched.bin_dir if unpatched else None,
        devices=list_devices(engine),
        cache=engine_cache_dir(),
    )
