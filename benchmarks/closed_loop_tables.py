"""Tables of `closed_loop.py`: arms paired by seed, and whether the preflight's verdict foretold the outcome."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from vla_energy.rollout.statistics import PairedDifference, paired_difference

ARMS = ("policy", "policy@2", "policy@8", "retrieve", "rerank", "rerank+retrieve", "refine", "replan")


class Row(NamedTuple):
    """The verdict on a task against its episodes, see `agreement`.

    Attributes:
        task: its name.
        use: what the verdict says, an arm or `off`.
        change: success of that arm minus the policy's, in [-1, 1]; of the best arm that was run, where `use` is `off`.
        surely: the interval does not refute the verdict.
        strictly: the difference itself is on the verdict's side.
    """

    task: str
    use: str
    change: float
    surely: bool
    strictly: bool


def arm_table(results: list[dict[str, Any]]) -> str:
    """Markdown: each arm over all tasks of some studies, paired with the policy and with plain retrieval.

    `ms a decision` is empty for an arm that was not run, but put together from other arms' episodes.
    """
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
        milliseconds = f"{_mean(spent):.1f}" if spent else ""
        lines.append(f"| {arm} | {success:.1f} % | {others[0]} | {others[1]} | {forwards:.1f} | {milliseconds} |")
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
            found = None if not success or arm == "policy" else paired(mine, arm, "policy")
            mark = "*" if found and found.p_value < 0.05 else ""
            cells.append(f"{100 * _mean(success):.0f}{mark}" if success else "")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def assemble(result: dict[str, Any], instructions: dict[str, str]) -> dict[str, str]:
    """Adds the arm `recommended` where it was not run: it repeats the arm that the preflight names for the task.

    As the arm itself does, it repeats the policy where the preflight has no verdict on the task.

    Returns:
        By task that could not be put together, why.
    """
    episodes, missing = result["episodes"], {}
    for task in result["tasks"]:
        there = {episode["arm"] for episode in episodes if episode["task"] == task}
        verdict = result["preflight"]["tasks"].get(instructions[task], {"use": "off"})
        arm = "policy" if verdict["use"] == "off" else verdict["use"]
        if "recommended" in there:
            continue
        if arm not in there:
            missing[task] = f"{arm}, which the verdict names, was not run"
            continue
        named = [episode for episode in episodes if (episode["task"], episode["arm"]) == (task, arm)]
        episodes += [{**episode, "arm": "recommended"} for episode in named]
    return missing


def agreement(result: dict[str, Any], instructions: dict[str, str]) -> tuple[list[Row], dict[str, str]]:
    """The verdict against the measured difference to the policy, and by task that cannot be judged, why.

    First surely: "use" is refuted where the interval is below 0, "off" where it is above. Then strictly: "use"
    asks for a difference above 0 (or 100 percent for both), "off" for one of 0 or less.
    """
    rows: list[Row] = []
    missing: dict[str, str] = {}
    for task in result["tasks"]:
        verdict = result["preflight"]["tasks"].get(instructions[task])
        mine = [episode for episode in result["episodes"] if episode["task"] == task]
        arms = {episode["arm"] for episode in mine} - {"policy", "recommended"}
        if verdict is None:
            missing[task] = f"the preflight has no verdict on {instructions[task]!r}"
            continue
        used = verdict["use"] != "off"
        candidates = [verdict["use"]] if used else sorted(arms)
        if not arms >= set(candidates):
            missing[task] = f"{verdict['use']}, which the verdict names, was not run"
            continue
        found = [one for one in (paired(mine, arm, "policy") for arm in candidates) if one is not None]
        if not found:
            missing[task] = f"no episode of the policy shares its seed with one of {', '.join(candidates) or 'an arm'}"
            continue
        best = max(found, key=lambda one: one.difference)
        change, (low, high) = best.difference, best.interval
        full = change == 0 and all(episode["success"] for episode in mine if episode["arm"] == "policy")
        surely = high >= 0 if used else low <= 0
        rows.append(Row(task, verdict["use"], change, surely, change > 0 or full if used else change <= 0))
    return rows, missing


def report(results: list[dict[str, Any]]) -> str:
    """All tables, markdown. Adds to each result what `assemble` does, and its number to each episode."""
    parts, judged = [], []
    for number, result in enumerate(results, start=1):
        name = f"study {number}"
        for episode in result["episodes"]:
            episode["study"] = name
        instructions = {task: _instruction(result, task) for task in result["tasks"]}
        missing = assemble(result, instructions) if "preflight" in result else {}
        parts += [f"\n## {name}: {result['settings']['episodes']} episodes a task", task_table(result)]
        if missing:
            parts.append("\n`recommended` is over fewer tasks than the other arms:")
            parts += [f"- {task}: {why}" for task, why in missing.items()]
        if "preflight" in result:
            rows, unjudged = agreement(result, instructions)
            judged += rows
            parts.append(f"\n{_told(rows)}:")
            parts += [f"- {row.task}: {row.use}, measured {100 * row.change:+.0f}" for row in rows]
            parts += [f"- {task}: not judged, {why}" for task, why in unjudged.items()]
    if len(results) > 1 and judged:
        parts.append(f"\nAll studies: {_told(judged)}")
    return "\n".join(["## All", arm_table(results), *parts])


def paired(episodes: Iterable[dict[str, Any]], arm: str, other: str) -> PairedDifference | None:
    """Over the episodes that both have, strata are study and task; None where there is none."""
    found: dict[str, dict[tuple[str, str, int], bool]] = {arm: {}, other: {}}
    for episode in episodes:
        if episode["arm"] in found:
            found[episode["arm"]][episode.get("study", ""), episode["task"], episode["seed"]] = episode["success"]
    strata: dict[Any, tuple[list[bool], list[bool]]] = {}
    for key in sorted(found[arm].keys() & found[other].keys()):
        mine, theirs = strata.setdefault(key[:2], ([], []))
        mine.append(found[arm][key])
        theirs.append(found[other][key])
    if not strata:
        return None
    return paired_difference([(np.array(mine), np.array(theirs)) for mine, theirs in strata.values()])


def _told(rows: list[Row]) -> str:
    right, strict = sum(row.surely for row in rows), sum(row.strictly for row in rows)
    return f"The verdict is not refuted on {right} of {len(rows)} tasks, strictly right on {strict}"


def _against(episodes: list[dict[str, Any]], arm: str, other: str) -> str:
    found = None if arm == other else paired(episodes, arm, other)
    if found is None:
        return ""
    low, high = (100 * bound for bound in found.interval)
    return f"{100 * found.difference:+.1f} ({low:+.1f} to {high:+.1f})"


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / max(1, len(values))


def _instruction(result: dict[str, Any], task: str) -> str:
    from vla_energy.data.metaworld_env import instruction

    told = (episode.get("instruction") for episode in result["episodes"] if episode["task"] == task)
    return next(filter(None, told), None) or instruction(task)  # results of earlier versions do not tell
