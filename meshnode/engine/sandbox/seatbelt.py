"""The same policy as a profile for macOS' sandbox-exec.

Written after Apple's own profiles in /System/Library/Sandbox/Profiles and not yet run on a Mac:
where it is wrong, `--sandbox require` refuses to start and `auto` says that the sandbox is off.
"""

from __future__ import annotations

from collections.abc import Mapping

from meshnode.engine.sandbox import landlock

_ALWAYS = """\
(version 1)
(deny default)
(allow sysctl-read)
(allow process-info* (target self))
(allow signal (target self))
(allow file-read-metadata)
(allow file-read* (literal "/") (subpath "/System") (subpath "/Library/Apple"))
(allow file-read* (subpath "/usr/lib") (subpath "/private/var/db/dyld"))
(allow mach-lookup (global-name "com.apple.MTLCompilerService"))
(allow iokit-open)
"""


def profile(rights: Mapping[str, int]) -> str:
    """The text for `sandbox-exec -p`; `rights` are landlock's."""
    lines = []
    for path, allowed in rights.items():
        place = f'(subpath "{_quoted(path)}")'
        if allowed & landlock.READ_FILE:
            lines.append(f"(allow file-read* {place})")
        if allowed & landlock.EXECUTE:
            lines.append(f"(allow process-exec {place})")
        if allowed & landlock.WRITE_FILE:
            lines.append(f"(allow file-write-data file-ioctl {place})")
        if allowed & landlock.MAKE_SOCKET:
            lines.append(f"(allow file-write-create file-write-unlink {place})")
            lines.append(f"(allow network-bind network-inbound {place})")
    return _ALWAYS + "\n".join(lines) + "\n"


def _quoted(path: str) -> str:
    return path.replace("\\", "\\\\").replace('"', '\\"')
