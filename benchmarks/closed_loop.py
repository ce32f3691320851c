"""Does it help? Paired closed-loop episodes of every arm, and whether the preflight's verdict foretold them.

    python benchmarks/closed_loop.py --quick
    python benchmarks/closed_loop.py --checkpoint DIR --tasks a,b,c --preflight DIR/preflight.json --out FILE
    python benchmarks/closed_loop.py --report FILE FILE ...

The quick study makes all it needs: a memory and a head beside a copy of the shipped policy, from the bundled
demonstrations. It shows that everything runs; with four episodes a task it says nothing about what helps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from vla_energy.backbones.tiny import EMBEDDED as TINY
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.rollout.run import run_rollouts
from vla_energy.rollout.statistics import PairedDifference, paired_difference
from vla_energy.rollout.summary import write_json

ARMS = ("policy", "policy@2", "policy@8", "retrieve", "rerank", "rerank+retrieve", "refine", "replan")


def study(checkpoint: Path, tasks: list[str], episodes: int, arms: list[str], out: Path, **options: Any) -> dict:
    """Runs the episodes and writes them."""
    from vla_energy.rollout.policy import load_policy

    return run_rollouts(load_policy(str(checkpoint)), tasks, episodes, arms, out=out, **options)


def quick(out: Path) -> dict[str, Any]:
    """Everything from the shipped policy and demonstrations, in about five minutes."""
    folder = out / "policy"
    if out.exists():
        sys.exit(f"error: {out} is there already: delete it, or take another --out")
    shutil.copytree(TINY, folder)
    data = ["--data-root-dir", str(EMBEDDED_DATA), "--dataset-name", "metaworld_demo"]
    _run("-m", "vla_energy.cli", "memory", "--checkpoint", str(folder), *data)
    script = Path(__file__).parents[1] / "scripts" / "finetune_energy.py"
    _run(
        str(script), "--vla_path", str(folder), "--run_root_dir", str(out), "--run_id_override", "head",
        "--energy.freeze_backbone", "True", "--energy.negatives.retrieved.count", "8", "--use_proprio", "True",
        "--use_lora", "False", "--image_aug", "False", "--precision", "fp32", "--batch_size", "16",
        "--max_steps", "60", "--save_freq", "60", "--save_latest_checkpoint_only", "True",
        "--energy_learning_rate", "1e-3", "--energy_warm_steps", "20",
    )  # fmt: skip
    checkpoint = out / "head" / "latest"
    _run("-m", "vla_energy.cli", "preflight", "--checkpoint", str(checkpoint), *data, "--out", str(out / "preflight"))
    tasks = ["button-press-topdown", "handle-press-side"]
    result = study(checkpoint, tasks, 4, list(ARMS), out / "rollout.json", max_steps=100)
    result["preflight"] = json.loads((out / "preflight" / "preflight.json").read_text())
    return result


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True)


def arm_table(results: list[dict[str, Any]]) -> str:
    """Markdown: each arm over all tasks of some studies, paired with the policy and with plain retrieval."""
    episodes = [episode for result in results for episode in result["episodes"]]
    arms = [arm for arm in ARMS if any(episode["arm"] == arm for episode in episodes)]
    arms += sorted({episode["arm"] for episode in episodes} - set(arms))
    lines = ["| arm | success | against policy | against retrieve | forwards an episode | ms a decision |"]
    lines.append("|---|---|---|---|---|---|")
    for arm in arms:
        mine = [episode for episode in episodes if episode["arm"] == arm]
        success = 100 * _mean(episode["success"] for episode in mine)
        others = [_against(episodes, arm, other) for other in ("policy", "retrieve")]
        forwards = _mean(episode["decisions"] for episode in mine)
        arms_of = (result["overall"]["arms"] for result in results)
        spent = [found[arm]["milliseconds_per_decision"]["mean"] for found in arms_of if arm in found]
        lines.append(f"| {arm} | {success:.1f} % | {others[0]} | {others[1]} | {forwards:.1f} | {_mean(spent):.1f} |")
    return "\n".join(lines)


def task_table(result: dict[str, Any]) -> str:
    """Markdown: success of each arm on each task, in percent; `*` where it differs from the policy, p < 0.05."""
    episodes = result["episodes"]
    arms = list(dict.fromkeys(episode["arm"] for episode in episodes))
    lines = ["| task | " + " | ".join(arms) + " |", "|" + "---|" * (len(arms) + 1)]
    for task in result["tasks"]:
        mine = [episode for episode in episodes if episode["task"] == task]
        cells = []
        for arm in arms:
            success = [episode["success"] for episode in mine if episode["arm"] == arm]
            found = None if not success or arm == "policy" else _paired(mine, arm, "policy")
            mark = "*" if found and found.p_value < 0.05 else ""
            cells.append(f"{100 * _mean(success):.0f}{mark}" if success else "")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def assemble(result: dict[str, Any], instructions: dict[str, str]) -> None:
    """Adds the arm `recommended` where it was not run: it repeats the arm that the preflight names for the task."""
    episodes = result["episodes"]
    for task in result["tasks"]:
        there = {episode["arm"] for episode in episodes if episode["task"] == task}
        verdict = result["preflight"]["tasks"].get(instructions[task], {"use": "off"})
        arm = "policy" if verdict["use"] == "off" else verdict["use"]
        if "recommended" not in there and arm in there:
            named = [episode for episode in episodes if (episode["task"], episode["arm"]) == (task, arm)]
            episodes += [{**episode, "arm": "recommended"} for episode in named]


def agreement(result: dict[str, Any], instructions: dict[str, str]) -> list[tuple[str, str, float, bool, bool]]:
    """Task, verdict, measured difference to the policy, and whether they agree.

    The difference is that of the arm which the verdict names; of the best arm that was run, where it says "off".
    First surely: "use" is refuted where the interval is below 0, "off" where it is above. Then strictly: "use"
    asks for a difference above 0 (or 100 percent for both), "off" for one of 0 or less.
    """
    rows = []
    for task in result["tasks"]:
        verdict = result["preflight"]["tasks"].get(instructions[task])
        mine = [episode for episode in result["episodes"] if episode["task"] == task]
        arms = {episode["arm"] for episode in mine} - {"policy", "recommended"}
        if verdict is None:
            continue
        used = verdict["use"] != "off"
        differences = [_paired(mine, arm, "policy") for arm in ([verdict["use"]] if used else sorted(arms))]
        found = max((one for one in differences if one is not None), key=lambda one: one.difference, default=None)
        if found is None:
            continue
        change, (low, high) = found.difference, found.interval
        full = change == 0 and all(episode["success"] for episode in mine if episode["arm"] == "policy")
        surely = high >= 0 if used else low <= 0
        rows.append((task, verdict["use"], change, surely, change > 0 or full if used else change <= 0))
    return rows


def _against(episodes: list[dict[str, Any]], arm: str, other: str) -> str:
    found = None if arm == other else _paired(episodes, arm, other)
    if found is None:
        return ""
    low, high = (100 * bound for bound in found.interval)
    return f"{100 * found.difference:+.1f} ({low:+.1f} to {high:+.1f})"


def _paired(episodes: list[dict[str, Any]], arm: str, other: str) -> PairedDifference | None:
    """Over the episodes that both have, strata are study and task; None where there is none."""
    found = {name: {(e.get("study"), e["task"], e["seed"]): e["success"] for e in episodes if e["arm"] == name}
             for name in (arm, other)}  # fmt: skip
    strata: dict[Any, tuple[list[bool], list[bool]]] = {}
    for key in sorted(found[arm].keys() & found[other].keys()):
        mine, theirs = strata.setdefault(key[:2], ([], []))
        mine.append(found[arm][key])
        theirs.append(found[other][key])
    return (
        paired_difference([(np.array(mine), np.array(theirs)) for mine, theirs in strata.values()]) if strata else None
    )


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / max(1, len(values))


def _read(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    if not result["complete"]:
        sys.exit(f"error: {path} is of a run that did not end")
    return result


def report(results: list[dict[str, Any]]) -> str:
    """All tables."""
    parts = []
    for number, result in enumerate(results, start=1):
        name = f"study {number}"
        for episode in result["episodes"]:
            episode["study"] = name
        instructions = {task: _instruction(result, task) for task in result["tasks"]}
        if "preflight" in result:
            assemble(result, instructions)
        parts += [f"\n## {name}: {result['settings']['episodes']} episodes a task", task_table(result)]
        if "preflight" in result:
            pairs = agreement(result, instructions)
            right, strict = sum(row[3] for row in pairs), sum(row[4] for row in pairs)
            parts.append(f"\nThe verdict is not refuted on {right} of {len(pairs)} tasks, strictly right on {strict}:")
            parts += [f"- {task}: {use}, measured {100 * change:+.0f}" for task, use, change, *_ in pairs]
    return "\n".join(["## All", arm_table(results), *parts])


def _instruction(result: dict[str, Any], task: str) -> str:
    from vla_energy.data.metaworld_env import instruction

    told = (episode.get("instruction") for episode in result["episodes"] if episode["task"] == task)
    return next(filter(None, told), None) or instruction(task)  # results of earlier versions do not tell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five minutes, everything from what ships with us")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--tasks", default="", help="comma-separated")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--sim", default="metaworld")
    parser.add_argument("--replan-every", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--preflight", type=Path, help="preflight.json of the checkpoint, to compare its verdict")
    parser.add_argument("--out", type=Path, default=Path("runs/closed_loop"))
    parser.add_argument("--report", type=Path, nargs="+", help="only print the tables of earlier results")
    args = parser.parse_args()
    if args.report:
        print(report([_read(path) for path in args.report]))
        return
    if args.quick:
        result, out = quick(args.out), args.out / "rollout.json"
    else:
        if args.checkpoint is None or not args.tasks:
            sys.exit("error: --checkpoint and --tasks are needed, or --quick")
        out = args.out
        options = {"replan_every": args.replan_every, "seed": args.seed, "workers": args.workers, "backend": args.sim}
        result = study(args.checkpoint, args.tasks.split(","), args.episodes, args.arms.split(","), out, **options)
        if args.preflight:
            result["preflight"] = json.loads(args.preflight.read_text())
    write_json(out, result)
    print(report([json.loads(out.read_text())]))


if __name__ == "__main__":
    main()
