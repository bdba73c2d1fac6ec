"""Models for the engine's benchmark: random weights, any size, the same bytes each time.

`python -m tests.bench.engine_model --layers 16 --width 1024 OUT.gguf` writes one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import click

from meshnode.engine.cache import cache_dir
from tests.engine.synthetic import make_model

VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """A llama-architecture model in Q8_0."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int = VOCABULARY

    @property
    def parameters(self) -> int:
        kv_width = self.width // self.heads * self.kv_heads
        layer = 2 * self.width * (self.width + kv_width) + 3 * self.width * self.ffn
        return self.layers * layer + 2 * self.vocab * self.width

    def describe(self) -> str:
        millions = self.parameters / 1e6
        return f"{millions:.0f} M parameters, Q8_0, {self.layers} layers × {self.width}"

    @property
    def file_name(self) -> str:
        sizes = (self.layers, self.width, self.ffn, self.heads, self.kv_heads, self.vocab)
        return "-".join(("synthetic", *map(str, sizes))) + ".gguf"


SMALL = Shape(layers=16, width=1024, ffn=2816, heads=16, kv_heads=8)
LIKE_SEED = Shape(layers=22, width=1024, ffn=2816, heads=16, kv_heads=8)
"""About as fast on two cores as the seed project's model was on its machines."""
LARGE = Shape(layers=40, width=2048, ffn=5632, heads=32, kv_heads=16)  # 2.1 GB
DRAFT = Shape(layers=1, width=64, ffn=64, heads=2, kv_heads=2)


def written_model(shape: Shape, folder: Path | None = None) -> Path:
    """Its file, in `folder` or in the cache; written at the first call."""
    models = folder or cache_dir() / "bench-models"
    models.mkdir(parents=True, exist_ok=True)
    path = models / shape.file_name
    if not path.exists():
        # A run that is cut short leaves no half a model under the name.
        partial = path.with_name("partial-" + path.name)
        make_model(partial, **asdict(shape))
        partial.replace(path)
    return path


@click.command()
@click.option("--layers", type=click.IntRange(1), default=SMALL.layers)
@click.option("--width", type=click.IntRange(32), default=SMALL.width)
@click.option("--ffn", type=click.IntRange(32), help="Default: 2.75 times the width.")
@click.option("--heads", type=click.IntRange(1), help="Default: one for 64 of the width.")
@click.option("--kv-heads", type=click.IntRange(1), help="Default: half of the heads.")
@click.option("--vocab", type=click.IntRange(260), default=VOCABULARY)
@click.argument("out", type=click.Path(path_type=Path))
def main(
    layers: int,
    width: int,
    ffn: int | None,
    heads: int | None,
    kv_heads: int | None,
    vocab: int,
    out: Path,
) -> None:
    """Write a random llama-architecture model in Q8_0 to OUT."""
    heads = heads or max(1, width // 64)
    shape = Shape(
        layers, width, ffn or width * 11 // 4, heads, kv_heads or max(1, heads // 2), vocab
    )
    make_model(out, **asdict(shape))
    click.echo(f"{out}: {shape.describe()}, {out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
