"""A process that fills a slice piece by piece, and is killed at a point that a test names.

Arguments: the slice's folder, the whole model's file, what to do (`pull` or `drop`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from meshnode.models.facts import read_facts
from meshnode.models.spans import Span
from meshnode.models.store import writer as writer_module
from meshnode.models.store.writer import SliceWriter

PIECE_BYTES = 30_000


def main(folder: Path, model: Path, action: str) -> None:
    writer_module.SAVE_EVERY_BYTES = 40_000
    names = [tensor.name for tensor in read_facts(model).tensors]
    with SliceWriter(folder) as writer, model.open("rb") as source:
        if action == "drop":
            writer.drop([name for name in names if name.startswith("blk.1.")])
            return
        for span in writer.missing(names):
            for start in range(span.start, span.stop, PIECE_BYTES):
                piece = Span(0, start, min(span.stop, start + PIECE_BYTES))
                source.seek(piece.start)
                writer.write(0, piece.start, memoryview(source.read(piece.size_bytes)))
                writer.done(0, piece.start, piece.stop)
                print(piece.stop, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
