"""What a node does with slices of a model larger than any disk here; says how much memory it took.

Arguments: the store's folder, the whole model's file (a header and a hole).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from meshnode.models.catalog import Catalog
from meshnode.models.facts import read_facts
from meshnode.models.store.slice import held_manifest, open_slice
from meshnode.models.store.store import NewFile, Store
from meshnode.models.store.writer import SliceWriter

PIECE_BYTES = 16 * 2**20
LAYER = "blk.60."


def high_water_bytes() -> int:
    """Not ru_maxrss: that counts the pages of the process before, which was the tests'."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main(folder: Path, model: Path) -> None:
    facts = read_facts(model)
    with model.open("rb") as source:
        header = source.read(min(tensor.offset for tensor in facts.tensors))
        file = NewFile(model.name, model.stat().st_size, header)
        made = Store(folder).create([file], "here", "etag:1")
        layer = [t.name for t in facts.tensors if t.name.startswith(LAYER)][:4]
        with SliceWriter(made.folder) as writer:
            for span in writer.missing(layer):
                for start in range(span.start, span.stop, PIECE_BYTES):
                    stop = min(span.stop, start + PIECE_BYTES)
                    source.seek(start)
                    writer.write(0, start, memoryview(source.read(stop - start)))
                    writer.done(0, start, stop)
            freed_bytes = writer.drop(layer[-1:])
    (entry,) = Catalog([folder]).scan()
    print(
        json.dumps(
            {
                "size_bytes": entry.size_bytes,
                "held": [tensor.name for tensor in held_manifest(open_slice(made.folder)).tensors],
                "held_bytes": entry.held_bytes,
                "freed_bytes": freed_bytes,
                "resident_bytes": high_water_bytes(),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
