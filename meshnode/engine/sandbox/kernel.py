"""The few calls of the kernel that Python has no name for. Imported by the launcher, so cheap."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAP_DAC_READ_SEARCH = 2
_MOST_CAPABILITIES = 64


class Unavailable(Exception):
    """A measure that this system does not offer; the message says why."""


def system_call(number: int, *arguments: object) -> int:
    """The result of a raw system call. Raises `OSError`."""
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def no_new_privileges() -> None:
    """From now on no setuid program gives us anything. Raises `OSError`."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """What root could do beyond its own files is gone after the next exec.

    One stays: reading files past their mode, since the models of a node that root runs may belong
    to others. Which files those are is landlock's to say.
    """
    for capability in range(_MOST_CAPABILITIES):
        if capability != _CAP_DAC_READ_SEARCH:
            try:
                _prctl(_PR_CAPBSET_DROP, capability)
            except OSError:
                break  # no such capability, or none of ours to drop
    with suppress(OSError):  # Linux before 4.3
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def leave_network() -> None:
    """Into a network namespace of our own, where not even a loopback is up.

    An ordinary user needs a user namespace for that, which some systems forbid. Raises
    `Unavailable`.
    """
    if _libc.unshare(CLONE_NEWNET) == 0:
        return
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise Unavailable(f"no network namespace of its own ({reason})")
    with suppress(OSError):  # it runs as nobody then, and its files are its own all the same
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(each) for each in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(ctypes.c_int(option), *padded) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
