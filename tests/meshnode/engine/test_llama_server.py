"""What llama-server is told in its environment."""

from __future__ import annotations

from pathlib import Path

from meshnode.config import WireType
from meshnode.engine.llama_server import LlamaServerOptions, llama_server_environment


def test_only_what_differs_from_the_engines_own_way_is_in_its_environment() -> None:
    plain = LlamaServerOptions(Path("m.gguf"), Path("s.sock"), 512)
    named = {name for name in llama_server_environment(plain) if name.startswith("GGML_RPC_MESH")}
    assert named == set()
    options = LlamaServerOptions(
        Path("m.gguf"), Path("s.sock"), 512, output_device="CPU", wire_type=WireType.F16
    )
    environment = llama_server_environment(options)
    assert environment["GGML_RPC_MESH_OUTPUT"] == "CPU"
    assert environment["GGML_RPC_MESH_WIRE_DTYPE"] == "f16"
