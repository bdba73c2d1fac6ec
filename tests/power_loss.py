"""Every state that a power cut may leave a folder in, after any step of what wrote to it.

The method is that of ALICE (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014):
the system calls are watched, and what a file system may legally have on its disk is worked out:

- a file's content is as it was at its last fsync; or, where it was written to since, also cut in
  the middle, of the new length but zeros, or the new one; written in place, half old and half new;
- of the changes to a folder since its last fsync (a name made, removed, replaced) any subset may be
  there, in no order; what one rename does is there whole or not at all.

A process killed with the disk well is one of these states: everything written is there.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

WATCHED = (
    *("open", "fsync", "fdatasync", "pwrite", "truncate"),
    *("replace", "rename", "link", "unlink", "mkdir", "rmdir"),
)

Tree = Mapping[str, bytes | None]  # path -> content; None: a folder
Change = tuple[tuple[int, str, int | None], ...]  # (folder, name, what it names now) in one step


@dataclass(frozen=True)
class Moment:
    """Between two system calls: what is surely on the disk, and what may be.

    Numbers are inodes. `told`: what the program had told the world by then.
    """

    told: tuple[str, ...]
    folders: Mapping[int, Mapping[str, int]]
    pending: tuple[Change, ...]
    flushed: Mapping[int, bytes]
    written: Mapping[int, bytes]

    def trees(self, root: int) -> Iterator[Tree]:
        """Every tree that may be found after a power cut in this moment."""
        for kept in itertools.product((False, True), repeat=len(self.pending)):
            folders = {number: dict(names) for number, names in self.folders.items()}
            for change in itertools.compress(self.pending, kept):
                for folder, name, target in change:
                    if target is None:
                        folders[folder].pop(name, None)
                    else:
                        folders[folder][name] = target
            paths = dict(_walk(folders, root))
            files = {number for number in paths.values() if number not in folders}
            choices = [
                [(number, content) for content in self._contents(number)] for number in files
            ]
            for chosen in itertools.product(*choices):
                contents = dict(chosen)
                yield {path: contents.get(number) for path, number in paths.items()}

    def _contents(self, number: int) -> list[bytes]:
        old, new = self.flushed.get(number, b""), self.written[number]
        half = len(new) // 2
        if old == new:
            cut = []
        elif len(old) == len(new):  # written in place: its length is on the disk already
            cut = [new[:half] + old[half:], old[:half] + new[half:]]
        else:
            cut = [new[:half], bytes(len(new))]
        return list(dict.fromkeys([old, *cut, new]))


def _walk(folders: Mapping[int, Mapping[str, int]], folder: int, prefix: str = "") -> Any:
    for name, number in folders[folder].items():
        yield prefix + name, number
        if number in folders:
            yield from _walk(folders, number, f"{prefix}{name}/")


class Disk:
    """I watch one folder and keep each moment of its history."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.moments: list[Moment] = []
        self._told: tuple[str, ...] = ()
        self._open: dict[int, int] = {}  # one descriptor an inode, so that no number is used twice
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, int]] = {}
        self._look()
        # What is there before the work is taken to be on the disk.
        self._flushed = dict(self._files)
        self._kept = {number: dict(names) for number, names in self._folders.items()}
        self._pending: list[Change] = []

    def tell(self, what: str) -> None:
        """The program tells the world something here; what it promises must hold from now on."""
        self._note()
        self._told = (*self._told, what)
        self._note()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keeps the history of the body."""
        with ExitStack() as watches:
            for name in WATCHED:
                watch = mock.patch.object(os, name, self._watch(getattr(os, name)))
                watches.enter_context(watch)
            yield
        self._note()

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def _watch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self._note()
            result = call(*arguments, **options)
            self._note()
            if call in (_FSYNC, _FDATASYNC):
                self._flush(os.fstat(arguments[0]).st_ino)
                self._note()
            return result

        return watched

    def _flush(self, number: int) -> None:
        if number in self._files:
            self._flushed[number] = self._files[number]
        elif number in self._folders:
            self._kept[number] = dict(self._folders[number])
            left = (tuple(step for step in change if step[0] != number) for change in self._pending)
            self._pending = [change for change in left if change]

    def _note(self) -> None:
        before = self._folders
        self._look()
        self._pending += _changes(before, self._folders)
        self._kept |= {number: {} for number in self._folders if number not in self._kept}
        folders = {number: dict(names) for number, names in self._kept.items()}
        moment = Moment(
            self._told, folders, tuple(self._pending), dict(self._flushed), dict(self._files)
        )
        if not self.moments or self.moments[-1] != moment:
            self.moments.append(moment)

    def _look(self) -> None:
        """Reads the whole folder. Files that have lost their name stay known."""
        self._folders = {}
        for path in [self.folder, *self.folder.rglob("*")]:
            number = path.stat().st_ino
            if number not in self._open:
                self._open[number] = _OPEN(path, os.O_RDONLY)
            if path.is_dir():
                self._folders[number] = {
                    child.name: child.stat().st_ino for child in path.iterdir()
                }
            else:
                self._files[number] = path.read_bytes()


_OPEN, _FSYNC, _FDATASYNC = os.open, os.fsync, os.fdatasync


def _changes(
    before: Mapping[int, Mapping[str, int]], after: Mapping[int, Mapping[str, int]]
) -> list[Change]:
    """The steps from one state of the folders to the next; a name and where it went are one."""
    gone: list[tuple[int, str, int]] = []
    come: list[tuple[int, str, int]] = []
    for folder in after:
        old, new = before.get(folder, {}), after[folder]
        gone += [(folder, name, old[name]) for name in old if name not in new]
        come += [(folder, name, new[name]) for name in new if old.get(name) != new[name]]
    changes: list[Change] = []
    for folder, name, number in come:
        moved = [(place, was, None) for place, was, target in gone if target == number]
        gone = [entry for entry in gone if entry[2] != number]
        changes.append((*moved, (folder, name, number)))
    return [*changes, *(((folder, name, None),) for folder, name, _ in gone)]


@dataclass(frozen=True)
class Found:
    """The folder as it is found when the power is back, and what had been told before."""

    folder: Path
    told: tuple[str, ...]


def after_power_cuts(disk: Disk, scratch: Path) -> Iterator[Found]:
    """Each different state, laid out in a folder that the next one replaces."""
    root = disk.folder.stat().st_ino
    seen = set()
    for moment in disk.moments:
        for tree in moment.trees(root):
            key = (moment.told, tuple(sorted(tree.items())))
            if key in seen:
                continue
            seen.add(key)
            folder = scratch / "found"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for path, content in sorted(tree.items()):
                if content is None:
                    (folder / path).mkdir()
                else:
                    (folder / path).write_bytes(content)
            yield Found(folder, moment.told)
