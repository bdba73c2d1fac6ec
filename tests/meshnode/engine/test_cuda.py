"""Builds for NVIDIA's GPUs, with tools that only say what theirs would; cmake and ninja are real.

That llama.cpp's kernels compile shows only where nvcc is real.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshnode.engine.build import BuildOptions, build_engine, find_built
from meshnode.engine.compile import CompileJob
from meshnode.engine.cuda import what_cuda_lacks
from meshnode.engine.errors import BuildFailed, NoCompiler
from tests.meshnode.engine import fake_llama
from tests.meshnode.engine.conftest import Fake

pytestmark = pytest.mark.usefixtures("compiler")
CUDA = BuildOptions(backend="cuda", jobs=2)
NVCC = "echo 'Cuda compilation tools'\necho 'Build cuda_13.0.r13.0'\n"
Tool = Callable[[str, str], Path]


def silent(_done: int, _total: int, _line: str) -> None:
    pass


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Puts a program first on the PATH: an nvcc, and an nvidia-smi without a driver, are there."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDAARCHS", raising=False)
    monkeypatch.delenv("CUDACXX", raising=False)

    def place(name: str, script: str) -> Path:
        (folder / name).write_text(f"#!/bin/sh\n{script}")
        (folder / name).chmod(0o755)
        return folder / name

    place("nvcc", NVCC)
    place("nvidia-smi", "echo 'NVIDIA-SMI has failed'\nexit 9\n")
    return place


def told(fake: Fake) -> str:
    """What cmake was told for the only build there is."""
    [settings] = (fake.cache / "engine" / "work").glob("*/build/CMakeCache.txt")
    return settings.read_text()


def test_the_engine_is_built_for_the_gpus_of_this_machine_and_is_one_of_its_own(
    fake: Fake, tool: Tool
) -> None:
    tool("nvidia-smi", "printf '12.0\\n8.6\\n12.0\\n'\n")
    engine = build_engine(CUDA, silent)
    assert engine.backend == "cuda"
    assert engine.compiler.endswith(" / Build cuda_13.0.r13.0 / for 86-real;120-real")
    assert "GGML_CUDA:UNINITIALIZED=ON" in told(fake)
    assert "GGML_CUDA_NCCL:UNINITIALIZED=OFF" in told(fake)
    assert "CMAKE_CUDA_ARCHITECTURES:UNINITIALIZED=86-real;120-real" in told(fake)
    assert find_built(backend="cuda") == engine
    assert find_built(backend="cpu") is None


def test_after_another_gpu_was_put_in_the_engine_is_built_for_that_one(
    fake: Fake, tool: Tool
) -> None:
    tool("nvidia-smi", "echo 8.6\n")
    first = build_engine(CUDA, silent)
    tool("nvidia-smi", "echo 8.9\n")
    assert find_built(backend="cuda") is None
    assert build_engine(CUDA, silent).bin_dir != first.bin_dir


def test_an_engine_that_is_built_is_found_while_its_gpu_is_away(fake: Fake, tool: Tool) -> None:
    """A driver that was just updated answers nothing until the machine is started anew."""
    tool("nvidia-smi", "echo 8.6\n")
    engine = build_engine(CUDA, silent)
    tool("nvidia-smi", "exit 18\n")
    assert find_built(backend="cuda") == engine


def test_where_no_gpu_is_to_be_seen_the_user_says_for_which_to_build(
    fake: Fake, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoCompiler, match=r"no GPU is to be seen.* set CUDAARCHS.* --backend cpu"):
        build_engine(CUDA, silent)
    monkeypatch.setenv("CUDAARCHS", "90")
    assert build_engine(CUDA, silent).compiler.endswith(" / for 90")
    assert "CMAKE_CUDA_ARCHITECTURES:UNINITIALIZED=90\n" in told(fake)


def test_a_toolkit_without_cublas_is_named_with_the_remedy_before_anything_compiles(
    fake: Fake, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDAARCHS", "90")
    checkout = fake_llama.write_checkout(tmp_path / "checkout")
    with (checkout / "CMakeLists.txt").open("a") as settings:
        settings.write("target_link_libraries(llama-server PRIVATE CUDA::cublas)\n")
    options = BuildOptions(backend="cuda", source=checkout)
    steps: list[int] = []
    with pytest.raises(NoCompiler) as caught:
        build_engine(options, lambda done, _total, _line: steps.append(done))
    sentence, log = str(caught.value).splitlines()
    assert sentence.startswith(f"the CUDA toolkit of {tmp_path}/tools/nvcc has no cublas (")
    assert "install the whole toolkit" in sentence
    assert "CUDACXX" in sentence
    assert sentence.endswith("--backend cpu")
    assert log.startswith("The whole log: ")
    assert not any(steps)
    tool("nvcc", NVCC)  # as one that was mended: what failed is not kept
    (checkout / "CMakeLists.txt").write_text(fake_llama.CMAKE)
    assert build_engine(options, silent).backend == "cuda"


def test_another_failure_of_cmake_keeps_its_own_words(
    fake: Fake, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDAARCHS", "90")
    checkout = fake_llama.write_checkout(tmp_path / "checkout")
    (checkout / "CMakeLists.txt").write_text('message(FATAL_ERROR "the moon is wrong")\n')
    with pytest.raises(BuildFailed, match="the moon is wrong"):
        build_engine(BuildOptions(backend="cuda", source=checkout), silent)


def test_a_second_toolkit_has_a_work_folder_of_its_own(
    fake: Fake, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cmake keeps where it found a toolkit's parts: those of two would be mixed."""
    monkeypatch.setenv("CUDAARCHS", "90")
    used: list[Path] = []

    def note(job: CompileJob, _progress: object) -> None:
        used.append(job.build)
        raise BuildFailed("enough", (), job.log)

    monkeypatch.setattr("meshnode.engine.build.run_cmake", note)
    second = tmp_path / "second" / "nvcc"
    second.parent.mkdir()
    second.symlink_to(tool("nvcc", NVCC))
    for named in ("", str(second)):
        monkeypatch.setenv("CUDACXX", named)
        with pytest.raises(BuildFailed, match="enough"):
            build_engine(CUDA, silent)
    assert len(set(used)) == 2


def test_an_nvcc_that_does_not_run_is_one_sentence(
    fake: Fake, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDAARCHS", "90")
    broken = tool("nvcc", "exit 127\n")
    with pytest.raises(NoCompiler, match=f"{broken} does not run: install the CUDA toolkit anew"):
        build_engine(CUDA, silent)


def test_what_cmake_says_of_a_toolkit_is_told_in_one_sentence(tool: Tool) -> None:
    missing = 'Target "ggml-cuda" links to:\n\n    CUDA::{}\n\n  but the target was not found.'
    both = missing.format("cublas") + missing.format("cuda_driver") + missing.format("cublas")
    sentence = what_cuda_lacks(both) or ""
    assert "has no cublas (cublas_v2.h" in sentence
    assert " and no libcuda.so to link with (" in sentence
    newer = "host_config.h:143: error: #error -- unsupported GNU version! gcc versions later than"
    assert "CUDAHOSTCXX" in (what_cuda_lacks(newer) or "")
    assert what_cuda_lacks("ninja: build stopped: subcommand failed.") is None
