"""Fills a slice on a file system that becomes full midway, frees some of it, and goes on.

Arguments: a folder on that file system, the whole model's file. Says what was met, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from meshnode.errors import DiskFull
from meshnode.models.facts import read_facts
from meshnode.models.store import disk
from meshnode.models.store.disk import NoRoom
from meshnode.models.store.slice import open_slice
from meshnode.models.store.store import NewFile, Store
from meshnode.models.store.writer import SliceWriter

PIECE_BYTES = 50_000


def pull(folder: Path, model: Path, names: list[str]) -> None:
    with SliceWriter(folder) as writer, model.open("rb") as source:
        for span in writer.missing(names):
            for start in range(span.start, span.stop, PIECE_BYTES):
                stop = min(span.stop, start + PIECE_BYTES)
                source.seek(start)
                writer.write(0, start, memoryview(source.read(stop - start)))
                writer.done(0, start, stop)


def main(folder: Path, model: Path) -> None:
    disk.MARGIN_BYTES = 0
    size_bytes = model.stat().st_size
    (folder / "ballast").write_bytes(bytes(size_bytes))
    names = [tensor.name for tensor in read_facts(model).tensors]
    with model.open("rb") as source:
        header = source.read(min(tensor.offset for tensor in read_facts(model).tensors))
    made = Store(folder / "models").create([NewFile(model.name, size_bytes, header)], "", "")
    told: dict[str, object] = {}
    with SliceWriter(made.folder) as writer:
        try:
            writer.check_room(names)
        except NoRoom as error:
            told["beforehand"] = str(error)
    try:
        pull(made.folder, model, names)
    except DiskFull as error:
        told["midway"] = str(error)
    told["held"] = len(open_slice(made.folder).held)
    (folder / "ballast").unlink()
    pull(made.folder, model, names)
    found = open_slice(made.folder)
    told["complete"] = found.complete
    told["same"] = found.facts.path.read_bytes() == model.read_bytes()
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
