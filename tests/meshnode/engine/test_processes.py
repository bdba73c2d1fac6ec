"""The engine's real processes: started, ready, stopped, and never left behind."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
import trio

from meshnode.engine.cache import Engine, load_engine
from meshnode.engine.devices import list_devices
from meshnode.engine.errors import EngineFailed
from meshnode.engine.llama_server import (
    LlamaServerOptions,
    llama_server_argv,
    llama_server_environment,
    open_llama_server,
)
from meshnode.engine.load_report import LoadProgress
from meshnode.engine.rpc_server import open_rpc_server, rpc_server_argv
from meshnode.errors import HomeError, UsageError
from tests.engine.synthetic import make_model

START_LIMIT_S = 60
pytestmark = pytest.mark.engine


@pytest.fixture
def engine(engine_bin: Path) -> Engine:
    return load_engine(engine_bin)


@pytest.fixture
def stock(stock_bin: Path) -> Engine:
    return load_engine(stock_bin)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_model(path, layers=2, width=64, vocab=300, ffn=64)
    return path


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name; pytest's own may be too long."""
    with TemporaryDirectory(prefix="mesh-", dir="/tmp") as folder:
        yield Path(folder)


def everything(model: Path, folder: Path) -> LlamaServerOptions:
    return LlamaServerOptions(
        model=model,
        socket_path=folder / "llama.sock",
        ctx_tokens=512,
        slots=2,
        rpc=("unix:/run/a.sock", "10.0.0.5:50052"),
        gpu_layers=3,
        tensor_split=(1, 2),
        devices=("RPC0", "RPC1"),
        threads=1,
        alias="tiny",
        roots=folder / "roots",
        report=folder / "report",
        presence=folder / "presence",
        extra=("--metrics", "--no-repack"),
    )


def options_unknown_to(program: str, argv: list[str]) -> list[str]:
    run = subprocess.run([program, "--help"], capture_output=True, check=True)
    known = set(re.findall(r"(?<![\w-])--?[\w-]+", (run.stdout + run.stderr).decode()))
    return [argument for argument in argv if argument.startswith("-") and argument not in known]


def test_every_option_we_give_is_one_the_engine_knows(
    engine: Engine, stock: Engine, model: Path, short: Path
) -> None:
    for each in (engine, stock):
        program, *argv = llama_server_argv(each, everything(model, short))
        assert options_unknown_to(program, argv) == []
        assert options_unknown_to(program, ["--no-such-option"]) == ["--no-such-option"]


def test_rpc_servers_options_are_ones_the_engine_knows(engine: Engine, short: Path) -> None:
    program, *argv = rpc_server_argv(
        engine,
        short / "rpc.sock",
        manifest=short / "manifest",
        memory_limit_bytes=1,
        devices=("CPU",),
        threads=None,
    )
    assert options_unknown_to(program, argv) == []


def test_the_files_of_a_load_are_named_in_the_environment(model: Path, short: Path) -> None:
    environment = llama_server_environment(everything(model, short))
    assert environment["GGML_RPC_MESH_ROOTS"] == str(short / "roots")
    assert environment["GGML_RPC_MESH_REPORT"] == str(short / "report")
    assert environment["GGML_RPC_MESH_PRESENCE"] == str(short / "presence")


def test_a_trace_goes_where_the_users_environment_says(
    model: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GGML_RPC_TRACE", raising=False)
    assert "GGML_RPC_TRACE" not in llama_server_environment(everything(model, short))
    monkeypatch.setenv("GGML_RPC_TRACE", "trace.tsv")
    environment = llama_server_environment(everything(model, short))
    assert environment["GGML_RPC_TRACE"] == str(Path.cwd() / "trace.tsv")


@pytest.mark.parametrize("option", ["--host", "-ngl", "--rpc=1.2.3.4:5", "--model", "--api-key"])
def test_what_the_plan_decides_cannot_be_undone_after_the_dashes(
    stock: Engine, model: Path, short: Path, option: str
) -> None:
    options = LlamaServerOptions(model, short / "a.sock", 512, extra=(option, "x"))
    with pytest.raises(UsageError, match="is mesh's to decide"):
        llama_server_argv(stock, options)


def test_devices_end_with_the_cpu(engine: Engine) -> None:
    assert list_devices(engine)[-1].name == "CPU"


@pytest.mark.parametrize("which", ["engine", "stock"])
async def test_llama_server_is_ready_when_the_block_begins_and_gone_when_it_ends(
    request: pytest.FixtureRequest, model: Path, short: Path, which: str
) -> None:
    engine = request.getfixturevalue(which)
    options = LlamaServerOptions(model, short / "llama.sock", 512, threads=1)
    with trio.fail_after(START_LIMIT_S):
        async with open_llama_server(engine, options, log=short / "log") as server:
            async with server.client() as client:
                body = {"prompt": "a b", "n_predict": 3, "temperature": 0}
                answer = await client.post("/completion", json=body)
                page = await client.get("/")
            assert answer.status_code == httpx.codes.OK
            assert answer.json()["tokens_predicted"] == 3
            assert page.status_code == httpx.codes.NOT_FOUND, "no page for browsers"
            pid = server.child.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not options.socket_path.exists()


async def test_a_model_that_is_none_ends_in_the_engines_own_words(
    stock: Engine, short: Path
) -> None:
    bad = short / "bad.gguf"
    bad.write_bytes(b"GGUF but not really")
    options = LlamaServerOptions(bad, short / "llama.sock", 512)
    with trio.fail_after(START_LIMIT_S), pytest.raises(EngineFailed) as caught:
        async with open_llama_server(stock, options, log=short / "log"):
            pass
    assert "llama-server exited with status 1 before the model was loaded" in str(caught.value)
    assert any("failed to load model" in line for line in caught.value.lines)


async def test_a_model_split_over_an_rpc_server_reports_what_was_read_where(
    engine: Engine, model: Path, short: Path
) -> None:
    report, steps = short / "report", list[LoadProgress]()
    rpc = short / "rpc.sock"
    with trio.fail_after(START_LIMIT_S):
        async with open_rpc_server(
            engine,
            rpc,
            manifest=None,
            memory_limit_bytes=1 << 30,
            threads=1,
            log=short / "rpc.log",
        ) as child:
            assert rpc.stat().st_mode & 0o777 == 0o600
            options = LlamaServerOptions(
                model,
                short / "llama.sock",
                512,
                rpc=(f"unix:{rpc}",),
                devices=("RPC0",),
                gpu_layers=3,
                threads=1,
                report=report,
            )
            async with open_llama_server(
                engine, options, log=short / "log", on_progress=steps.append
            ) as server:
                (load,) = server.loads
            assert child.returncode is None, "an rpc-server outlives its connections"
    assert not rpc.exists()
    assert load.server == f"unix:{rpc}"
    assert load.sent_tensors > 0, "no manifest, so every weight was sent"
    assert (load.local_tensors, load.failures) == (0, 0)


async def test_an_rpc_server_that_cannot_start_says_why(engine: Engine, short: Path) -> None:
    with trio.fail_after(START_LIMIT_S), pytest.raises(EngineFailed) as caught:
        async with open_rpc_server(
            engine,
            short / "rpc.sock",
            manifest=None,
            memory_limit_bytes=1 << 30,
            devices=("ABACUS0",),
            log=short / "log",
        ):
            pass
    assert "before it was ready" in str(caught.value)
    assert any("unknown device: ABACUS0" in line for line in caught.value.lines)


async def test_a_socket_path_that_no_system_takes_is_refused_before_the_start(
    stock: Engine, model: Path, tmp_path: Path
) -> None:
    options = LlamaServerOptions(model, tmp_path / ("x" * 120) / "llama.sock", 512)
    with pytest.raises(HomeError, match="too long for a socket"):
        async with open_llama_server(stock, options, log=tmp_path / "log"):
            pass


PARENT = """
import sys, trio
from pathlib import Path
from meshnode.engine.cache import load_engine
from meshnode.engine.children import child_environment, open_child
async def main():
    log, program, *arguments = sys.argv[1:]
    async with open_child(
        [program, *arguments], env=child_environment(), log=Path(log), name="engine"
    ) as child:
        print(child.pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.parametrize("program", ["ggml-rpc-server", "llama-server"])
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="sees a process end by its pidfd: Linux")
def test_no_engine_process_survives_its_parents_kill_9(
    engine: Engine, model: Path, short: Path, program: str
) -> None:
    arguments = {
        "ggml-rpc-server": ["-H", f"unix:{short}/rpc.sock"],
        "llama-server": ["-m", str(model), "--host", f"{short}/llama.sock", "--no-ui"],
    }[program]
    command = [str(engine.binary(program)), *arguments]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(short / "log"), *command], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    with parent.stdout as output:
        child = os.pidfd_open(int(output.readline()))
        parent.kill()
        parent.wait()
        try:
            assert select.select([child], [], [], 20)[0], f"{program} outlives its parent"
        except AssertionError:
            signal.pidfd_send_signal(child, signal.SIGKILL)
            raise
        finally:
            os.close(child)
