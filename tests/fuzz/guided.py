"""Coverage-guided fuzzing of one parser: `python -m tests.fuzz.guided NAME FOLDER [SECONDS]`.

Needs atheris (`pip install atheris`: Linux, CPython), which the tests do without. FOLDER keeps the
inputs that take new ways. A finding is printed and kept as a regression; the run goes on.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

MAX_INPUT_BYTES = 4096


def main(name: str, folder: str, seconds: str = "60") -> None:
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["tunnels", "discovery", "meshnode"]):
        table = importlib.import_module("tests.fuzz.table")
    one = importlib.import_module("tests.fuzz.one")
    one.quiet()
    parser = table.PARSERS[name]
    if parser.run is None:
        sys.exit(f"{name} lives under trio, which atheris cannot drive: use ./just fuzz")
    known: set[str] = set()

    def try_input(data: bytes) -> None:
        try:
            parser.run(data)
        except parser.declared:
            pass
        except Exception as error:
            what = f"{type(error).__name__}: {str(error)[:60]}"
            if what not in known:
                known.add(what)
                print(f"{name}: {what} ({one.keep(name, data)})", file=sys.stderr)

    corpus = Path(folder)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(parser.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    limits = [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}"]
    atheris.Setup(["guided", folder, *limits], try_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
