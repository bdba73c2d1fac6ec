"""Records what the engine takes for every architecture it makes tiny models of.

    python -m tests.engine.record_memory LLAMA_SERVER FOLDER

FOLDER holds GGUF files, as upstream's `test-llama-archs --out FOLDER` writes them (the file's name
becomes the entry's; `-wide` are those of the same program with `n_embd`, `n_head` and `n_ff` four
times as large). What each file's header says and llama-server then logs goes into
`tests/meshnode/models/engine_memory.json`, which tests without an engine read.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from meshnode.models import facts as facts_module
from meshnode.models.header import ArrayValue, Header, Value, read_header
from meshnode.models.metadata import Metadata

TABLE = Path("tests/meshnode/models/engine_memory.json")
WAYS = {
    "plain": (),
    "no flash attention": ("-fa", "off"),
    "unified": ("--kv-unified",),
    "whole windows": ("--swa-full",),
}
_KEPT = re.compile(r"(?:KV|RS|DSV4 \w+ state) buffer size = +([\d.]+) MiB")
_COMPUTE = re.compile(r"compute buffer size = +([\d.]+) MiB")
_READY = ("graph nodes", "server is listening", "all slots are idle")


class Watched(Metadata):
    """I remember which keys were looked up."""

    looked_up: set[str] = set()  # noqa: RUF012

    def __init__(self, header: Header) -> None:
        super().__init__(header)
        self._values = _Watching(header.metadata)


class _Watching(dict[str, Value]):
    def get(self, key: str, default: object = None) -> Value | None:  # type: ignore[override]
        Watched.looked_up.add(key)
        return self[key] if key in self else default  # type: ignore[return-value]  # noqa: SIM401


def looked_up(path: Path) -> tuple[str, dict[str, object]]:
    """The architecture, and what the facts rest on of what is said below its name."""
    Watched.looked_up.clear()
    vars(facts_module)["Metadata"] = Watched
    arch = facts_module.read_facts(path).arch
    prefix = f"{arch}."
    told = read_header(path).metadata
    keys = sorted(key for key in Watched.looked_up if key.startswith(prefix) and key in told)
    values = {key.removeprefix(prefix): told[key] for key in keys}
    return arch, {
        key: list(value.items) if isinstance(value, ArrayValue) else value
        for key, value in values.items()
    }


def log_of(llama_server: str, path: Path, options: tuple[str, ...]) -> str:
    argv = [llama_server, "-m", str(path), "-v", "--no-warmup", "--offline", "-fit", "off"]
    argv += ["--host", "127.0.0.1", "--port", "0", "--device", "none", "-t", "1"]
    argv += ["-c", "16384", "-np", "8", *options]
    log = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as it:
        assert it.stdout is not None
        for line in it.stdout:
            log.append(line)
            if any(word in line for word in _READY):
                break
        it.kill()
    return "".join(log)


def main(llama_server: str, folder: str) -> None:
    lines = []
    for path in sorted(Path(folder).glob("*.gguf")):
        logs = {way: log_of(llama_server, path, options) for way, options in WAYS.items()}
        if not all(_COMPUTE.search(log) for log in logs.values()):
            print(f"{path.name} does not load: left out")
            continue
        arch, metadata = looked_up(path)
        kept = {way: [float(mib) for mib in _KEPT.findall(log)] for way, log in logs.items()}
        compute = {
            way: round(sum(map(float, _COMPUTE.findall(log))), 2) for way, log in logs.items()
        }
        entry = {"arch": arch, "metadata": metadata, "mib": kept, "compute_mib": compute}
        lines.append(f"{json.dumps(path.stem)}: {json.dumps(entry)}")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
