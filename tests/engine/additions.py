"""What a model may be given on top: LoRA adapters, control vectors, image encoders."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import gguf
import numpy as np
import numpy.typing as npt

from tests.engine.blocks import LAYERS, WIDTH, Architecture, Shape

RANK = 4
IMAGE_SIDE = 28
PATCH_SIDE = 14
IMAGE_WIDTH = 64
IMAGE_FFN = 96
IMAGE_LAYERS = 3


def write_lora(path: Path, architecture: Architecture, tensors: Sequence[str]) -> Path:
    """An adapter of rank 4 for `tensors`: matrices, or stacks of the experts' matrices."""
    writer = gguf.GGUFWriter(str(path), architecture.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 2.0 * RANK)
    for name in tensors:
        *stack, rows, columns = architecture.tensors[name]
        writer.add_tensor(f"{name}.lora_a", _noise(f"{name}.a", (*stack, RANK, columns)))
        writer.add_tensor(f"{name}.lora_b", _noise(f"{name}.b", (*stack, rows, RANK)))
    return _written(writer, path)


def write_control_vector(path: Path, architecture: Architecture) -> Path:
    """A direction for every layer but the first, which none is taken for."""
    writer = gguf.GGUFWriter(str(path), "controlvector")
    writer.add_string("controlvector.model_hint", architecture.arch)
    writer.add_uint32("controlvector.layer_count", LAYERS)
    for index in range(1, LAYERS):
        name = f"direction.{index}"
        writer.add_tensor(name, _noise(name, (WIDTH,)) * np.float32(np.sqrt(WIDTH)))
    return _written(writer, path)


def write_image_encoder(path: Path) -> Path:
    """LLaVA's: an image of four patches becomes as many embeddings `WIDTH` wide."""
    writer = gguf.GGUFWriter(str(path), "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    sizes = {
        "image_size": IMAGE_SIDE,
        "patch_size": PATCH_SIDE,
        "embedding_length": IMAGE_WIDTH,
        "feed_forward_length": IMAGE_FFN,
        "block_count": IMAGE_LAYERS,
        "projection_dim": WIDTH,
        "attention.head_count": 2,
    }
    for key, size in sizes.items():
        writer.add_uint32(f"clip.vision.{key}", size)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5, 0.5, 0.5])
    for name, shape in _image_tensors().items():
        scaled = np.float32(1) if ".ln" in name and name.endswith("weight") else np.float32(0)
        writer.add_tensor(name, _noise(name, shape) + scaled)
    return _written(writer, path)


def _image_tensors() -> dict[str, Shape]:
    patches = (IMAGE_SIDE // PATCH_SIDE) ** 2
    found: dict[str, Shape] = {
        "v.class_embd": (IMAGE_WIDTH,),
        "v.patch_embd.weight": (IMAGE_WIDTH, 3, PATCH_SIDE, PATCH_SIDE),
        "v.position_embd.weight": (patches + 1, IMAGE_WIDTH),
        "v.pre_ln.weight": (IMAGE_WIDTH,),
        "v.pre_ln.bias": (IMAGE_WIDTH,),
        "mm.0.weight": (WIDTH, IMAGE_WIDTH),
        "mm.0.bias": (WIDTH,),
        "mm.2.weight": (WIDTH, WIDTH),
        "mm.2.bias": (WIDTH,),
    }
    matrices = dict.fromkeys(("q", "k", "v", "out"), (IMAGE_WIDTH, IMAGE_WIDTH))
    for index in range(IMAGE_LAYERS):
        block = f"v.blk.{index}."
        for part, shape in matrices.items():
            found |= {f"{block}attn_{part}.weight": shape, f"{block}attn_{part}.bias": shape[:1]}
        for part in ("ln1", "ln2"):
            found |= {f"{block}{part}.{kind}": (IMAGE_WIDTH,) for kind in ("weight", "bias")}
        found |= {
            f"{block}ffn_up.weight": (IMAGE_FFN, IMAGE_WIDTH),
            f"{block}ffn_up.bias": (IMAGE_FFN,),
            f"{block}ffn_down.weight": (IMAGE_WIDTH, IMAGE_FFN),
            f"{block}ffn_down.bias": (IMAGE_WIDTH,),
        }
    return found


def bitmap(seed: int) -> bytes:
    """A square image in Windows' BMP format, 24 bits a pixel."""
    row = IMAGE_SIDE * 3
    pixels = np.random.default_rng(seed).bytes(row * IMAGE_SIDE)
    header = struct.pack("<2sIHHI", b"BM", 54 + len(pixels), 0, 0, 54)
    info = struct.pack(
        "<IiiHHIIiiII", 40, IMAGE_SIDE, IMAGE_SIDE, 1, 24, 0, len(pixels), 0, 0, 0, 0
    )
    return header + info + pixels


def _noise(name: str, shape: Shape) -> npt.NDArray[np.float32]:
    values = np.random.default_rng(crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 3 else shape[-1]
    return values * np.float32(1 / np.sqrt(fan_in))


def _written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
