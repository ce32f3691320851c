"""The table of docs/reliability.md from the results that the harnesses wrote.

python benchmarks/chaos_report.py        # rewrites the table from benchmarks/results/chaos_*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "reliability.md"
START, END = "<!-- chaos: python benchmarks/chaos_report.py -->", "<!-- /chaos -->"


def read(name: str) -> dict[str, Any]:
    """A result by the name of its part."""
    return json.loads((RESULTS / f"chaos_{name}.json").read_text())


def table() -> str:
    """Markdown: what was run, how much of it, and what came out."""
    rows = ["| run | how much | found | verdict |", "| --- | --- | --- | --- |"]
    for name, row in (("kill_first", _kill), ("kill", _kill), ("faults", _faults), ("fuzz_first", _fuzz)):
        rows.append(row(name, read(name)))
    rows += [_fuzz("fuzz", read("fuzz"))] + [_soak(name, read(name)) for name in ("soak_first", "soak")]
    return "\n".join(rows)


def _line(name: str, much: str, found: str, ok: bool) -> str:
    return f"| `{name}` | {much} | {found} | {'passed' if ok else 'failed'} |"


def _kill(name: str, result: dict[str, Any]) -> str:
    places = {
        "before_steps": "before the first step", "in_steps": "between saves", "in_writing": "while a save was written",
        "after_seal": "after its manifest", "between_renames": "between its renames",
    }  # fmt: skip
    fell = ", ".join(f"{result[key]} {words}" for key, words in places.items() if result[key])
    compared, files = result["compared"], ", ".join(f"`{where}`" for where in result["differences"])
    much = f"{result['kills']} kills of a run of {result['steps']} steps: {fell}"
    found = (
        f"{len(result['differences'])} differences{': ' if files else ''}{files} in {compared['files']} files, "
        f"{compared['values']} values of the training state and {compared['rows']} rows of metrics"
    )
    return _line(name, much, found, result["ok"])


def _faults(name: str, result: dict[str, Any]) -> str:
    injected = result["injected"]
    skipped = sum(count for answers in result["answers"].values() for why, count in answers.items() if why != "step")
    much = f"{result['steps']:,} head steps with {sum(injected.values()):,} faults of {len(injected)} kinds"
    ranking = "; ".join(
        f"{measure} {entry['difference']:+.4f} to the runs without faults (noise {entry['noise']:.4f})"
        for measure, entry in result["ranking"].items()
    )
    found = f"{result['bad_steps']} steps with a parameter that is not finite, {skipped:,} steps skipped; {ranking}"
    return _line(name, much, found, result["ok"])


def _fuzz(name: str, result: dict[str, Any]) -> str:
    much = f"{result['read']:,} damaged files in {result['seconds'] / 60:.0f} minutes, {len(result['targets'])} loaders"
    kinds = sum(entry["count"] for entry in result["found"])
    refused = sum(row["refused"] for row in result["targets"].values())
    found = f"{len(result['found'])} kinds of unclear errors ({kinds} files); {refused:,} files refused"
    return _line(name, much, found, result["ok"])


def _soak(name: str, result: dict[str, Any]) -> str:
    memory, step, handles = result["memory"], result["step"], result["handles"]["fewest"]
    much = f"{result['minutes']:.0f} minutes, {result['steps']:,} steps"
    found = (
        f"memory {memory['slope_mib_per_hour']:+.1f} ± {memory['standard_error']:.1f} MiB an hour at "
        f"{memory['mib_last']:.0f} MiB; open files {handles[0]} in the first third, {handles[2]} in the last; time "
        f"of a step, last third to first, {step['ratio']:.2f}"
    )
    return _line(name, much, found, result["ok"])


def main() -> int:
    """Rewrites the table."""
    text = PAGE.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    if not after:
        print(f"{PAGE} lacks the lines {START} and {END}", file=sys.stderr)
        return 1
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
