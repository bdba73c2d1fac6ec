"""A model that is there as a whole, and one that has just begun to come."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.models.store.slice import Slice
from meshnode.models.store.store import Store
from tests.meshnode.models.store.slices import Whole, make_whole


@pytest.fixture
def whole(tmp_path: Path) -> Whole:
    return make_whole(tmp_path / "source")


@pytest.fixture
def made(tmp_path: Path, whole: Whole) -> Slice:
    return whole.create(Store(tmp_path / "models"))
