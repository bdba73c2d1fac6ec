"""Where a command's log goes: to the node's home once it has one, else to the cache folder.

Never to the terminal: Python's last resort would print tracebacks there.
"""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path

from meshnode.engine.cache import cache_dir

LOG_NAME = "mesh.log"
LOG_BYTES = 4 * 2**20
LOG_COUNT = 3

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CHATTY = ("httpx", "httpcore", "quic", "hypercorn")


def log_nowhere() -> None:
    """Until there is a home: warnings of libraries are dropped."""
    logging.raiseExceptions = False  # a full disk is no reason to print tracebacks
    logging.getLogger().handlers[:] = [logging.NullHandler()]


def log_to(path: Path) -> None:
    """From now on everything is written to `path`, turned over when it is full."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOG_COUNT)
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # It logs a lack of file descriptors, ten times a second, with its traceback.
    logging.getLogger("trio.serve_listeners").addFilter(_without_traceback)
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = None
    return True


def log_defect(error: BaseException) -> Path | None:
    """Writes the error with its traceback, and says where: None when no file can be written."""
    path = _log_path()
    if path is None:
        try:
            path = cache_dir() / LOG_NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            log_to(path)
        except (OSError, RuntimeError):  # the latter: no home folder to be found
            return None
    logging.getLogger("meshnode").error("internal error", exc_info=error)
    return path


def _log_path() -> Path | None:
    files = (
        Path(handler.baseFilename)
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.FileHandler)
    )
    return next(files, None)
