"""How fast a device computes with this engine: measured by llama-bench in about five seconds, and
kept for as long as engine, device and threads stay the same.

A device is measured with the models of `probe_model`, 220 MB in memory and nothing on the disk, and
`probe_times` says what their times mean. The best of a few samples counts: other programs only ever
make it slower. So what was measured beside much other work serves for now, and is not kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import trio

from meshnode.engine import probe_model
from meshnode.engine.cache import Engine
from meshnode.engine.children import child_environment
from meshnode.engine.devices import CPU_DEVICE, Device
from meshnode.engine.errors import EngineFailed
from meshnode.engine.probe_model import NARROW, SHAPES, TINY, WIDE, Shape
from meshnode.engine.probe_times import LONG_TOKENS, SHORT_TOKENS, Times, speed_from
from meshnode.pipeline.speeds import ROW_LENGTH, Speed, speed_of
from meshnode.state import read_file, write_durably

TIME_LIMIT_S = 30.0  # CUDA takes seconds to wake its cards
ANSWER_TOKENS = 4
RUNS: tuple[tuple[Shape, tuple[int, ...], int], ...] = (
    (WIDE, (SHORT_TOKENS,), 4),
    (NARROW, (SHORT_TOKENS, LONG_TOKENS), 4),
    (TINY, (0,), 32),
)
"""Of llama-bench: the model, its prompts, and how many samples. Beside other programs a tiny
layer's threads wait for each other's turn far longer than they compute: many short samples, so that
one of them is of a moment when all of them run."""
MAX_TOK_S = 1e9
BUSY_PERCENT = 50.0
"""Of the processor's time: beside so much other work, a device looks slower than it is."""
LOOK_S = 0.5
KEPT_FOLDER, KEPT_NAME = "measured", "speeds.json"


def is_busy() -> bool:
    """Whether this machine has much else to do. Blocks for a moment."""
    return psutil.cpu_percent(LOOK_S) >= BUSY_PERCENT


def measure(engine: Engine, device: Device, threads: int | None = None) -> Speed:
    """Blocks for seconds. Raises `EngineFailed`."""
    with _probe_files() as folder:
        runs = _commands(engine, device, folder, threads)
        return parse_bench(*(_run(engine, command) for command in runs))


async def measure_aside(engine: Engine, device: Device, threads: int | None = None) -> Speed:
    """As `measure`, behind whatever else computes on this machine; cancelled, it has ended and its
    memory is free at once. Raises `EngineFailed`."""
    nice = shutil.which("nice")
    texts = []
    with _probe_files() as folder:
        for command in _commands(engine, device, folder, threads):
            try:
                with trio.fail_after(TIME_LIMIT_S):
                    done = await trio.run_process(
                        [nice, "-n", "19", *command] if nice else command,
                        capture_stdout=True,
                        capture_stderr=True,
                        env=child_environment(),
                        deliver_cancel=_kill,
                    )
            except (OSError, subprocess.SubprocessError, trio.TooSlowError) as error:
                raise _failure(engine, error) from error
            texts.append(done.stdout.decode(errors="replace"))
    return parse_bench(*texts)


async def _kill(process: trio.Process) -> None:
    process.kill()  # it has nothing to tidy up, and somebody waits for its memory


@contextmanager
def _probe_files() -> Iterator[Path]:
    """A folder with the models that a device is measured with."""
    with tempfile.TemporaryDirectory(prefix="mesh-speed-") as name:
        folder = Path(name)
        for shape in SHAPES:
            with _path(folder, shape).open("wb") as file:
                file.write(probe_model.header(shape))
                file.truncate(shape.size_bytes)
        yield folder


def _path(folder: Path, shape: Shape) -> Path:
    return folder / f"{shape.name}.gguf"


def parse_bench(*texts: str) -> Speed:
    """The speed that llama-bench's JSON tells of, one text a run. Raises `EngineFailed`."""
    try:
        rows = [row for text in texts for row in json.loads(text)]
        times = Times(
            wide_prompt=_token_s(rows, WIDE, SHORT_TOKENS),
            wide_answer=_token_s(rows, WIDE),
            narrow_prompt=_token_s(rows, NARROW, SHORT_TOKENS),
            narrow_long=_token_s(rows, NARROW, LONG_TOKENS),
            tiny_answer=_token_s(rows, TINY),
        )
        found = speed_of(speed_from(times).to_row())  # exactly what is kept, and told to others
        if found is None:
            raise ValueError(times)
        return found
    except (ValueError, TypeError, KeyError) as error:
        raise EngineFailed(
            "llama-bench did not say how fast it was: run `mesh engine build` again",
            tuple(line for text in texts for line in text.splitlines()[-5:]),
        ) from error


def _token_s(rows: Sequence[dict[str, Any]], shape: Shape, prompt_tokens: int = 0) -> float:
    """Of the best sample of these: each token of a prompt, or of an answer."""
    best = max(
        float(max(row["samples_ts"]))
        for row in rows
        if Path(row["model_filename"]).stem == shape.name and row["n_prompt"] == prompt_tokens
    )
    if not 0 < best < MAX_TOK_S or math.isnan(best):
        raise ValueError(best)
    return 1 / best


def _commands(
    engine: Engine, device: Device, folder: Path, threads: int | None
) -> Iterator[list[str]]:
    for shape, prompts, samples in RUNS:
        command = [str(engine.binary("llama-bench")), "-o", "json", "-r", str(samples)]
        command += ["-m", str(_path(folder, shape))]
        command += ["-p", ",".join(map(str, prompts)), "-n", str(ANSWER_TOKENS)]
        # Never mapped: a hole in a file is one page of zeros, which would not leave the CPU's
        # cache.
        command += ["--no-warmup", "-lm", "none", "--offline"]
        if device.name == CPU_DEVICE:
            # A worker's weights lie as in the file: rpc-server does not repack them.
            command += ["--device", "none", "-ngl", "0", "--repack", "0"]
        else:
            command += ["--device", device.name, "-ngl", "99"]
        yield command + (["-t", str(threads)] if threads else [])


def _run(engine: Engine, command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIME_LIMIT_S,
            env=child_environment(),
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise _failure(engine, error) from error
    return done.stdout.decode(errors="replace")


def _failure(engine: Engine, error: Exception) -> EngineFailed:
    stderr = getattr(error, "stderr", None) or b""
    lines = tuple(stderr.decode(errors="replace").splitlines()[-5:])
    return EngineFailed(
        f"engine {engine.key} could not be measured: run `mesh engine build` again", lines
    )


class Speeds:
    """I keep what was measured, in one file. What is damaged is measured again."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self._path = folder / KEPT_NAME
        self._engine = engine

    def known(self, device: Device, threads: int | None = None) -> Speed | None:
        """What was measured before, if it was."""
        row = self._load().get(self._key(device, threads))
        return speed_of(row) if isinstance(row, list) and len(row) == ROW_LENGTH else None

    def speed(
        self,
        device: Device,
        threads: int | None = None,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> Speed:
        """Measured now, unless it was before; kept, unless the machine is busy. Blocks. Raises
        `EngineFailed`."""
        found = self.known(device, threads)
        if found is None:
            keeps = not is_busy()
            found = measure(self._engine, device, threads)
            if keeps:
                self.keep(device, threads, found)
        return found

    async def measure_aside(
        self, device: Device, threads: int | None = None, *, keeps: bool = True
    ) -> Speed:
        """Measured now, behind everything else (`measure_aside`)."""
        found = await measure_aside(self._engine, device, threads)
        if keeps:
            await trio.to_thread.run_sync(self.keep, device, threads, found)
        return found

    def keep(self, device: Device, threads: int | None, speed: Speed) -> None:
        kept = self._load()
        kept[self._key(device, threads)] = speed.to_row()
        write_durably(self._path, json.dumps(kept, indent=1).encode())

    def _key(self, device: Device, threads: int | None) -> str:
        """Memory that comes and goes is no part of it; cores that do are."""
        facts = (self._engine.key, self._engine.backend, device.name, device.description)
        cores = os.cpu_count() if threads is None else threads
        parts = (*facts, device.total_bytes >> 30, cores)
        return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:16]

    def _load(self) -> dict[str, Any]:
        try:
            found = json.loads(read_file(self._path) or b"{}")
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}
