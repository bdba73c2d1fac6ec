"""`mesh`: the console script. Next to nothing is imported here, so that a Ctrl-C while the rest is
being imported ends in silence too."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from meshnode.errors import INTERRUPTED_EXIT_CODE


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with a code of `meshnode.errors`, or 130 when interrupted."""
    try:
        from meshnode.cli.commands import run

        code = run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        code = INTERRUPTED_EXIT_CODE
    sys.exit(code)


if __name__ == "__main__":
    main()
