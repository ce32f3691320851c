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
    for part, names in _RUNS.items():
        rows += [_ROWS[part](name, read(name)) for name in names.split()]
    return "\n".join(rows)


def in_words(part: str, result: dict[str, Any]) -> str:
    """One line on a result of `part`: `kill`, `faults`, `fuzz` or `soak`."""
    much, found = _WORDS[part](result)
    return f"{part}: {_verdict(result['ok'])}: {much}: {found}"


def _line(name: str, part: str, result: dict[str, Any]) -> str:
    much, found = _WORDS[part](result)
    return f"| `{name}` | {much} | {found} | {_verdict(result['ok'])} |"


def _verdict(ok: bool) -> str:
    return "passed" if ok else "failed"


def _time(minutes: float) -> str:
    return f"{minutes:.0f} minutes" if minutes >= 2 else f"{60 * minutes:.0f} seconds"


def _kill(name: str, result: dict[str, Any]) -> str:
    return _line(name, "kill", result)


def _kill_words(result: dict[str, Any]) -> tuple[str, str]:
    places = {
        "before_steps": "before the first step", "in_steps": "between saves", "in_writing": "while a save was written",
        "after_seal": "after its manifest", "between_renames": "between its renames",
    }  # fmt: skip
    fell = ", ".join(f"{result[key]} {words}" for key, words in places.items() if result[key])
    compared, files = result["compared"], ", ".join(f"`{where}`" for where in result["differences"])
    much = f"{result['kills']} kill{'s' * (result['kills'] != 1)} of a run of {result['steps']} steps: {fell}"
    found = (
        f"{len(result['differences'])} differences{': ' if files else ''}{files} in {compared['files']} files, "
        f"{compared['values']} values of the training state and {compared['rows']} rows of metrics"
    )
    return much, found


def _faults(name: str, result: dict[str, Any]) -> str:
    # By the rule of today: a result may have been written under an older one.
    return _line(name, "faults", result | {"ok": _judged(result)["ok"]})


def _judged(result: dict[str, Any]) -> dict[str, Any]:
    from chaos_faults import judge  # with torch, which nothing else here needs

    return judge(result)


def _faults_words(result: dict[str, Any]) -> tuple[str, str]:
    injected, judged = result["injected"], _judged(result)
    much = f"{result['steps']:,} head steps with {sum(injected.values()):,} faults of "
    much += f"{sum(count > 0 for count in injected.values())} kinds"
    met, others = judged["skips"]["with_fault"], judged["skips"]["without_fault"]
    found = (
        f"{result['bad_steps']} steps with a parameter that is not finite; skipped {met['skipped']:,} of "
        f"{met['steps']:,} steps with a fault, {others['skipped']:,} of {others['steps']:,} without"
    )
    gains = judged["gains"]
    found += f"; {' + '.join(result['ranking'])} learned {sum(gains) / len(gains):+.4f} without faults, each run with "
    found += f"them at least {100 * min(judged['shares']):.0f} % of its twin's"
    found += " (half is asked)" if judged["told"] else " (too short to judge)"
    for measure, entry in judged["differences"].items():
        found += f"; {measure} {entry['difference']:+.4f} to the runs without faults"
        found += " (not judged)" if entry["allowed"] is None else f" ({-entry['allowed']:.4f} allowed)"
    if judged["against"]:
        found += f"; against it: {', '.join(judged['against'])}"
    return much, found


def _fuzz(name: str, result: dict[str, Any]) -> str:
    return _line(name, "fuzz", result)


def _fuzz_words(result: dict[str, Any]) -> tuple[str, str]:
    reads = {name: row["read"] for name, row in result["targets"].items()}
    much = f"{result['read']:,} damaged files in {_time(result['seconds'] / 60)}, {len(reads)} loaders"
    if len(reads) > 1:
        least, most = min(reads, key=reads.__getitem__), max(reads, key=reads.__getitem__)
        much += f", from {reads[least]:,} ({least}) to {reads[most]:,} ({most})"
    kinds = sum(entry["count"] for entry in result["found"])
    refused = sum(row["refused"] for row in result["targets"].values())
    found = f"{len(result['found'])} kinds of unclear errors ({kinds} files); {refused:,} files refused"
    return much, found


def _soak(name: str, result: dict[str, Any]) -> str:
    from chaos_soak import of_stored  # as the faults, by the rule of today

    return _line(name, "soak", of_stored(result))


def _soak_words(result: dict[str, Any]) -> tuple[str, str]:
    memory, step, handles = result["memory"], result["step"], result["handles"]["fewest"]
    much = f"{_time(result['minutes'])}, {result['steps']:,} steps"
    short = "" if result.get("long_enough", True) else " (too short to judge)"
    found = (
        f"memory {memory['slope_mib_per_hour']:+.1f} ± {memory['standard_error']:.1f} MiB an hour at "
        f"{memory['mib_last']:.0f} MiB{short}; open files {handles[0]} in the first third, {handles[2]} in the last; "
        f"time of a step, last third to first, {step['ratio']:.2f}"
    )
    if held := result.get("allocated"):
        slope, error = (held["bytes"][name] / 2**10 for name in ("slope_per_hour", "standard_error"))
        level = held["bytes"]["last"] / 2**20
        found += f"; allocated and not freed {slope:+.0f} ± {error:.0f} KiB an hour at {level:.0f} MiB"
    return much, found


# By what was run, in the order of time.
_RUNS = {
    "kill": "kill_first kill kill_second kill_third kill_last",
    "faults": "faults faults_second",
    "fuzz": "fuzz_first fuzz_second fuzz_third fuzz fuzz_fourth fuzz_fifth fuzz_sixth fuzz_seventh fuzz_eighth "
    "fuzz_last fuzz_guided_first fuzz_guided fuzz_guided_second",
    "soak": "soak_first soak_second soak soak_trim soak_thresholds soak_allocated soak_collected soak_confirmed",
}
_ROWS = {"kill": _kill, "faults": _faults, "fuzz": _fuzz, "soak": _soak}
_WORDS = {"kill": _kill_words, "faults": _faults_words, "fuzz": _fuzz_words, "soak": _soak_words}


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
