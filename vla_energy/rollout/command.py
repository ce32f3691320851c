"""Paired closed-loop episodes of a checkpoint: every arm runs the same seeds, the simulator in its own process."""

from __future__ import annotations

import argparse
import json
from typing import Any

EXAMPLE = """example:
  vla-energy rollout --checkpoint runs/demo/latest --tasks drawer-open \\
      --episodes 50 --arms policy,rerank --out runs/rollout.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--tasks", required=True, type=_names, metavar="A,B", help="tasks or suites, comma-separated")
    parser.add_argument("--episodes", type=int, default=20, metavar="N", help="episodes a task and arm (default 20)")
    parser.add_argument(
        "--arms",
        type=_names,
        default=["policy", "rerank"],
        help="arms to compare on the same seeds, the first is the baseline (default policy,rerank)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="first episode's seed (default 0)")
    parser.add_argument("--out", required=True, metavar="FILE", help="results, JSON; rewritten after every task")
    parser.add_argument(
        "--replan-every", type=int, default=4, metavar="N", help="actions executed a decision (default 4)"
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="steps an episode (default: the simulator's limit)")
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="simulator processes = largest batch (default 2)"
    )
    parser.add_argument("--sim", default="metaworld", help="simulator: metaworld (default), libero, or module:Class")
    parser.add_argument("--record", metavar="DIR", help="write all episodes as an RLDS dataset, DIR/NAME/1.0.0")
    parser.add_argument("--record-name", metavar="NAME", help="name of that dataset (default SIM_rollouts)")
    parser.add_argument(
        "--footage", metavar="FILE",
        help="keep frames and energies of one episode (first task and seed, last arm) for vla-energy report",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="device of the policy (default cpu)")
    parser.add_argument(
        "--strict",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="an exception in candidates, head or gate ends the run (default); --no-strict takes the policy's own "
        "chunk, and counts such decisions in the results' telemetry as `fallback`",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Runs the command; what can be wrong with the flags is found before the checkpoint is loaded."""
    from vla_energy.results import check_writable, to_json
    from vla_energy.rollout.interface import ARMS, check_arms
    from vla_energy.rollout.record import check_target
    from vla_energy.rollout.run import Settings, run_rollouts

    settings = Settings(
        args.tasks, args.episodes, args.arms, args.seed, args.replan_every, args.max_steps, args.workers, args.sim
    )
    settings.validate()
    check_arms(args.arms, set(ARMS))
    check_writable(args.out)
    if args.record is not None:
        check_target(args.record, args.record_name, args.sim)
    elif args.record_name is not None:
        raise ValueError(f"--record-name {args.record_name} without --record: name the folder too, --record DIR")
    settings.resolve()
    from vla_energy.rollout.policy import load_policy

    result = run_rollouts(
        load_policy(args.checkpoint, args.device, args.strict),
        args.tasks,
        args.episodes,
        args.arms,
        args.seed,
        args.replan_every,
        args.max_steps,
        args.workers,
        backend=args.sim,
        out=args.out,
        record=args.record,
        record_name=args.record_name,
        footage=args.footage,
    )
    if args.json:
        print(json.dumps(to_json(result), allow_nan=False))
    else:
        recorded = f"; episodes recorded to {result['meta']['recorded']}" if args.record else ""
        print(f"{table(result)}\nwritten to {args.out}{recorded}")
    return 0


def table(result: dict[str, Any]) -> str:
    """The results for a terminal: one line a task and arm, then overall. Percent and points, 95 percent intervals."""
    width = max(map(len, (*result["tasks"], "overall")))
    arms = max(map(len, result["settings"]["arms"]))
    lines = [f"{'task':{width}}  {'arm':{arms}}  {'success':>20}  {'ms':>7}  paired difference to the first arm"]
    for task, summary in [*result["tasks"].items(), ("overall", result["overall"])]:
        for arm, values in summary["arms"].items():
            low, high = values["interval"]
            success = f"{100 * values['success']:5.1f}% [{100 * low:5.1f},{100 * high:6.1f}]"
            difference = _difference(summary["differences"][arm]) if arm in summary["differences"] else ""
            milliseconds = values["milliseconds_per_decision"]["mean"]
            line = f"{task:{width}}  {arm:{arms}}  {success:>20}  {milliseconds:7.1f}  {difference}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def _difference(values: dict[str, Any]) -> str:
    low, high = values["interval"]
    # Without width it says that nothing was observed, not that nothing can differ.
    interval = "[n/a]" if low == high else f"[{100 * low:+.1f}, {100 * high:+.1f}]"
    return (
        f"{100 * values['difference']:+.1f} {interval} points, "
        f"p={values['p_value']:.3g} ({values['won']} won, {values['lost']} lost of {values['pairs']})"
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
