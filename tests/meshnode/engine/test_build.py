from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from meshnode.engine import build, cache
from meshnode.engine.build import BuildOptions, build_engine, engine_key, find_built, find_engine
from meshnode.engine.compile import run_cmake
from meshnode.engine.errors import (
    BuildFailed,
    CacheUnwritable,
    EngineChanged,
    NoCompiler,
    NoRoomToBuild,
    PatchFailed,
)
from meshnode.errors import UsageError
from tests.meshnode.engine import fake_llama
from tests.meshnode.engine.conftest import Fake

pytestmark = pytest.mark.usefixtures("compiler")
CPU = BuildOptions(backend="cpu", jobs=2)
STOCK = BuildOptions(backend="cpu", jobs=2, stock=True)


class Recorder:
    """I keep what a build reports."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.stages: list[str] = []

    def __call__(self, done: int, total: int, line: str) -> None:
        if total:
            self.steps.append((done, total))
        else:
            self.stages.append(line)


def says(engine: build.Engine) -> str:
    run = subprocess.run([engine.binary("llama-server")], capture_output=True, check=True)
    return run.stdout.decode().strip()


@pytest.fixture
def no_compiler_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a Mac without its command line tools: c++ is there and does nothing but fail."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("cc", "gcc", "clang", "c++", "g++", "clang++"):
        (stubs / name).write_text("#!/bin/sh\nexit 1\n")
        (stubs / name).chmod(0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(stubs), prepend=os.pathsep)


def test_patched_and_stock_stand_side_by_side_and_are_found_again(fake: Fake) -> None:
    assert find_engine() is None
    report = Recorder()
    patched = build_engine(CPU, report)
    assert report.steps[-1] == (8, 8), "four objects, four programs"
    assert says(patched) == "patched"
    assert find_engine() == patched.bin_dir
    assert find_engine(stock=True) is None
    stock = build_engine(STOCK, Recorder())
    assert says(stock) == "stock"
    assert find_engine(stock=True) == stock.bin_dir
    assert find_engine() == patched.bin_dir
    assert engine_key(stock.bin_dir) == stock.key != engine_key(patched) == patched.key


@pytest.mark.parametrize("harm", ["garbage", "deleted", "not executable"])
def test_a_program_that_was_harmed_is_refused_and_built_again(fake: Fake, harm: str) -> None:
    engine = build_engine(CPU, Recorder())
    program = engine.program("llama-server")
    if harm == "garbage":
        program.write_bytes(b"garbage")
    elif harm == "deleted":
        program.unlink()
    else:
        program.chmod(0o644)
    with pytest.raises(EngineChanged, match="mesh engine build"):
        engine.program("llama-server")
    assert says(build_engine(CPU, Recorder())) == "patched"
    assert says(engine) == "patched"
    engine.program("llama-server")  # another copy of what this process started with


def test_the_second_time_nothing_is_run(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_engine(CPU, Recorder())
    monkeypatch.setattr(build, "run_cmake", None)
    monkeypatch.setattr(build, "open_source", None)
    report = Recorder()
    assert build_engine(CPU, report) == first
    assert report.stages == []


def test_a_changed_patch_is_another_engine_and_compiles_only_what_it_touches(fake: Fake) -> None:
    old = build_engine(CPU, Recorder())
    patch = fake.patches / fake_llama.PATCH_NAME
    patch.write_text(patch.read_text().replace('"patched"', '"renamed"'))
    assert find_engine() is None
    new = build_engine(CPU, Recorder())
    assert new.key != old.key
    assert says(new) == "renamed"
    assert says(old) == "patched"


def test_a_checkout_that_is_patched_already_is_built_as_it_is(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = fake_llama.write_checkout(tmp_path / "checkout")
    (checkout / "mesh.h").write_text("")
    options = BuildOptions(backend="cpu", source=checkout)
    engine = build_engine(options, Recorder())
    assert says(engine) == "stock", "the patch was not applied a second time"
    monkeypatch.setenv("MESH_ENGINE_SOURCE", str(checkout))
    assert find_engine() == engine.bin_dir
    with pytest.raises(PatchFailed, match="is patched already"):
        build_engine(STOCK, Recorder())


def test_a_failure_ends_in_the_compilers_words_and_the_logs_path(fake: Fake) -> None:
    patch = fake.patches / fake_llama.PATCH_NAME
    patch.write_text(patch.read_text().replace('"patched"', "no_such_name"))
    with pytest.raises(BuildFailed) as caught:
        build_engine(CPU, Recorder())
    assert any("no_such_name" in line and "error" in line for line in caught.value.lines)
    assert not any("FAILED" in line or line.startswith("[") for line in caught.value.lines)
    assert str(caught.value).endswith(f"The whole log: {caught.value.log}")
    assert "no_such_name" in caught.value.log.read_text()
    assert find_engine() is None


def test_a_failing_configuration_is_told_the_same_way(fake: Fake, tmp_path: Path) -> None:
    checkout = fake_llama.write_checkout(tmp_path / "checkout")
    (checkout / "CMakeLists.txt").write_text('message(FATAL_ERROR "the moon is wrong")\n')
    with pytest.raises(BuildFailed, match=r"cmake could not configure(.|\n)*the moon is wrong"):
        build_engine(BuildOptions(backend="cpu", source=checkout), Recorder())


def test_a_build_folder_that_makes_no_sense_is_begun_again(fake: Fake) -> None:
    first = build_engine(CPU, Recorder())
    (work,) = (fake.cache / "engine" / "work").iterdir()
    cached = work / "build" / "CMakeCache.txt"
    cached.write_text(cached.read_text().replace(str(work), "/moved/from/here"))
    shutil.rmtree(first.bin_dir.parent)
    assert says(build_engine(CPU, Recorder())) == "patched"


def test_an_engine_with_a_binary_missing_is_not_one(fake: Fake) -> None:
    engine = build_engine(CPU, Recorder())
    engine.binary("llama-bench").unlink()
    assert find_engine() is None
    assert says(build_engine(CPU, Recorder())) == "patched"


def test_a_build_that_is_killed_is_not_used_and_the_next_goes_on_from_it(
    fake: Fake, tmp_path: Path
) -> None:
    """The first is killed when its first compile step is done; the second has less to do."""
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    script = (
        "import sys; from pathlib import Path; from meshnode.engine import build, patches\n"
        f"patches.patches_folder = lambda: Path({str(fake.patches)!r})\n"
        "def progress(done, total, line):\n"
        "    if done == 1:\n"
        f"        open({str(ready)!r}, 'w').close()\n"
        "        sys.stdin.read()\n"
        "build.build_engine(build.BuildOptions(backend='cpu', jobs=1), progress)\n"
    )
    victim = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    ready.open("rb").close()
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert victim.stdin is not None
    victim.stdin.close()
    assert find_engine() is None
    report = Recorder()
    assert says(build_engine(CPU, report)) == "patched"
    assert report.steps[-1][1] < 8


def test_two_builds_at_once_wait_for_each_other_and_compile_once(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first holds the lock until the second has said that it waits."""
    second_waits = threading.Event()
    inside = threading.Event()
    compile_now = run_cmake
    compiled: list[str] = []

    def compile_when_the_other_waits(job: object, progress: Recorder) -> None:
        compiled.append("once")
        inside.set()
        assert second_waits.wait(30)
        compile_now(job, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "run_cmake", compile_when_the_other_waits)

    def second_progress(done: int, total: int, line: str) -> None:
        assert line.startswith("another build is running")
        second_waits.set()

    engines: list[build.Engine] = []
    first = threading.Thread(target=lambda: engines.append(build_engine(CPU, Recorder())))
    first.start()
    assert inside.wait(30)
    engines.append(build_engine(CPU, second_progress))
    first.join()
    assert engines[0] == engines[1]
    assert compiled == ["once"]


@pytest.mark.usefixtures("no_compiler_works")
def test_no_compiler_is_one_sentence_with_the_command_that_installs_it(fake: Fake) -> None:
    with pytest.raises(NoCompiler, match=r"^no C.. compiler works here: install one with `.+`$"):
        build_engine(CPU, Recorder())


def test_what_is_built_still_runs_where_the_compiler_was_removed(
    fake: Fake, request: pytest.FixtureRequest
) -> None:
    engine = build_engine(CPU, Recorder())
    request.getfixturevalue("no_compiler_works")
    assert find_engine() == engine.bin_dir


def test_another_compiler_means_another_build(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    build_engine(CPU, Recorder())
    wrapped = fake.cache / "c++"
    wrapped.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "c++ 99.0" && exit\nexec c++ "$@"\n'
    )
    wrapped.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapped))
    assert find_engine() is None
    assert build_engine(CPU, Recorder()).compiler.startswith("c++ 99.0")


def test_a_full_disk_is_noticed_before_an_hour_is_lost(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "MIN_FREE_BYTES", 1 << 62)
    with pytest.raises(NoRoomToBuild, match="MESH_CACHE"):
        build_engine(CPU, Recorder())


def test_a_cache_that_cannot_be_written_is_one_sentence(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_CACHE", str(fake.sdist / "in-a-file"))
    with pytest.raises(CacheUnwritable, match="name a folder of yours with MESH_CACHE"):
        build_engine(CPU, Recorder())


def test_a_disk_that_fills_up_while_compiling_is_said_to_be_full(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.cache.mkdir(exist_ok=True)
    wrapped = fake.cache / "c++"
    wrapped.write_text(
        '#!/bin/sh\ncase "$*" in *main.cpp*) echo "cc1plus: No space left on device" >&2; exit 1;;'
        ' esac\nexec c++ "$@"\n'
    )
    wrapped.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapped))
    with pytest.raises(NoRoomToBuild):
        build_engine(CPU, Recorder())


def test_a_backend_that_cannot_be_built_here_says_what_it_needs(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnode.engine.toolchain.nvcc", lambda: None)
    with pytest.raises(NoCompiler, match=r"needs the CUDA toolkit \(nvcc and cublas\)"):
        build_engine(BuildOptions(backend="cuda"), Recorder())
    with pytest.raises(UsageError, match="no backend 'abacus': known are cpu, cuda"):
        build_engine(BuildOptions(backend="abacus"), Recorder())


def test_binaries_that_mesh_did_not_build_have_a_key_that_equals_no_other(
    fake: Fake, tmp_path: Path
) -> None:
    engine = build_engine(CPU, Recorder())
    copied = tmp_path / "elsewhere" / "bin"
    shutil.copytree(engine.bin_dir, copied)
    assert engine_key(copied).startswith("foreign-")
    assert find_built() == cache.load_engine(engine.bin_dir) == engine
