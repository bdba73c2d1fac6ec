"""Which files a process may touch: Linux' landlock, which needs no privilege.

Source: Documentation/userspace-api/landlock.rst, include/uapi/linux/landlock.h. Each version of
its ABI can deny more; what this kernel cannot deny is named by `gaps`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

from meshnode.engine.sandbox.kernel import Unavailable, system_call
from meshnode.engine.sandbox.syscalls import numbers

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_FILE, MAKE_SOCKET = 1 << 5, 1 << 9
DEVICE_IOCTL = 1 << 15

READ = READ_FILE
READ_TREE = READ_FILE | READ_DIR
RUN = READ_FILE | EXECUTE
USE_DEVICE = READ_FILE | WRITE_FILE | READ_DIR | DEVICE_IOCTL
HOLD_SOCKETS = READ_DIR | REMOVE_FILE | MAKE_SOCKET

_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14 | DEVICE_IOCTL
# All file rights that an ABI knows: 13 at first, then REFER, TRUNCATE and IOCTL_DEV.
_KNOWN_RIGHTS = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 4: 1 << 15}
_ALL_RIGHTS = 1 << 16
_TCP_BIND_AND_CONNECT = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11

_VERSION_FLAG = 1
_PATH_BENEATH = 1
# The same on every architecture, also on those whose other calls are not in our table.
_CREATE, _ADD, _RESTRICT = (
    numbers("x86_64")[f"landlock_{name}"]
    for name in ("create_ruleset", "add_rule", "restrict_self")
)


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("handled_fs", ctypes.c_uint64),
        ("handled_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def abi() -> int:
    """The version of landlock here. Raises `Unavailable`."""
    try:
        return system_call(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    except OSError as error:
        raise Unavailable(f"this kernel has no landlock ({error.strerror})") from None


def gaps(version: int) -> str:
    """What this version cannot deny and nothing else here does; empty when there is nothing."""
    if version < 3:
        return "it may cut off the files it reads: that takes Linux 6.2"
    return ""


def restrict(allowed: Sequence[tuple[str, int]]) -> int:
    """From now on this process reaches nothing but `allowed`: (path, rights). Returns the ABI.

    Of a folder the rights hold for all below it. A path that is not there is passed over. TCP is
    denied too, and so are signals and abstract sockets of processes outside, as far as the kernel
    can. Raises `Unavailable`.
    """
    version = abi()
    rights = _KNOWN_RIGHTS.get(version, _ALL_RIGHTS) - 1
    ruleset = _Ruleset(
        rights,
        _TCP_BIND_AND_CONNECT if version >= 4 else 0,
        _ABSTRACT_SOCKETS_AND_SIGNALS if version >= 6 else 0,
    )
    size = 8 if version < 4 else 16 if version < 6 else 24  # older kernels know a shorter struct
    try:
        handle = system_call(
            _CREATE, ctypes.byref(ruleset), ctypes.c_size_t(size), ctypes.c_uint32(0)
        )
        try:
            for path, wanted in allowed:
                _allow(handle, path, wanted & rights)
            system_call(_RESTRICT, ctypes.c_int(handle), ctypes.c_uint32(0))
        finally:
            os.close(handle)
    except OSError as error:
        raise Unavailable(f"landlock refused its rules ({error.strerror})") from None
    return version


def _allow(handle: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= _OF_FILES
        rule = _PathBeneath(rights, place)
        system_call(
            _ADD,
            ctypes.c_int(handle),
            ctypes.c_int(_PATH_BENEATH),
            ctypes.byref(rule),
            ctypes.c_uint32(0),
        )
    finally:
        os.close(place)
