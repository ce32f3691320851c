"""Will reranking, retrieval or refinement help this checkpoint? Measured on held-out data, said in words."""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

logger = logging.getLogger(__name__)

EXAMPLE = """example:
  vla-energy preflight --checkpoint runs/mine/latest --data-root-dir data \\
      --dataset-name metaworld_unseen6 --out runs/preflight"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="checkpoint folder with head, memory or both"
    )
    parser.add_argument("--data-root-dir", required=True, metavar="DIR", help="folder with RLDS datasets")
    parser.add_argument("--dataset-name", required=True, help="dataset whose held-out split is measured on")
    parser.add_argument("--dataset-config", metavar="FILE", help="JSON or YAML file that names its fields, if unknown")
    parser.add_argument("--split", default="val", help="split (default val); the memory must not hold it")
    parser.add_argument("--statistics", metavar="NAME", help="whose statistics, where the checkpoint has several")
    parser.add_argument(
        "--rollouts", nargs="+", default=[], metavar="FILE",
        help="results of vla-energy rollout with this checkpoint and several arms, 8 episodes or more each: the arm "
        "with the most successes is recommended for the task; evaluate on other seeds",
    )  # fmt: skip
    parser.add_argument("--max-frames", type=int, default=5_000, metavar="N", help="frames to look at (default 5000)")
    parser.add_argument("--out", required=True, metavar="DIR", help="preflight.json and preflight.html go there")
    parser.add_argument("--no-gates", action="store_true", help="do not write the calibrated gates into the checkpoint")
    parser.add_argument("--device", default="cpu", help="device of policy and head (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of frames and candidates (default 0)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the verdict")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from pathlib import Path

    from vla_energy.advisor import load_advisor
    from vla_energy.config import EnergyConfig
    from vla_energy.finetune.frames import FrameReader
    from vla_energy.fingerprint import fingerprint
    from vla_energy.gates import load_gates, save_gates
    from vla_energy.preflight.measure import measure
    from vla_energy.preflight.trials import read_trials
    from vla_energy.preflight.verdict import judge
    from vla_energy.report.preflight import write_page
    from vla_energy.results import check_writable, to_json, write_json

    if args.max_frames < 1:
        raise ValueError(f"--max-frames {args.max_frames}: must be 1 or more")
    if not Path(args.checkpoint).is_dir():
        raise ValueError(f"--checkpoint {args.checkpoint} is not a folder")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "preflight.json")
    reader = FrameReader(
        args.checkpoint, args.data_root_dir, args.dataset_name,
        statistics_of=args.statistics, dataset_config=args.dataset_config, device=args.device, seed=args.seed,
    )  # fmt: skip
    vla = reader.vla
    advisor = load_advisor(
        args.checkpoint, reader.statistics, vla.horizon, vla.action_dim, vla.context_dim, reader.device,
        calibrates=True,
    )  # fmt: skip
    if not advisor.modes:
        raise ValueError(f"{args.checkpoint} has neither an energy head nor a memory: nothing could replace its chunks")
    if advisor.memory is not None and args.split == "train":
        raise ValueError(
            "--split train: the memory holds these very frames and would find each itself; take a held-out split"
        )
    judged = {"fingerprint": fingerprint(args.checkpoint), "arms": advisor.arms, "horizon": vla.horizon}
    trials = read_trials(args.rollouts, judged)
    head = EnergyConfig() if advisor.reranker is None else advisor.reranker.config
    frames = reader.read(args.split, args.max_frames, candidates=head.candidates)
    measured = measure(advisor, frames, args.seed)
    result = {"settings": _settings(args), "fingerprint": judged["fingerprint"], **judge(measured, head.rerank, trials)}
    seen, there = result["policy"]["frames"], reader.frames(args.split)
    if seen < there:
        result["verdict"]["reasons"].append(
            f"{seen} of {there} held-out frames were looked at (--max-frames): a task without any is not in the table"
        )
    write_json(out / "preflight.json", result)
    write_page(result, out / "preflight.html")
    if not args.no_gates:
        tasks = {task: row["use"] for task, row in result["tasks"].items() if row["use"] != "off"}
        _say_replaced(load_gates(args.checkpoint)[1], tasks, args.rollouts)
        save_gates(args.checkpoint, result["gates"], tasks)
    print(json.dumps(to_json(result), allow_nan=False) if args.json else _text(result, out))
    return 0


def _say_replaced(before: dict[str, str], now: dict[str, str], rollouts: list[str]) -> None:
    """What the checkpoint recommended until now, where that changes: trials may have told it."""
    changed = [
        f"{task}: {before.get(task, 'off')} becomes {now.get(task, 'off')}"
        for task in sorted(before.keys() | now.keys())
        if before.get(task) != now.get(task)
    ]
    if before and changed:
        hint = "" if rollouts else "; if trials told the former, name their files again by --rollouts"
        logger.warning("what energy_gates.json recommended is replaced: %s%s", ", ".join(changed), hint)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("checkpoint", "dataset_name", "dataset_config", "split", "rollouts", "max_frames", "seed")
    return {name: getattr(args, name) for name in names}


def _text(result: dict[str, Any], out: Any) -> str:
    from vla_energy.preflight.verdict import TASK_FEWEST

    first, *rest = result["verdict"]["reasons"]
    lines = [first, *(f"- {reason}" for reason in rest), "", "by task:"]
    short = f"; nothing is advised below {TASK_FEWEST} held-out episodes"
    width = max((len(task) for task in result["tasks"]), default=0)
    for task, values in result["tasks"].items():
        few = max((part["episodes"] for part in values["effects"].values()), default=TASK_FEWEST) < TASK_FEWEST
        effects = ", ".join(f"{mode} {100 * part['change']:+.0f} %" for mode, part in values["effects"].items())
        tried = values["trials"]
        counts = "" if tried is None else "; " + ", ".join(f"{arm} {n}" for arm, n in tried["successes"].items())
        counts += "" if tried is None else f" of {tried['episodes']}"
        lines.append(
            f"{task:{width}}  {values['use']:15}  L1 {effects or 'not measured'}{counts}{short if few else ''}"
        )
    return "\n".join([*lines, f"written to {out}/preflight.json and preflight.html"])
