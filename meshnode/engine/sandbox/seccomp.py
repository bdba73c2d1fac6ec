"""Which system calls a process may make: a seccomp filter, in classic BPF.

It denies (EPERM) what an rpc-server never does and an attacker would: other programs and
processes, every socket but a listening unix one, changes to files' modes and owners, the system's
settings. The rest is allowed: drivers of GPUs use more of the kernel than a list could name.
What a number means depends on the architecture, so one that is not in `syscalls` has no filter.

Source: Documentation/userspace-api/seccomp_filter.rst, include/uapi/linux/{seccomp,filter}.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from meshnode.engine.sandbox import syscalls
from meshnode.engine.sandbox.kernel import Unavailable, system_call

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand
Condition = tuple[int, int, int]  # offset of a 32-bit half of an argument, mask, value

_LOAD, _AND = 0x20, 0x54
_IF_EQUAL, _IF_ABOVE, _IF_AT_LEAST = 0x15, 0x25, 0x35
_RETURN = 0x06
_ALLOW, _KILL_PROCESS, _FAIL_WITH = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16
_WHOLE = 0xFFFFFFFF

_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE_MASK = 1, 1, 0xF
_CLONE_THREAD = 0x10000
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
_TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP = 0x5412, 0x541C, 0x8901, 0x8902

_FILTER_FLAG_SPEC_ALLOW = 1 << 2
_SET_MODE_FILTER = 1

_CONDITIONAL = {
    *("execve", "clone", "clone3", "kill", "tgkill", "prlimit64"),
    *("socket", "socketpair", "sendto", "fcntl", "ioctl"),
    *("seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"),
}
"""Of the calls in the table, those that are not denied outright."""


def program(architecture: str, pid: int, pass_word: tuple[int, int]) -> list[Instruction]:
    """The filter for the process `pid`, which keeps its number when it becomes the server.

    execve is allowed to whoever knows `pass_word`: two 64-bit numbers in the registers of its
    fourth and fifth argument, which it does not have. The launcher knows them; they are gone with
    its memory once it has become the server, which so can start nothing else.
    """
    number = syscalls.numbers(architecture)
    (first, second) = pass_word
    rules = [
        # Once a message, and drivers of GPUs live by ioctl: these two are looked at first. What is
        # allowed whatever its arguments are, the kernel (5.11 on) does not ask the filter for.
        _only_if(number["sendto"], _argument(4, 0)),  # to no address but its peer's
        _unless(number["ioctl"], 1, (_TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP)),
        _unless(number["fcntl"], 1, (_F_SETOWN, _F_SETSIG, _F_SETOWN_EX)),
        *_denied(number),
        _only_if(number["execve"], (*_argument(3, first), *_argument(4, second))),
        _only_if(number["clone"], (_low(0, _CLONE_THREAD, _CLONE_THREAD),)),
        # Its flags lie in memory, which no filter reads; the C library falls back to clone.
        [(_IF_EQUAL, 0, 1, number["clone3"]), (_RETURN, 0, 0, _FAIL_WITH | errno.ENOSYS)],
        _only_if(number["kill"], (_low(0, _WHOLE, pid),)),
        _only_if(number["tgkill"], (_low(0, _WHOLE, pid),)),
        _only_if(number["prlimit64"], (_low(0, _WHOLE, 0),)),
        *(
            _only_if(
                number[name],
                (_low(0, _WHOLE, _AF_UNIX), _low(1, _SOCK_TYPE_MASK, _SOCK_STREAM)),
            )
            for name in ("socket", "socketpair")
        ),
    ]
    return [
        (_LOAD, 0, 0, _ARCHITECTURE_OFFSET),
        (_IF_EQUAL, 1, 0, syscalls.AUDIT_ARCH[architecture]),
        (_RETURN, 0, 0, _KILL_PROCESS),  # 32-bit calls have other numbers
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        # x32's numbers, above all others, among them
        (_IF_ABOVE, 0, 1, syscalls.LAST_KNOWN),
        (_RETURN, 0, 0, _FAIL_WITH | errno.ENOSYS),
        *(instruction for rule in rules for instruction in rule),
        (_RETURN, 0, 0, _ALLOW),
    ]


def install(filter_program: list[Instruction], architecture: str) -> None:
    """The filter is on from here. Raises `OSError`."""
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in filter_program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = _Program(len(filter_program), ctypes.addressof(buffer))
    # Without the flag, Linux before 5.16 slows the processor down for every filtered process.
    system_call(
        syscalls.numbers(architecture)["seccomp"],
        ctypes.c_uint(_SET_MODE_FILTER),
        ctypes.c_uint(_FILTER_FLAG_SPEC_ALLOW),
        ctypes.byref(header),
    )


def check_available(architecture: str) -> None:
    """Raises `Unavailable` where `install` cannot work."""
    number = syscalls.numbers(architecture).get("seccomp")
    if number is None:
        raise Unavailable(f"no filter of system calls is written for {architecture}")
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        raise Unavailable("no filter of system calls is written for 32-bit programs")
    get_action, kill = ctypes.c_uint(2), ctypes.c_uint32(_KILL_PROCESS)
    try:
        system_call(number, get_action, ctypes.c_uint(0), ctypes.byref(kill))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise Unavailable(f"this kernel has no seccomp filters ({reason})") from None


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def _denied(number: dict[str, int]) -> list[list[Instruction]]:
    return [
        [(_IF_EQUAL, 0, 1, value), (_RETURN, 0, 0, _FAIL_WITH | errno.EPERM)]
        for name, value in number.items()
        if name not in _CONDITIONAL
    ]


def _only_if(number: int, conditions: tuple[Condition, ...]) -> list[Instruction]:
    """The call is allowed when every condition holds, and denied otherwise."""
    body: list[Instruction] = []
    length = 3 * len(conditions)
    for offset, mask, value in conditions:
        body += [(_LOAD, 0, 0, offset), (_AND, 0, 0, mask)]
        body.append((_IF_EQUAL, 0, length - len(body), value))
    body += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _FAIL_WITH | errno.EPERM)]
    return [(_IF_EQUAL, 0, len(body), number), *body]


def _unless(number: int, argument: int, values: tuple[int, ...]) -> list[Instruction]:
    """The call is denied when the low half of an argument is one of `values`."""
    body: list[Instruction] = [(_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * argument)]
    body += [(_IF_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    body += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _FAIL_WITH | errno.EPERM)]
    return [(_IF_EQUAL, 0, len(body), number), *body]


def _low(argument: int, mask: int, value: int) -> Condition:
    """The low half of an argument; both architectures are little-endian."""
    return (_ARGUMENTS_OFFSET + 8 * argument, mask, value)


def _argument(argument: int, value: int) -> tuple[Condition, Condition]:
    """All 64 bits of an argument."""
    low, high = value & _WHOLE, value >> 32
    return (
        (_ARGUMENTS_OFFSET + 8 * argument, _WHOLE, low),
        (_ARGUMENTS_OFFSET + 8 * argument + 4, _WHOLE, high),
    )
