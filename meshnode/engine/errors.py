"""What can go wrong between llama.cpp's source and a running engine process."""

from __future__ import annotations

from pathlib import Path

from meshnode.errors import DiskFull, EngineError


class NoCompiler(EngineError):
    """The machine lacks a compiler, or the tools of the backend that was asked for."""


class SourceUnavailable(EngineError):
    """llama.cpp's source could not be fetched, or is not what the pin says."""


class SourceOutOfReach(SourceUnavailable):
    """It would have to be fetched, and no packet may leave."""

    def __init__(self) -> None:
        super().__init__(
            "no engine is built here, and offline (--offline, MESH_OFFLINE) its source is not "
            "fetched: run `mesh engine build --no-offline` once while that is allowed, or name a "
            "llama.cpp checkout or a saved sdist with MESH_ENGINE_SOURCE"
        )


class PatchFailed(EngineError):
    """A patch of the series does not fit the source, or cannot be applied here at all."""


class BuildFailed(EngineError):
    """cmake or the compiler failed. `str()` ends in their last lines and the log's path."""

    def __init__(self, sentence: str, lines: tuple[str, ...], log: Path) -> None:
        body = "".join(f"\n  {line}" for line in lines)
        super().__init__(f"{sentence}{body}\nThe whole log: {log}")
        self.lines = lines
        self.log = log


class EngineMissing(EngineError):
    """No engine has been built for this machine yet."""

    def __init__(self, *, stock: bool = False) -> None:
        option = " --stock" if stock else ""
        kind = "unpatched engine" if stock else "engine"
        super().__init__(f"no {kind} is built here yet: run `mesh engine build{option}` first")


class EngineFailed(EngineError):
    """An engine process did not start, or ended when it should not have.

    `lines` are the last meaningful ones it wrote.
    """

    def __init__(self, sentence: str, lines: tuple[str, ...] = (), log: Path | None = None) -> None:
        body = "".join(f"\n  {line}" for line in lines)
        where = f"\nIts log: {log}" if log else ""
        super().__init__(f"{sentence}{body}{where}")
        self.lines = lines
        self.log = log


class SandboxMissing(EngineError):
    """This system cannot confine an rpc-server as wholly as was asked."""

    def __init__(self, missing: str) -> None:
        super().__init__(
            f"--sandbox require: {missing}; lend from a system that has it (`mesh doctor` lists "
            "what is here), or accept less with --sandbox auto"
        )


class EngineChanged(EngineError):
    """A program of the engine was removed, replaced or made unusable under a running node."""

    def __init__(self, program: Path, what: str) -> None:
        super().__init__(
            f"{program.name} {what}: run `mesh engine build` again, then restart this node if "
            f"that was not enough ({program})"
        )


class EngineKilled(EngineFailed):
    """An engine process was killed from outside: by somebody, or by a system short of memory."""


class CacheUnwritable(EngineError):
    """The folder of the engine cache belongs to somebody else, or is none."""

    def __init__(self, folder: Path, error: OSError) -> None:
        super().__init__(
            f"the engine cache {folder} cannot be written ({error.strerror}): name a folder of "
            "yours with MESH_CACHE"
        )


class WeightsUnread(EngineFailed):
    """An rpc-server could not read a tensor from its own file: it changed since it was offered."""


class WeightsAbsent(EngineFailed):
    """A tensor is neither in this machine's slice of the model nor with who was to compute it."""

    def __init__(self, what: str, tensor: str) -> None:
        super().__init__(f"the load ended: {what}: fetch it, or plan with what is here")
        self.what = what
        self.tensor = tensor


class NoRoomToBuild(DiskFull):
    """The disk of the engine cache is full."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"the disk is full: building the engine needs about 700 MB in {folder}; free some, "
            "or name another folder with MESH_CACHE"
        )
