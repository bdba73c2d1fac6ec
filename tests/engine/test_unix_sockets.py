"""Endpoints written unix:/path (patch 1)."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from tests.engine.processes import EngineFailed, alone, greedy_tokens, llama_server, rpc_server

pytestmark = pytest.mark.engine


def test_a_remote_engine_on_a_unix_socket_says_the_same_tokens_as_the_engine_alone(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    expected = alone(engine_bin, folder, model)
    with (
        rpc_server(engine_bin, folder) as worker,
        llama_server(engine_bin, folder, model, rpc=[worker]) as server,
    ):
        assert greedy_tokens(server) == expected
        assert "never expose" not in worker.log.lower()


def test_two_remote_engines_share_the_layers(engine_bin: Path, folder: Path, model: Path) -> None:
    expected = alone(engine_bin, folder, model)
    with (
        rpc_server(engine_bin, folder, name="a") as first,
        rpc_server(engine_bin, folder, name="b") as second,
        llama_server(engine_bin, folder, model, "-ts", "2,3", rpc=[first, second]) as server,
    ):
        assert greedy_tokens(server) == expected


def test_only_the_owner_may_connect(engine_bin: Path, folder: Path) -> None:
    with rpc_server(engine_bin, folder) as worker:
        mode = Path(worker.address.removeprefix("unix:")).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_the_socket_of_a_dead_server_is_replaced(engine_bin: Path, folder: Path) -> None:
    with rpc_server(engine_bin, folder) as worker:
        worker.process.kill()
        worker.process.wait()
    assert (folder / "rpc.sock").is_socket()
    with rpc_server(engine_bin, folder) as worker:
        assert worker.alive


def test_a_living_server_keeps_its_socket(engine_bin: Path, folder: Path) -> None:
    with rpc_server(engine_bin, folder) as worker:
        before = (folder / "rpc.sock").stat().st_ino
        second = _start(engine_bin, folder, worker.address)
        assert second.returncode == 1
        assert "another server is using it" in second.log
        assert (folder / "rpc.sock").stat().st_ino == before
        assert worker.alive


def test_a_file_that_is_no_socket_is_left_alone(engine_bin: Path, folder: Path) -> None:
    (folder / "precious").write_text("data")
    failed = _start(engine_bin, folder, f"unix:{folder}/precious")
    assert failed.returncode == 1
    assert "a file that is not a socket is there" in failed.log
    assert (folder / "precious").read_text() == "data"


@pytest.mark.parametrize(
    ("path", "sentence"),
    [("/tmp/" + "x" * 120, "choose a shorter one"), ("relative.sock", "must be absolute")],
)
def test_a_path_that_cannot_be_a_socket_is_refused_in_a_sentence(
    engine_bin: Path, folder: Path, path: str, sentence: str
) -> None:
    failed = _start(engine_bin, folder, f"unix:{path}")
    assert failed.returncode == 1
    assert sentence in failed.log


def _start(engine_bin: Path, folder: Path, address: str) -> EngineFailed:
    """Start a server that must not start; the later -H wins over the harness's own."""
    with (
        pytest.raises(EngineFailed) as refused,
        rpc_server(engine_bin, folder, "-H", address, name="refused"),
    ):
        pass
    return refused.value


def test_a_client_that_dies_in_the_middle_of_a_reply_does_not_take_the_server_along(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    with rpc_server(engine_bin, folder) as worker:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(worker.address.removeprefix("unix:"))
                hello = bytes([14]) + (24).to_bytes(8, "little") + bytes(24)
                device_count = bytes([15]) + bytes(8)
                client.sendall(hello + device_count * 200)
        with llama_server(engine_bin, folder, model, rpc=[worker]) as server:
            assert greedy_tokens(server)
