"""The sandbox from inside: a program in an rpc-server's place tries what an attacker would.

Each attempt is made twice, outside the sandbox as well, where it must go well: so a refusal is the
sandbox's. As root, and as an ordinary user.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshnode.config import SandboxMode
from meshnode.engine.sandbox import launch
from meshnode.engine.sandbox.check import prepare_sandbox
from meshnode.engine.sandbox.policy import Policy, launcher_argv, server_policy
from tests.conftest import require
from tests.probe import NOBODY, TIMEOUT_S, Outcome, attempt, compile_probe, outcome, run_launcher

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="landlock and seccomp: Linux")

MEMORY_BYTES = 64 << 20


@dataclass(frozen=True)
class Scene:
    """A node's places on the disk and its listeners, as user `user`; a probe for a server."""

    folder: Path
    probe: Path
    user: int | None
    victim: int
    targets: dict[str, str]

    def policy(self, action: str, target: str) -> Policy:
        return server_policy(
            [str(self.probe), action, target],
            socket_folder=self.folder / "run" / "rpc-1",
            readable=(self.folder / "models" / "model.gguf",),
            hidden=(self.folder / "home",),
            uses_gpu=False,
            memory_limit_bytes=MEMORY_BYTES,
            required=(launch.FILES, launch.CALLS),
        )

    def inside(self, action: str, target: str) -> Outcome:
        return outcome(run_launcher(self.policy(action, target), user=self.user))

    def outside(self, action: str, target: str) -> Outcome:
        return attempt(self.probe, action, target, user=self.user)


@pytest.fixture(scope="module", autouse=True)
def _sandbox() -> None:
    sandbox = prepare_sandbox(SandboxMode.AUTO)
    assert "does not hold" not in sandbox.missing, "a hole in it is no lack of the system's"
    require("sandbox", sandbox.is_full, sandbox.missing)


@pytest.fixture(scope="module", params=["as us", "as nobody"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    user = NOBODY if request.param == "as nobody" else None
    require("root", user is None or os.geteuid() == 0, "only root can become somebody else")
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="mesh-", dir="/tmp"))
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "bin").mkdir()
        probe = compile_probe(folder / "bin")
        for each in ("home", "models", "run", "run/rpc-1"):
            (folder / each).mkdir()
        (folder / "home" / "node.key").write_bytes(b"secret")
        (folder / "models" / "model.gguf").write_bytes(b"GGUF")
        targets = listeners(stack, folder / "run" / "node.sock")
        if user is not None:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, user, user)
        victim = subprocess.Popen(["/bin/sleep", "600"], user=user, group=user)
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        targets["victim"] = str(victim.pid)
        yield Scene(folder, probe, user, victim.pid, targets)


def listeners(stack: ExitStack, path: Path) -> dict[str, str]:
    """Something that answers, of each kind a process could connect to."""
    targets = {"node.sock": str(path), "log.sock": str(path.with_name("log.sock"))}
    abstract = f"mesh-test-{os.getpid()}-{path.parent.parent.name}"
    targets["abstract"] = f"@{abstract}"
    for kind, family, address in (
        (socket.SOCK_STREAM, socket.AF_UNIX, str(path)),
        (socket.SOCK_DGRAM, socket.AF_UNIX, targets["log.sock"]),
        (socket.SOCK_STREAM, socket.AF_UNIX, f"\0{abstract}"),
        (socket.SOCK_STREAM, socket.AF_INET, ("127.0.0.1", 0)),
        (socket.SOCK_STREAM, socket.AF_INET6, ("::1", 0)),
    ):
        try:
            door = stack.enter_context(socket.socket(family, kind))
            door.bind(address)
        except OSError:
            assert family == socket.AF_INET6, "only IPv6 may be missing here"
            continue
        if kind == socket.SOCK_STREAM:
            door.listen(64)
        if family != socket.AF_UNIX:
            host, port = door.getsockname()[:2]
            targets["tcp6" if ":" in host else "tcp4"] = f"{host}:{port}"
    return targets


def inside_of(name: str) -> Callable[[Scene], str]:
    return lambda scene: str(scene.folder / name)


def target_of(name: str) -> Callable[[Scene], str]:
    def find(scene: Scene) -> str:
        require("ipv6", name in scene.targets, "no IPv6 loopback here")
        return scene.targets[name]

    return find


def beyond(limit: str) -> Callable[[Scene], str]:
    """MiB, just too many of them."""
    return lambda scene: str((dict(scene.policy("hog", "").limits)[limit] >> 20) + 16)


DENIED, NO_FILE, ANY = ("EPERM",), ("EACCES",), ("EPERM", "EACCES")

FORBIDDEN = {
    "read the node's key": ("read", inside_of("home/node.key"), NO_FILE),
    "list the home": ("list", inside_of("home"), NO_FILE),
    "list the models": ("list", inside_of("models"), NO_FILE),
    "list the user's folder": ("list", lambda _: "/tmp", NO_FILE),
    "read a file of the system's": ("read", lambda _: "/etc/passwd", NO_FILE),
    "read another process's environment": (
        "read",
        lambda scene: f"/proc/{scene.victim}/environ",
        NO_FILE,
    ),
    "write the model": ("write", inside_of("models/model.gguf"), NO_FILE),
    "cut the model off": ("truncate", inside_of("models/model.gguf"), ANY),
    "cut the model off while reading": ("cut", inside_of("models/model.gguf"), NO_FILE),
    "open the model to others": ("chmod", inside_of("models/model.gguf"), DENIED),
    "open the key to others": ("chmod", inside_of("home/node.key"), DENIED),
    "add a model": ("make", inside_of("models/other.gguf"), NO_FILE),
    "write into /tmp": ("make", inside_of("new"), NO_FILE),
    "write beside its socket": ("make", inside_of("run/rpc-1/file"), NO_FILE),
    "listen beside its folder": ("listen", inside_of("run/other.sock"), NO_FILE),
    "remove the node's socket": ("remove", inside_of("run/doomed"), NO_FILE),
    "connect by TCP": ("tcp", target_of("tcp4"), DENIED),
    "connect by TCP over IPv6": ("tcp", target_of("tcp6"), DENIED),
    "send by UDP": ("udp", target_of("tcp4"), DENIED),
    "send by UDP over IPv6": ("udp", target_of("tcp6"), DENIED),
    "see the network": ("netlink", lambda _: "", DENIED),
    "reach the node": ("connect", target_of("node.sock"), DENIED),
    "reach an abstract socket": ("connect", target_of("abstract"), DENIED),
    "write into a datagram socket": ("datagram", target_of("log.sock"), DENIED),
    "run a shell": ("exec", lambda _: "/bin/sh", DENIED),
    "guess the launcher's pass-word": ("exec-guess", lambda _: "/bin/sh", DENIED),
    "run an open file": ("exec-file", lambda _: "/bin/sh", DENIED),
    "start a process": ("fork", lambda _: "", DENIED),
    "signal another process": ("signal", target_of("victim"), DENIED),
    "have another process signalled": ("own-signal", target_of("victim"), DENIED),
    "trace another process": ("ptrace", target_of("victim"), DENIED),
    "read another process's limits": ("limit-other", target_of("victim"), DENIED),
    "go around the filter by io_uring": ("io-uring", lambda _: "", DENIED),
    "gain what a setuid program would give": ("raise-privileges", lambda _: "", DENIED),
    "take more memory than its lease": ("hog", beyond("RLIMIT_DATA"), ("ENOMEM",)),
    "take it as shared memory": ("hog-shared", beyond("RLIMIT_AS"), ("ENOMEM",)),
    "take it as a stack": ("hog-stack", beyond("RLIMIT_AS"), ("ENOMEM",)),
    "take it from a device": ("hog-zero", beyond("RLIMIT_AS"), ("ENOMEM",)),
}

ALLOWED = {
    "read the model": ("read", inside_of("models/model.gguf")),
    "listen in its own folder": ("listen", inside_of("run/rpc-1/rpc.sock")),
    "start a thread": ("thread", lambda _: ""),
    "signal itself": ("signal-self", lambda _: ""),
    "use the memory of its lease": ("hog", lambda _: "64"),
    "read the system's libraries": ("list", lambda _: "/usr/lib"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_from_inside_nobody_can(scene: Scene, what: str) -> None:
    action, find, errors = FORBIDDEN[what]
    target = find(scene)
    if action == "remove":
        Path(target).touch()
    if action == "io-uring" and scene.outside(action, target).error:
        pytest.skip("io_uring is off on this system")
    inside = scene.inside(action, target)
    assert inside.error in errors, inside
    if action == "chmod":
        assert Path(target).stat().st_mode & 0o022 == 0
    control = scene.outside(action, target)
    assert control.ok, f"without the sandbox it goes well: {control}"
    clean_up(scene, action, target)


def clean_up(scene: Scene, action: str, target: str) -> None:
    """The control run did what the attempt should not."""
    if action in ("make", "listen"):
        Path(target).unlink()
    if action in ("truncate", "cut"):
        Path(target).write_bytes(b"GGUF")
    if action == "chmod":
        Path(target).chmod(0o644)


@pytest.mark.parametrize("what", ALLOWED)
def test_from_inside_a_server_can(scene: Scene, what: str) -> None:
    action, find = ALLOWED[what]
    inside = scene.inside(action, find(scene))
    assert inside.ok, inside
    clean_up(scene, action, find(scene))


def test_root_keeps_no_power_but_to_read(scene: Scene) -> None:
    if scene.user is None:
        require("root", os.geteuid() == 0, "has no powers to lose")
        assert scene.outside("keep-capability", "").ok
    assert scene.inside("keep-capability", "").error == "EPERM"


def test_nothing_of_ours_stays_open(scene: Scene) -> None:
    with (scene.folder / "home" / "node.key").open("rb") as secret:
        argv, text = launcher_argv(), scene.policy("count-open", "").encode()
        os.set_inheritable(secret.fileno(), True)
        run = subprocess.run(
            argv, input=text, capture_output=True, close_fds=False, timeout=TIMEOUT_S, check=True
        )
    assert outcome(run).result == 3


def test_a_folder_of_the_node_below_a_readable_one_stays_closed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(scene.folder))
    assert scene.inside("list", str(scene.folder / "models")).ok, "the variable opens it"
    assert scene.inside("read", str(scene.folder / "home" / "node.key")).error == "EACCES"
