"""Does it help? Paired closed-loop episodes of every arm, and whether the preflight's verdict foretold them.

    python benchmarks/closed_loop.py --quick
    python benchmarks/closed_loop.py --checkpoint DIR --tasks a,b,c --preflight DIR/preflight.json --out FILE
    python benchmarks/closed_loop.py --report FILE FILE ... [--preflight DIR/preflight.json]

The quick study makes all it needs: a memory and a head beside a copy of the shipped policy, from the bundled
demonstrations. It shows that everything runs; with two episodes a task it says nothing about what helps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from closed_loop_checks import check_distinct, check_fit, fingerprint_of, read_preflight, read_result
from closed_loop_tables import ARMS, report

from vla_energy.backbones.tiny import EMBEDDED as TINY
from vla_energy.data.metaworld_env import SimulatorError
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.fingerprint import fingerprint
from vla_energy.results import write_json
from vla_energy.rollout.run import EVALUATION_SEED_OFFSET, run_rollouts


def study(
    checkpoint: Path, tasks: list[str], episodes: int, arms: list[str], out: Path, strict: bool = True, **options: Any
) -> dict:
    """Runs the episodes and writes them."""
    from vla_energy.rollout.policy import load_policy

    return run_rollouts(load_policy(str(checkpoint), strict=strict), tasks, episodes, arms, out=out, **options)


def quick(out: Path) -> dict[str, Any]:
    """Everything from the shipped policy and demonstrations; two episodes a task and arm."""
    folder = out / "policy"
    if out.exists():
        raise FileExistsError(f"{out} is there already: delete it, or take another --out")
    shutil.copytree(TINY, folder)
    data = ["--data-root-dir", str(EMBEDDED_DATA), "--dataset-name", "metaworld_demo"]
    _run("-m", "vla_energy.cli", "memory", "--checkpoint", str(folder), *data)
    script = Path(__file__).parents[1] / "scripts" / "finetune_energy.py"
    _run(
        str(script), "--vla_path", str(folder), "--run_root_dir", str(out), "--run_id_override", "head",
        "--energy.freeze_backbone", "True", "--energy.negatives.retrieved.count", "8", "--use_proprio", "True",
        "--use_lora", "False", "--image_aug", "False", "--precision", "fp32", "--batch_size", "16",
        "--max_steps", "30", "--save_freq", "30", "--save_latest_checkpoint_only", "True",
        "--energy_learning_rate", "1e-3", "--energy_warm_steps", "10",
    )  # fmt: skip
    checkpoint = out / "head" / "latest"
    _run("-m", "vla_energy.cli", "preflight", "--checkpoint", str(checkpoint), *data, "--out", str(out / "preflight"))
    tasks = ["button-press-topdown", "handle-press-side"]
    result = study(checkpoint, tasks, 2, list(ARMS), out / "rollout.json", max_steps=100)
    result["preflight"] = json.loads((out / "preflight" / "preflight.json").read_text())
    return result


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; what does not go together is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--quick", action="store_true", help="everything from what ships with us: 1.5 minutes of CPU time"
    )
    what.add_argument("--checkpoint", type=Path, help="study this checkpoint; needs --tasks")
    what.add_argument("--report", type=Path, nargs="+", help="only print the tables of earlier results")
    parser.add_argument("--tasks", type=_names, default=[], help="comma-separated")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--arms", type=_names, default=list(ARMS))
    parser.add_argument("--sim", default="metaworld")
    parser.add_argument("--replan-every", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--preflight", type=Path,
        help="preflight.json of the checkpoint, to compare its verdict; with --report, of all files, in the place of "
        "what they hold",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/closed_loop"))
    parser.add_argument(
        "--strict", action=argparse.BooleanOptionalAction, default=True,
        help="an exception in candidates, head or gate ends the study (default), not only its decision",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.checkpoint and not args.tasks:
        parser.error("--checkpoint needs --tasks")
    if args.quick and args.preflight:
        parser.error("--quick makes its own preflight: leave --preflight out")
    return args


def run(args: argparse.Namespace) -> str:
    """Does what the flags ask; the tables."""
    preflight = read_preflight(args.preflight) if args.preflight else None  # a typo must not cost a study
    if args.report:
        results = [read_result(path) for path in args.report]
        check_distinct(results)
        for result in results if preflight is not None else ():
            seeds = {episode["seed"] for episode in result["episodes"]}
            check_fit(preflight or {}, fingerprint_of(result), result["settings"].get("replan_every", 0), seeds)
        return report([result if preflight is None else {**result, "preflight": preflight} for result in results])
    if args.quick:
        result, out = quick(args.out), args.out / "rollout.json"
    else:
        out = args.out
        if preflight is not None:
            first = args.seed + EVALUATION_SEED_OFFSET
            which = fingerprint(args.checkpoint) if "fingerprint" in preflight else None
            check_fit(preflight, which, args.replan_every, {*range(first, first + args.episodes)})
        options = {"replan_every": args.replan_every, "seed": args.seed, "workers": args.workers, "backend": args.sim}
        options["strict"] = args.strict
        result = study(args.checkpoint, args.tasks, args.episodes, args.arms, out, **options)
        if preflight is not None:
            result["preflight"] = preflight
    write_json(out, result)
    return report([json.loads(out.read_text())])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    try:
        print(run(args))
    except (ValueError, OSError, SimulatorError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
