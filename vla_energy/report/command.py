"""One HTML page about a run, or about several compared: curves, ranking, landscapes, gate, preflight, rollouts."""

from __future__ import annotations

import argparse
import json

EXAMPLE = """examples:
  vla-energy report runs/demo                    writes runs/demo/report.html
  vla-energy report runs/mine runs/other --preflight runs/preflight \\
      --rollout runs/arms.json --out runs/compared.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of a checkpoint")
    parser.add_argument("--out", metavar="FILE", help="the page (default report.html in the first run's folder)")
    parser.add_argument(
        "--preflight", action="append", default=[], metavar="FILE",
        help="preflight.json or its folder, where it is not in the run's; again for the next run",
    )  # fmt: skip
    parser.add_argument(
        "--rollout", action="append", default=[], metavar="FILE",
        help="results of vla-energy rollout, where the run's folder has no rollout.json; again for the next run",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print the page's path, last metrics, what is missing or not finite"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from pathlib import Path

    from vla_energy.extras import require
    from vla_energy.report.notes import across
    from vla_energy.report.runs import read_runs
    from vla_energy.results import check_writable, to_json

    require("native", {"matplotlib": "3.8"})
    from vla_energy.report.html import write_report

    runs = read_runs(args.runs, args.preflight, args.rollout)
    out = Path(args.out) if args.out else Path(args.runs[0]) / "report.html"
    check_writable(out)
    write_report(runs, out)
    if args.json:
        told = [
            {"folder": str(run.folder), "label": run.label, "last": run.last(), "missing": run.missing,
             "not_finite": run.not_finite(), "notes": run.notes}
            for run in runs
        ]  # fmt: skip
        print(json.dumps(to_json({"written": str(out), "notes": across(runs), "runs": told}), allow_nan=False))
        return 0
    for note in across(runs):
        print(note)
    for run in runs:
        for note in run.notes:
            print(f"{run.label}: {note}")
        if found := run.not_finite():
            first = min(steps[0] for steps in found.values())
            print(f"{run.label}: {len(found)} metrics are not finite in some rows, from step {first} on")
        for name, why in run.missing.items():
            print(f"{run.label}: no {name}: {why}")
    print(f"written: {out}")
    return 0
