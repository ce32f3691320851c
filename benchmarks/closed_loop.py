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

from closed_loop_tables import ARMS, report

from vla_energy.backbones.tiny import EMBEDDED as TINY
from vla_energy.data.metaworld_env import SimulatorError
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.modes import split_arm
from vla_energy.rollout.run import run_rollouts
from vla_energy.rollout.summary import write_json


def study(checkpoint: Path, tasks: list[str], episodes: int, arms: list[str], out: Path, **options: Any) -> dict:
    """Runs the episodes and writes them."""
    from vla_energy.rollout.policy import load_policy

    return run_rollouts(load_policy(str(checkpoint)), tasks, episodes, arms, out=out, **options)


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


def read_result(path: Path) -> dict[str, Any]:
    """The results of a study that ended.

    Raises:
        ValueError: it is none; OSError: it cannot be read.
    """
    result = _json(path)
    if not {"complete", "settings", "overall", "tasks", "episodes"} <= result.keys():
        raise ValueError(f"{path} is no result of this study or of vla-energy rollout")
    if result["complete"] is not True:
        raise ValueError(f"{path} is of a run that did not end: run it again")
    if "preflight" in result:
        check_preflight(result["preflight"], path)
    return result


def read_preflight(path: Path) -> dict[str, Any]:
    """A preflight's results. Raises as `read_result`."""
    result = _json(path)
    check_preflight(result, path)
    return result


def check_preflight(result: Any, path: Path) -> None:
    """Raises ValueError naming `path` where the verdict by task, all that is used here, is not there or no arm."""
    try:
        for task, row in result["tasks"].items():
            if row["use"] in ("policy", "recommended") or (row["use"] != "off" and not split_arm(row["use"])[0]):
                raise ValueError(f"{task!r}: {row['use']!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no preflight.json of vla-energy preflight, whose tasks each have a `use`, off or an arm "
            f"({type(error).__name__}: {error})"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except ValueError as error:  # of text and of JSON
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is no result: expected a JSON object")
    return data


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
        return report([result if preflight is None else {**result, "preflight": preflight} for result in results])
    if args.quick:
        result, out = quick(args.out), args.out / "rollout.json"
    else:
        out = args.out
        options = {"replan_every": args.replan_every, "seed": args.seed, "workers": args.workers, "backend": args.sim}
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
