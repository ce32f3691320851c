"""What `closed_loop.py` reads, and whether it belongs together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_energy.arms import split_arm


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


def check_fit(preflight: dict[str, Any], fingerprint: str | None, replan_every: int, seeds: set[int]) -> None:
    """Raises ValueError where a preflight is another checkpoint's, or chose by these episodes or at another interval.

    Args:
        fingerprint: of the checkpoint that ran; None where the results do not say.
        replan_every, seeds: of the episodes.
    """
    other = preflight.get("fingerprint")
    if None not in (other, fingerprint) and other != fingerprint:
        raise ValueError("the preflight is of another checkpoint than the episodes")
    for task, row in preflight["tasks"].items():
        tried = row.get("trials") or {}
        if shared := seeds & set(tried.get("seeds", ())):
            raise ValueError(
                f"{task!r}: seeds {min(shared)} to {max(shared)} are those of the trials that the arm was chosen by: "
                "evaluate on others"
            )
        if tried.get("replan_every", replan_every) != replan_every:
            raise ValueError(
                f"{task!r} was tried with a decision every {tried['replan_every']} steps, the episodes have one every "
                f"{replan_every}: --replan-every {tried['replan_every']}"
            )


def check_distinct(results: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError where an episode comes twice."""
    seen = set()
    for result in results:
        policy = result.get("meta", {}).get("checkpoint", {})
        of = policy.get("fingerprint", policy.get("checkpoint")) if isinstance(policy, dict) else policy
        for episode in result["episodes"]:
            key = (of, episode["task"], episode["arm"], episode["seed"])
            if key in seen:
                raise ValueError(f"task {episode['task']}, arm {episode['arm']}, seed {episode['seed']} comes twice")
            seen.add(key)


def fingerprint_of(result: dict[str, Any]) -> str | None:
    """Of the checkpoint that ran; None where the results do not say."""
    policy = result.get("meta", {}).get("checkpoint", {})
    return policy.get("fingerprint") if isinstance(policy, dict) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # of text and of JSON
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is no result: expected a JSON object")
    return data
