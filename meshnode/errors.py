"""The errors a user can meet, each one sentence with its remedy, and the exit codes they end in.

===== ================ ===========================================================================
code  class            meaning
===== ================ ===========================================================================
0     (none)           all went well; a node that was told to stop, and did
1     `MeshError`      anything that has no code of its own
2     `UsageError`     a bad option, a bad configuration, a layout that cannot be had
3     `EngineError`    a missing compiler, a failed build, an engine process that failed
4     `NetworkError`   nobody at the address, the wrong key there, a port in use
5     `AccessError`    an invite that is bad, corrupted, expired, used up or our own; not a member
6     `ModelError`     a model that is missing, truncated, unknown by name or not a GGUF file
7     `ResourceError`  too little memory, a full disk
8     `HomeError`      the home is in use by another node, or no node runs on it
130   (none)           interrupted before it was done
===== ================ ===========================================================================

Library code raises these; only `meshnode.cli` turns them into text and an exit status. `str(error)`
is the whole message: what failed, why, and what to do next. No secret is ever part of it.
"""

import errno

INTERRUPTED_EXIT_CODE = 130
"""After Ctrl-C, as shells have it: 128 and the number of SIGINT. A node ends with 0 then: to run
until it is told to stop is what it is for, and a service manager takes 130 for a failure."""


class MeshError(Exception):
    """What failed, why, and the next step, in one sentence. Exit code 1 unless a subclass says."""

    exit_code: int = 1


class UsageError(MeshError):
    """The command line or the configuration asks for something that cannot be."""

    exit_code = 2


class EngineError(MeshError):
    """llama.cpp could not be built, started or kept running."""

    exit_code = 3


class NetworkError(MeshError):
    """An address, a port or a peer at the other end of one did not do what was needed."""

    exit_code = 4


class BadMessage(NetworkError):
    """A peer sent something that is no message of ours."""


class AccessError(MeshError):
    """An invite or a grant does not allow what was asked."""

    exit_code = 5


class ModelError(MeshError):
    """A model file is missing, broken, or not what its name says."""

    exit_code = 6


class NoSuchModel(ModelError):
    """Nothing has that name or identity where it was looked for."""


class AmbiguousModel(ModelError):
    """Several models have that name."""


class ResourceError(MeshError):
    """The machines have too little of something: memory, disk."""

    exit_code = 7


class DiskFull(ResourceError):
    """No room to write; what was there before stands."""


class HomeError(MeshError):
    """MESH_HOME is owned by another node, or by none where one is needed."""

    exit_code = 8


class OutOfFiles(ResourceError):
    """The process, or the whole system, has no file descriptor left."""


def out_of_files(error: BaseException) -> OutOfFiles | None:
    """The sentence for an error behind which there is a lack of file descriptors, else None."""
    cause: BaseException | None = error
    seen: set[int] = set()  # an error that is raised again on its own way is behind itself
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            return OutOfFiles(
                "too many open files: close other programs, or raise the limit (`ulimit -n`) and "
                "restart the node"
            )
        cause = cause.__cause__ or cause.__context__
    return None
