"""Which pages of a file the system holds in memory: what was read since they were dropped."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

PAGE_BYTES = mmap.PAGESIZE


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_pages(path: Path) -> list[bool]:
    """One entry a page, True when it is in memory (mincore(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        mmap.mmap(
            file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        ) as view,
    ):
        pages = (ctypes.c_ubyte * (-(-size // PAGE_BYTES)))()
        start = ctypes.c_char.from_buffer(view)
        try:
            if libc.mincore(ctypes.byref(start), ctypes.c_size_t(size), pages) != 0:
                raise OSError(ctypes.get_errno(), "mincore")
            return [bool(page & 1) for page in pages]
        finally:
            del start


def read_ahead_bytes(path: Path) -> int:
    """How far the kernel reads ahead of a reader on this file system (128 KiB on most)."""
    device = path.stat().st_dev
    window = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return int(window.read_text()) * 1024 if window.exists() else 128 * 1024
