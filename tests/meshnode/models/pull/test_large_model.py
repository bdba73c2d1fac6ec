"""A model of 120 GB of which only the header exists, and holes: a part of it in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.conftest import require
from tests.lab.nginx import nginx_program, running_nginx

LAYERS = 80
ROWS, COLUMNS = 46_080, 8_192  # 1.5 GB at f32
MODEL_BYTES = 120 * 10**9
MAX_RSS_BYTES = 300 * 10**6

PULL_A_PART = """
import json, sys, trio
from pathlib import Path
from meshnode.models.pull.opening import open_reference
from meshnode.models.pull.pull import Pull, Supply
from meshnode.models.pull.reach import Reach, welcome
from meshnode.models.pull.reference import parse_reference
from meshnode.models.pull.remote_header import fetch_header
from meshnode.models.store.store import NewFile, Store
from meshnode.models.store.writer import SliceWriter

WANTED = ["blk.40.attn_norm.weight", "blk.79.attn_norm.weight", "blk.41.attn_q.weight"]

async def main():
    async with open_reference(parse_reference(sys.argv[1]), Reach(welcome, welcome)) as source:
        header = await fetch_header(source, 0)
        file = source.files[0]
        new = NewFile(file.name, file.size_bytes, header.data)
        folder = Store(Path(sys.argv[2])).create([new], None, source.validator).folder
        with SliceWriter(folder) as writer:
            await Pull(writer.missing(WANTED), [Supply(source)], writer).run()
            held = [tensor.name for tensor in writer.save().held]
    used = (folder / "model.gguf").stat().st_blocks * 512
    # ru_maxrss counts the parent's pages too
    rss = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps({"held": sorted(held), "used": used, "rss": rss, "header": len(header.data)}))

trio.run(main)
"""


def write_model(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(COLUMNS)
    writer.add_feed_forward_length(COLUMNS)
    writer.add_head_count(64)
    tokens = [f"token number {number}".encode() for number in range(150_000)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    kind = gguf.GGMLQuantizationType.F32
    for layer in range(LAYERS):
        name = "attn_q" if layer != 41 else "unlike"
        for part, shape in ((name, (ROWS, COLUMNS)), ("attn_norm", (COLUMNS,))):
            size_bytes = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            writer.add_tensor_info(
                f"blk.{layer}.{part}.weight",
                shape,
                np.dtype(np.float32),
                size_bytes,
                raw_dtype=kind,
            )
    small = 4 * 1024 * COLUMNS
    writer.add_tensor_info(
        "blk.41.attn_q.weight", (1024, COLUMNS), np.dtype(np.float32), small, raw_dtype=kind
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_a_part_of_a_model_that_is_larger_than_the_machine_comes_in_bounded_memory(
    tmp_path: Path,
) -> None:
    program = nginx_program()
    require("nginx", program is not None, "needs nginx (./just setup)")
    assert program is not None
    served = tmp_path / "served"
    served.mkdir()
    model = served / "model.gguf"
    write_model(model)
    os.truncate(model, MODEL_BYTES + 2 * 10**9)
    with (
        tempfile.TemporaryDirectory(prefix="mesh-nginx-") as scratch,
        running_nginx(program, served, Path(scratch)) as url,
    ):
        said = subprocess.run(
            [
                sys.executable,
                "-c",
                PULL_A_PART,
                f"{url}model.gguf",
                tmp_path / "models",
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
    told = json.loads(said.stdout)
    assert len(told["held"]) == 3
    assert told["rss"] <= MAX_RSS_BYTES
    wanted_bytes = 4 * COLUMNS * (2 + 1024) + told["header"]
    assert wanted_bytes <= told["used"] <= wanted_bytes * 1.03 + (1 << 20)
