"""What cannot be loaded ends in one sentence: never an abort, never silently other weights."""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.manifests import ROOT, write_manifest, write_roots
from tests.engine.processes import (
    EngineFailed,
    alone,
    greedy_tokens,
    llama_server,
    loads,
    mesh_env,
    rpc_server,
)

pytestmark = pytest.mark.engine


def _touch(file: Path) -> None:
    facts = file.stat()
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000))


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4096)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(_touch, "it was written to", id="written to"),
        pytest.param(_truncate, "its size changed", id="cut off"),
    ],
)
@pytest.mark.parametrize("when", ["before the server starts", "after it has started"])
def test_a_file_that_changed_after_the_lease_fails_the_load_in_a_sentence(
    engine_bin: Path,
    folder: Path,
    model: Path,
    change: Callable[[Path], None],
    reason: str,
    when: str,
) -> None:
    expected = alone(engine_bin, folder, model)
    copy = Path(shutil.copy(model, folder / "copy.gguf"))
    manifest = write_manifest(folder / "manifest", [copy])
    roots = write_roots(folder / "roots", [model])
    if when == "before the server starts":
        change(copy)
    with rpc_server(engine_bin, folder, "--gguf-manifest", manifest) as worker:
        if when == "after it has started":
            change(copy)
        with (
            pytest.raises(EngineFailed) as failed,
            llama_server(engine_bin, folder, model, rpc=[worker], env=mesh_env(folder, roots)),
        ):
            pass
        assert failed.value.returncode == 1
        (sentence,) = [
            line for line in failed.value.log.splitlines() if "could not load tensor" in line
        ]
        assert worker.address in sentence
        assert re.search(r"could not load tensor \S+\.weight from its file copy\.gguf", sentence)
        assert reason in sentence
        (load,) = loads(folder / "report.jsonl")
        assert load.failures > 0
        assert load.first_failure is not None
        assert load.first_failure["file"] == "copy.gguf"
        assert reason in load.first_failure["reason"]

        # the server outlives it: without the stale root, everything is sent and right
        assert worker.alive
        with llama_server(engine_bin, folder, model, rpc=[worker]) as server:
            assert greedy_tokens(server) == expected


def test_a_file_missing_from_the_disk_fails_the_load_in_a_sentence(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    copy = Path(shutil.copy(model, folder / "copy.gguf"))
    manifest = write_manifest(folder / "manifest", [copy])
    copy.unlink()
    roots = write_roots(folder / "roots", [model])
    with (
        rpc_server(engine_bin, folder, "--gguf-manifest", manifest) as worker,
        pytest.raises(EngineFailed, match="it cannot be opened: No such file"),
        llama_server(engine_bin, folder, model, rpc=[worker], env=mesh_env(folder, roots)),
    ):
        pass


HEADER = struct.Struct("<4sIQQ")


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _tensor(
    name: bytes = b"t", ne: tuple[int, ...] = (32,), type: int = 0, offset: int = 0
) -> bytes:
    shape = struct.pack(f"<I{len(ne)}Q", len(ne), *ne)
    return _text(name) + shape + struct.pack("<IQ", type, offset)


def _file(*tensors: bytes, keys: bytes = b"", n_keys: int = 0) -> bytes:
    return HEADER.pack(b"GGUF", 3, len(tensors), n_keys) + keys + b"".join(tensors) + bytes(256)


HOSTILE = {
    "empty": b"",
    "not a GGUF": b"PK\x03\x04" + bytes(100),
    "byte order of the other kind": HEADER.pack(b"GGUF", 0x03000000, 1, 0),
    "more tensors than any model": HEADER.pack(b"GGUF", 3, 2**60, 0),
    "more keys than any model": HEADER.pack(b"GGUF", 3, 0, 2**60),
    "a name longer than the file": HEADER.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q", 2**63),
    "cut off in the table": _file(_tensor())[:40],
    "a string that never ends": _file(keys=_text(b"k") + struct.pack("<IQ", 8, 2**62), n_keys=1),
    "an array too long": _file(keys=_text(b"k") + struct.pack("<IIQ", 9, 10, 2**61), n_keys=1),
    "an array of arrays": _file(keys=_text(b"k") + struct.pack("<IIQ", 9, 9, 1), n_keys=1),
    "an unknown value": _file(keys=_text(b"k") + struct.pack("<I", 99), n_keys=1),
    "alignment zero": _file(keys=_text(b"general.alignment") + struct.pack("<II", 4, 0), n_keys=1),
    "five dimensions": _file(_tensor(ne=(1, 1, 1, 1, 1))),
    "an unknown type": _file(_tensor(type=4_000_000_000)),
    "a removed type": _file(_tensor(type=4)),
    "half a block": _file(_tensor(ne=(33,), type=8)),
    "a shape that overflows": _file(_tensor(ne=(2**32, 2**32, 2**32))),
    "a tensor beyond the end": _file(_tensor(offset=2**40)),
    "an offset that wraps": _file(_tensor(offset=2**64 - 32)),
    "an offset out of line": _file(_tensor(offset=7)),
    "one tensor twice": _file(_tensor(), _tensor()),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_in_a_sentence(
    engine_bin: Path, folder: Path, data: bytes
) -> None:
    path = folder / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(EngineFailed) as refused, rpc_server(engine_bin, folder, "--gguf", path):
        pass
    assert refused.value.returncode == 1
    assert f"error: cannot offer {path}: " in refused.value.log


def test_a_named_pipe_is_not_waited_for(engine_bin: Path, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with (
        pytest.raises(EngineFailed, match="it is not a regular file"),
        rpc_server(engine_bin, folder, "--gguf", folder / "pipe"),
    ):
        pass


FILE_RECORD = "file\t0\t1000\t0\t0\t0\t/nowhere"
GOOD_TENSOR = "tensor\t0\t0\t128\t0\t32\t1\t1\t1\tt"
BAD_MANIFESTS = {
    "empty": "",
    "another version": f"mesh-gguf\t2\nroot\t{ROOT}\n{FILE_RECORD}\n",
    "no root": f"mesh-gguf\t1\n{FILE_RECORD}\n",
    "a root too short": f"mesh-gguf\t1\nroot\tabc\n{FILE_RECORD}\n",
    "no files": f"mesh-gguf\t1\nroot\t{ROOT}\n",
    "files out of order": f"mesh-gguf\t1\nroot\t{ROOT}\n{FILE_RECORD.replace('0', '1', 1)}\n",
    "a number that is none": f"mesh-gguf\t1\nroot\t{ROOT}\nfile\t0\t-5\t0\t0\t0\t/x\n",
    "a tensor of no file": f"mesh-gguf\t1\nroot\t{ROOT}\n{GOOD_TENSOR}\n",
    "a tensor outside its file": (
        f"mesh-gguf\t1\nroot\t{ROOT}\n{FILE_RECORD}\n{GOOD_TENSOR.replace('0', '900', 2)}\n"
    ),
    "a tensor of the wrong size": (
        f"mesh-gguf\t1\nroot\t{ROOT}\n{FILE_RECORD}\n{GOOD_TENSOR.replace('128', '129')}\n"
    ),
    "a tensor twice": (
        f"mesh-gguf\t1\nroot\t{ROOT}\n{FILE_RECORD}\n{GOOD_TENSOR}\n{GOOD_TENSOR}\n"
    ),
    "a tensor of overflowing shape": (
        f"mesh-gguf\t1\nroot\t{ROOT}\n{FILE_RECORD}\ntensor\t0\t0\t0\t0\t{2**62}\t8\t1\t1\tt\n"
    ),
    "an unknown record": f"mesh-gguf\t1\nroot\t{ROOT}\n{FILE_RECORD}\nsurprise\n",
}


@pytest.mark.parametrize("text", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS.keys())
def test_a_bad_manifest_is_refused_in_a_sentence(engine_bin: Path, folder: Path, text: str) -> None:
    path = folder / "manifest"
    path.write_text(text)
    with (
        pytest.raises(EngineFailed) as refused,
        rpc_server(engine_bin, folder, "--gguf-manifest", path),
    ):
        pass
    assert refused.value.returncode == 1
    assert f"cannot use the manifest {path}: " in refused.value.log


def test_a_list_of_roots_that_cannot_be_used_fails_the_load_in_a_sentence(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    (folder / "roots").write_text("not a root\n")
    with (
        rpc_server(engine_bin, folder) as worker,
        pytest.raises(EngineFailed, match="GGML_RPC_MESH_ROOTS") as failed,
        llama_server(
            engine_bin, folder, model, rpc=[worker], env=mesh_env(folder, folder / "roots")
        ),
    ):
        pass
    assert failed.value.returncode == 1
