"""No secret of the whole test run is in anything that was logged: a plugin of pytest.

Secrets are noted where they are made: private keys and token secrets in this process, key files in
each test's folder, tokens that nodes print. After each test all that it wrote is searched for each
of them, in every form of `secrets_forms`: log files of homes, engines and nodes (every file, in
fact, but those that are for keeping a secret), log records with their tracebacks, what pytest
captured, standard error of commands, the arguments of all processes that nodes have started. A find
fails the run, with the file's name and the form, never the secret.

Left out: standard output, where `mesh invite` shows its token; tokens that a test itself gives to
a `mesh` command as an argument, as a careless user would.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from discovery.token import Secret
from meshnode.demo.nodes import NodeProcess
from meshnode.engine.cache import cache_dir
from meshnode.operator_key import KEY_FILE
from tests.secrets_forms import find_secret, token_secrets
from tunnels.identity import Identity

HOLDERS = (".key", ".token", ".gguf", ".part", ".py", ".pyc", ".so", ".exe")
"""Ends of the names of files that may hold a secret, or hold weights or programs."""
_OPERATOR_KEY = re.compile(rb"mesh-key-([A-Za-z0-9_-]{43})\s*")
_TOKEN_FILE = re.compile(rb"\s*mesh1[0-9a-zA-Z]+\s*")
_COUNTING = bytes(range(256))
MAX_FILE_BYTES = 64 << 20
MAX_SECRETS = 512  # of one test; of more, the newest are searched for
ARGUMENTS_EVERY_S = 0.5


class SecretsWatch:
    """I note secrets and search what was written for them."""

    def __init__(self) -> None:
        self.made = 0
        self.bytes_searched = 0
        self.files_searched = 0
        self.seconds = 0.0
        self.found: dict[str, None] = {}
        self._now: dict[bytes, None] = {}  # of this test
        self._lasting: set[bytes] = set()  # of wider fixtures
        self._records: list[str] = []
        self._arguments: dict[str, None] = {}
        self._asked_at_s = 0.0
        self._searched: set[Path] = set()
        self._started_s = time.time()

    # --- secrets ------------------------------------------------------------------------

    def note(self, secret: bytes) -> None:
        """Zeros, 1 2 3 and the like, which tests make up, are in every binary file."""
        if len(set(secret)) <= 8 or secret in _COUNTING:
            return
        if secret not in self._now and secret not in self._lasting:
            self.made += 1
            self._now[secret] = None
            if len(self._now) > MAX_SECRETS:
                del self._now[next(iter(self._now))]

    def note_text(self, text: str) -> None:
        for secret in token_secrets(text):
            self.note(secret)

    def note_arguments(self, arguments: Sequence[object]) -> None:
        """Of a process that is not a user's own `mesh` command."""
        texts = [os.fsdecode(one) for one in arguments if isinstance(one, str | bytes | Path)]
        if "meshnode.cli.main" not in texts:
            self._arguments[" ".join(texts)] = None

    def note_descendants(self, pid: int) -> None:
        now = time.monotonic()
        if now - self._asked_at_s < ARGUMENTS_EVERY_S:
            return
        self._asked_at_s = now
        try:
            for child in psutil.Process(pid).children(recursive=True):
                self._arguments[" ".join(child.cmdline())] = None
        except psutil.Error:
            pass  # gone meanwhile

    def _note_keys_below(self, folder: Path) -> None:
        for path in filter(Path.is_file, folder.rglob("*.key")):  # not a pipe, which keeps waiting
            try:
                key = serialization.load_pem_private_key(path.read_bytes(), None)
            except Exception:  # a test's damaged key, a folder, one that is gone
                continue
            if isinstance(key, Ed25519PrivateKey):
                self.note(key.private_bytes_raw())
        for path in folder.rglob(KEY_FILE):
            if found := _OPERATOR_KEY.fullmatch(path.read_bytes() if path.is_file() else b""):
                self.note(base64.urlsafe_b64decode(found[1] + b"="))
        for path in folder.rglob("*.token"):
            if path.is_file():
                self.note_text(path.read_text(errors="replace"))

    # --- searching ----------------------------------------------------------------------

    @property
    def _secrets(self) -> set[bytes]:
        return self._lasting | self._now.keys()

    def search(self, what: str, data: bytes) -> None:
        self.bytes_searched += len(data)
        kind = find_secret(data, self._secrets)
        if kind is not None:
            self.found[f"{what} holds a secret ({kind})"] = None

    def search_folder(self, folder: Path) -> None:
        self._note_keys_below(folder)
        self._searched.add(folder)
        for path in _log_files(folder):
            try:
                data = path.read_bytes()
            except OSError:
                continue  # gone meanwhile, or not for us
            if _TOKEN_FILE.fullmatch(data):
                self.note_text(data.decode())
                continue  # for --join-file
            self.files_searched += 1
            self.search(str(path), data)

    def search_test(self, item: pytest.Item) -> None:
        began_s = time.perf_counter()
        folder = getattr(item, "funcargs", {}).get("tmp_path")
        if isinstance(folder, Path) and folder.is_dir():
            self.search_folder(folder)
        if self._secrets:
            for text in self._records:
                self.search(f"a log record of {item.nodeid}", text.encode(errors="replace"))
            for line in self._arguments:
                self.search(f"an argument of {item.nodeid}", line.encode(errors="replace"))
        self._records.clear()
        self._arguments.clear()
        self.seconds += time.perf_counter() - began_s

    # --- pytest's hooks -----------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        """What fixtures of a wider scope make lasts longer than the test."""
        result = yield
        self._lasting |= self._now.keys()
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        before = len(self.found)
        self.search_test(item)
        result = yield
        if len(self.found) > before:
            pytest.fail("; ".join(list(self.found)[before:]), pytrace=False)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        texts = [text for name, text in report.sections if "stdout" not in name]
        if report.failed:
            texts.append(report.longreprtext)
        for text in texts:
            self.search(f"what was captured of {report.nodeid}", text.encode(errors="replace"))
        if report.when == "teardown":
            self._now.clear()
            if len(self._lasting) > MAX_SECRETS:
                self._lasting.clear()

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        base = getattr(session.config, "_tmp_path_factory").getbasetemp()  # noqa: B009
        for folder in base.iterdir():
            if folder.is_dir() and not folder.is_symlink() and folder not in self._searched:
                self.search_folder(folder)
        for path in cache_dir().glob("mesh.log*"):
            if path.stat().st_mtime >= self._started_s:
                self.search(str(path), path.read_bytes())
        if self.found:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(
            f"secrets: {self.made:,} made; {self.bytes_searched:,} bytes of logs and "
            f"{self.files_searched:,} files searched for them in {self.seconds:.1f} s; "
            f"{len(self.found)} found"
        )
        for one in self.found:
            terminalreporter.write_line(f"  {one}", red=True)


def _log_files(folder: Path) -> Iterator[Path]:
    """Every file of a size to be read that is not meant to hold a secret."""
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("src", "build", "bin")]
        for name in names:
            path = Path(top, name)
            if name.endswith(HOLDERS) or path.is_symlink() or not path.is_file():
                continue
            if path.stat().st_size <= MAX_FILE_BYTES:
                yield path


class _RecordHandler(logging.Handler):
    """I keep records as they are written, tracebacks included."""

    def __init__(self, records: list[str]) -> None:
        super().__init__()
        self._kept = records
        self._formatter = logging.Formatter("%(name)s %(message)s")

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # one that cannot be formatted is in no log
            self._kept.append(self._formatter.format(record))


def install(watch: SecretsWatch) -> None:
    """Hooks into the places where secrets are made and where processes are started."""
    make_identity, make_secret = Identity.__init__, Secret.__init__
    take_line, start, run = NodeProcess.take_line, subprocess.Popen.__init__, subprocess.run

    def identity_made(self: Identity, key: Ed25519PrivateKey) -> None:
        make_identity(self, key)
        watch.note(key.private_bytes_raw())

    def secret_made(self: Secret, value: bytes) -> None:
        make_secret(self, value)
        watch.note(value)

    def line_taken(self: NodeProcess, line: str) -> None:
        watch.note_text(line)
        if self._child is not None:
            watch.note_descendants(self._child.pid)
        take_line(self, line)

    def started(self: Any, args: Any, *rest: Any, **named: Any) -> None:
        watch.note_arguments([args] if isinstance(args, str | bytes | Path) else list(args))
        start(self, args, *rest, **named)

    def ran(*args: Any, **named: Any) -> Any:
        done = run(*args, **named)
        for text in (done.stdout, done.stderr):
            if isinstance(text, str):
                watch.note_text(text)
        if isinstance(done.stderr, str):
            watch._records.append(done.stderr)
        return done

    Identity.__init__ = identity_made  # type: ignore[method-assign]
    Secret.__init__ = secret_made  # type: ignore[method-assign]
    NodeProcess.take_line = line_taken  # type: ignore[method-assign]
    subprocess.Popen.__init__ = started  # type: ignore[method-assign]
    subprocess.run = ran
    logging.getLogger().addHandler(_RecordHandler(watch._records))


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.get_plugin("secrets-watch") is None:
        watch = SecretsWatch()
        install(watch)
        config.pluginmanager.register(watch, "secrets-watch")
