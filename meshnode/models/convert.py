"""safetensors → GGUF by llama.cpp's own converter, out of the source the engine is built from.

It needs torch and transformers, a gigabyte that a node needs for nothing else, so it runs in an
environment of its own in the cache folder, made once by venv and pip from the converter's own list
of requirements. It reads files that others made: it is told to ask nothing over the network, finds
no token and no cache in its environment, and code among those files is not run unless that is asked
for (transformers would).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshnode.engine.cache import cache_dir
from meshnode.errors import MeshError, ModelError, UsageError
from meshnode.models.facts import read_facts
from meshnode.models.store.disk import check_room, told
from meshnode.models.store.document import is_file_name
from meshnode.models.store.locks import WRITER_LOCK, Lock
from meshnode.models.store.store import NEW_PREFIX

SCRIPT = "convert_hf_to_gguf.py"
REQUIREMENTS = "requirements/requirements-convert_hf_to_gguf.txt"
TYPES = ("auto", "f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")
_READY = "ready"
_TOLD_LINES = 4
# Secrets that a converter has no use for, and what would let it find code outside the folder.
_TAKEN_AWAY = ("PYTHONPATH", "PYTHONHOME")
_OF_NO_USE = re.compile(r"^(HF|HUGGING_FACE|MESH)_|TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)

Progress = Callable[[str], None]


class ConvertFailed(ModelError):
    """The converter, or the making of its environment, failed. `str()` ends in its last lines."""

    def __init__(self, sentence: str, output: str, log: Path) -> None:
        lines = [line for line in output.splitlines() if line.strip()][-_TOLD_LINES:]
        super().__init__("\n  ".join([sentence, *lines]) + f"\nThe whole log: {log}")


@dataclass(frozen=True)
class Conversion:
    """`folder`: config.json, tokenizer, *.safetensors. `kind`: of TYPES. `runs_code`: Python files
    in the folder may be run."""

    folder: Path
    name: str
    kind: str = "auto"
    runs_code: bool = False


def check(wanted: Conversion) -> int:
    """About how large the result will be, in bytes. Raises `ModelError` or `UsageError` for what
    cannot be converted."""
    folder = wanted.folder
    if not is_file_name(f"{wanted.name}.gguf"):
        raise UsageError(f"{wanted.name!r} cannot be a file's name: name the model with --name")
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder: name one with config.json and *.safetensors")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} lacks {'config.json' if weights else 'safetensors'}: name the folder of a "
            "model as Hugging Face has them (older weights, in pickles, are not read)"
        )
    code = sorted(path.name for path in folder.glob("**/*.py"))
    if code and not wanted.runs_code:
        raise ModelError(
            f"{folder} holds Python code ({code[0]}), which the converter would run: read it, then "
            "add --trust-code, or take it out of the folder"
        )
    size_bytes = sum(path.stat().st_size for path in weights)
    return size_bytes * 2 if wanted.kind == "f32" else size_bytes


def make_environment(tree: Path, progress: Progress, *, offline: bool) -> Path:
    """The Python of the converter's environment, made if absent; blocks for minutes then. Raises
    `MeshError`."""
    requirements = tree / REQUIREMENTS
    try:
        text = b"".join(path.read_bytes() for path in sorted(requirements.parent.glob("*.txt")))
    except OSError as error:
        raise ModelError(f"{requirements} cannot be read: {error.strerror}") from error
    key = hashlib.sha256(sys.version.encode() + text).hexdigest()[:16]
    parent = cache_dir() / "converter"
    place = parent / key
    python = place / "bin" / "python"
    with told(parent):
        parent.mkdir(parents=True, exist_ok=True)
        lock = (parent / "lock").open("wb")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (place / _READY).exists():
            return python
        if offline:
            raise ModelError(
                "the converter's environment is not made yet, and offline nothing is fetched: run "
                "this once with --no-offline, or name a Python that has torch and transformers "
                "with --python"
            )
        shutil.rmtree(place, ignore_errors=True)
        log = parent / f"{key}.log"
        progress("making an environment for the converter")
        _run([sys.executable, "-m", "venv", str(place)], log, "no environment could be made")
        progress("fetching torch and transformers with pip (this takes a while)")
        pip = [str(python), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
        _run(
            [*pip, "--requirement", str(requirements)],
            log,
            "pip could not install what the converter needs (another Python may do: --python)",
        )
        (place / _READY).touch()
    return python


def convert(wanted: Conversion, tree: Path, python: Path, models: Path, progress: Progress) -> Path:
    """The GGUF file, in a folder of its own below `models`. Nothing is left where it fails.

    Raises `ModelError`, `ConvertFailed` among them, `NoRoom` or `DiskFull`.
    """
    size_bytes = check(wanted)
    place = models / wanted.name
    if place.exists():
        raise ModelError(f"{place} is there already: remove it, or give another --name")
    if not (tree / SCRIPT).is_file():
        raise ModelError(f"{tree} has no {SCRIPT}: unset MESH_ENGINE_SOURCE to have it fetched")
    check_room(models, size_bytes, f"converting {wanted.name}")
    making = models / f"{NEW_PREFIX}{secrets.token_hex(4)}"
    with told(making):
        making.mkdir(mode=0o700)
    lock = Lock(making, WRITER_LOCK)  # so that nobody sweeps it away
    try:
        made = making / f"{wanted.name}.gguf"
        progress(f"converting {wanted.folder}")
        command = [str(python), str(tree / SCRIPT), str(wanted.folder.absolute())]
        command += ["--outfile", str(made), "--outtype", wanted.kind]
        log = models.parent / "logs" / "convert.log"
        with told(log):
            log.parent.mkdir(mode=0o700, exist_ok=True)
            log.unlink(missing_ok=True)
        with told(making):
            (making / "home").mkdir()
        _run(command, log, f"{wanted.folder} was not converted", _environment(making / "home"))
        read_facts(made)
        shutil.rmtree(making / "home", ignore_errors=True)
        with told(place):
            making.rename(place)  # still locked: a sweep takes away what nobody has locked
            (place / WRITER_LOCK).unlink()
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    finally:
        lock.close()
    return place / made.name


def _environment(home: Path) -> Mapping[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _TAKEN_AWAY and not _OF_NO_USE.search(name)
    }
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(home)}
    return {**kept, **offline, "PYTHONDONTWRITEBYTECODE": "1"}  # the tree is not to be written to


def _run(
    command: Sequence[str], log: Path, sentence: str, environment: Mapping[str, str] | None = None
) -> None:
    """Runs it to its end, all it says into the log. Raises `ConvertFailed`, or another `MeshError`
    where it cannot be run."""
    try:
        with log.open("ab") as output:
            begun_at = output.tell()
            code = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        with log.open("rb") as output:
            output.seek(begun_at)
            said = output.read().decode(errors="replace")
    except OSError as error:
        raise MeshError(f"{command[0]} cannot be run: {error.strerror or error}") from error
    if code:
        raise ConvertFailed(f"{sentence} (exit code {code})", said, log)
