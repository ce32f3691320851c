"""Does it survive? Kills, faults, hostile files and long runs, as commands; docs/reliability.md says what they found.

    python benchmarks/chaos.py --minutes 2                  # a short mix of all
    python benchmarks/chaos.py kill --kills 50 --seed 0     # a run killed 50 times ends bit for bit as one that was not
    python benchmarks/chaos.py faults --steps 100000        # head steps on broken numbers
    python benchmarks/chaos.py fuzz --minutes 30            # damaged and hostile files; --guided: by coverage
    python benchmarks/chaos.py soak --minutes 120           # memory, file handles and step time of a long run

Each prints a line on what it found and writes all of it to `--out`; the exit code is 1 where something did not survive,
2 where what was asked for is not there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chaos_fuzz import UsageError
from chaos_report import in_words


def _keep(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def run_faults(args: argparse.Namespace) -> dict[str, Any]:
    """Head steps on broken numbers."""
    from chaos_faults import faults

    return faults(args.steps, args.each, say=lambda result: _keep(args.out / "faults.json", result))


def run_kill(args: argparse.Namespace) -> dict[str, Any]:
    """A run that is killed again and again."""
    from chaos_kill import kill

    return kill(args.kills, args.seed, args.out / "kill", say=lambda result: _keep(args.out / "kill.json", result))


def run_fuzz(args: argparse.Namespace) -> dict[str, Any]:
    """Damaged and hostile files."""
    names = [name for name in args.targets.split(",") if name]
    if args.guided:
        from chaos_atheris import guided

        out = args.out / "guided"
        return guided(args.minutes, args.seed, out, names, say=lambda result: _keep(args.out / "fuzz.json", result))
    from chaos_fuzz import fuzz

    out = args.out / "fuzz"
    return fuzz(args.minutes, args.seed, out, names, say=lambda result: _keep(args.out / "fuzz.json", result))


def run_soak(args: argparse.Namespace) -> dict[str, Any]:
    """A long run, watched."""
    from chaos_soak import soak

    return soak(args.minutes, args.out / "soak", say=lambda result: _keep(args.out / "soak.json", result))


def run_mix(args: argparse.Namespace) -> dict[str, Any]:
    """A short piece of everything, in about `--minutes` on a machine that does nothing else."""
    pieces = {
        "kill": {"kills": max(1, round(args.minutes))},
        "faults": {"steps": max(100, round(150 * args.minutes)), "each": 300},
        "fuzz": {"minutes": args.minutes / 5, "targets": "", "guided": False},
        "soak": {"minutes": max(0.25, args.minutes / 5)},
    }
    result: dict[str, Any] = {}
    for name, flags in pieces.items():
        result[name] = PARTS[name](argparse.Namespace(out=args.out, seed=0, **flags))
        _say(name, result[name])
    return result | {"ok": all(part["ok"] for part in result.values())}


PARTS = {"kill": run_kill, "faults": run_faults, "fuzz": run_fuzz, "soak": run_soak}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--minutes", type=float, default=2.0, help="of the mix, where no part is named")
    parser.add_argument("--quick", action="store_true", help="as the other benchmarks: the mix in half a minute")
    parts = parser.add_subparsers(dest="part")
    faults = parts.add_parser("faults", help="head steps on broken numbers")
    faults.add_argument("--steps", type=int, default=100_000)
    faults.add_argument("--each", type=int, default=5_000, help="steps a training")
    kill = parts.add_parser("kill", help="a run killed with SIGKILL ends bit for bit as one that was not")
    kill.add_argument("--kills", type=int, default=50)
    kill.add_argument("--seed", type=int, default=0, help="of the moments")
    fuzz = parts.add_parser("fuzz", help="damaged and hostile files before every loader")
    fuzz.add_argument("--minutes", type=float, default=30.0)
    fuzz.add_argument("--seed", type=int, default=0, help="of the damage")
    fuzz.add_argument("--targets", default="", help="names of benchmarks/chaos_targets.py, with commas; default all")
    fuzz.add_argument("--guided", action="store_true", help="by coverage, with libFuzzer: pip install -e '.[fuzz]'")
    soak = parts.add_parser("soak", help="memory, file handles and step time of a long run")
    soak.add_argument("--minutes", type=float, default=120.0)
    for part in (faults, kill, fuzz, soak):  # before the part or after it
        part.add_argument("--out", type=Path, default=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a part; the exit code."""
    args = parse(argv)
    if args.part is None:
        args.part, args.minutes = "mix", 0.5 if args.quick else args.minutes
    try:
        result = {**PARTS, "mix": run_mix}[args.part](args)
    except UsageError as error:
        print(f"chaos.py {args.part}: {error}", file=sys.stderr)
        return 2
    _keep(args.out / f"{args.part}.json", result)
    if args.part == "mix":
        print("all passed" if result["ok"] else "FAILED")
    else:
        _say(args.part, result)
    print(f"the whole result: {args.out / args.part}.json")
    return 0 if result["ok"] else 1


def _say(part: str, result: dict[str, Any]) -> None:
    print(in_words(part, result), flush=True)
    for entry in result.get("found", []):
        print(f"  {entry['target']}: {entry['error']:.300} ({entry['count']} times, {entry['files']})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
