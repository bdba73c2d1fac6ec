"""Figures of a trace in few characters. Sans-IO."""

from __future__ import annotations


def ms_text(time_ns: int) -> str:
    """`0.021 ms`, `12.3 ms`, `4,520 ms`."""
    return f"{ms_number(time_ns)} ms"


def ms_number(time_ns: int) -> str:
    milliseconds = time_ns / 1e6
    for digits, below in ((3, 10), (2, 100), (1, 1000)):
        if abs(milliseconds) < below:
            return f"{milliseconds:.{digits}f}"
    return f"{milliseconds:,.0f}" if abs(milliseconds) < 1e9 else f"{milliseconds:.2e}"


def bytes_text(size_bytes: int) -> str:
    """`17 B`, `11.6 KB`, `1.2 GB`: thousands, as links are measured."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KB", "MB", "GB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:,.1f} TB" if size < 1e9 else f"{size / 1000:.1e} TB"
