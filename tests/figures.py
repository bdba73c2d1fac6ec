"""The figures of docs/security.md, out of what the recipes wrote: `python -m tests.figures`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.sansio import ROOT

PAGE = ROOT / "docs" / "security.md"
FUZZED = ROOT / "tests" / "fuzz" / "results.json"
ENGINE_FUZZED = ROOT / "docs" / "fuzz-engine.json"
KILLS = ROOT / "docs" / "kills.md"
FLOODS = ROOT / "docs" / "floods.md"
SANDBOX = ROOT / "docs" / "sandbox.md"
BEGIN, END = "<!-- figures: python -m tests.figures -->", "<!-- end of the figures -->"
_FLOOD = re.compile(
    r"^\| (?P<flood>[^|]+) \| (?P<bulk>[\d.]+), (?P<bulk_cpu>[\d.]+) "
    r"\| (?P<trips>[\d.]+), (?P<trips_cpu>[\d.]+) \| (?P<cpu>\d+)% \| (?P<mib>-?\d+) \| ",
    re.MULTILINE,
)


def table() -> str:
    """The page's table, of the last recorded runs. Raises OSError where a recipe never wrote."""
    rows = (*_fuzzed(), _engine_fuzzed(), _kills(), *_floods(), _sandbox())
    return "\n".join(
        ("| what | figure | recipe |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows))
    )


def on_page() -> str:
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def _fuzzed() -> list[tuple[str, str, str]]:
    results: list[dict[str, Any]] = list(json.loads(FUZZED.read_text()).values())
    least = min(result["inputs"] for result in results)
    findings = sum(result["findings"] for result in results)
    slowest = max(results, key=lambda result: float(result["worst_ms"]))
    recipe = "`./just fuzz --write`"
    return [
        (
            f"inputs into each of the {len(results)} [parsers](fuzzing.md#results)",
            f"{least:,} at least; {findings} findings",
            recipe,
        ),
        (
            "the slowest of them all",
            f"{slowest['worst_ms']:.0f} ms ({slowest['name']})",
            recipe,
        ),
    ]


def _engine_fuzzed() -> tuple[str, str, str]:
    result = json.loads(ENGINE_FUZZED.read_text())
    finding = result["finding"] or "0 findings"
    return (
        "hostile sessions into rpc-server's message loop, ASan and UBSan",
        f"{result['inputs']:,}; {finding}; {result['coverage']:,} edges",
        "`./just fuzz-engine runs=1000000 --write`",
    )


def _kills() -> tuple[str, str, str]:
    text = KILLS.read_text()
    (survived,) = re.findall(r"^(\d+ of \d+) kills survived\.$", text, re.MULTILINE)
    freed = [float(cell) for cell in re.findall(r"\| ([\d.]+) \|$", text, re.MULTILINE)]
    (recipe,) = re.findall(r"`\./just kills \d+ --write`", text)
    return (
        "[kill -9](kills.md) at named points of join, lease, load and generation",
        f"{survived} survived; a lease freed in {max(freed):.2f} s at most",
        recipe,
    )


def _floods() -> list[tuple[str, str, str]]:
    floods = [found.groupdict() for found in _FLOOD.finditer(FLOODS.read_text())]

    def least(what: str) -> str:
        worst = min(floods, key=lambda flood: float(flood[what]))
        return f"{worst[what]} ({worst['flood']})"

    recipe = "`./just floods --write`"
    return [
        (
            f"bulk speed an honest peer keeps, the least of {len(floods)} [floods](floods.md)",
            f"by processor time {least('bulk_cpu')}; by the clock {least('bulk')}",
            recipe,
        ),
        (
            "10 KB round trips it keeps, the least",
            f"by processor time {least('trips_cpu')}; by the clock {least('trips')}",
            recipe,
        ),
        (
            "memory a flood takes of the node, the most",
            f"{max(int(flood['mib']) for flood in floods)} MiB",
            recipe,
        ),
    ]


def _sandbox() -> tuple[str, str, str]:
    text = SANDBOX.read_text().replace("\n> ", " ")
    (sentence,) = re.findall(r"With the sandbox: ([^)]+\))", text)
    return (
        "tokens/s with the [sandbox](sandbox.md) on",
        sentence,
        "`python -m tests.bench.sandbox_speed`",
    )


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    Path(PAGE).write_text(
        f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
