"""Paired closed-loop rollouts: every arm runs the same episodes, several episodes share one forward pass.

`workers` worlds of one task run in lockstep: all execute their chunk, then all are answered by one batched call
of the policy per arm. What a row is answered may not depend on the rows beside it; candidate noise comes from a
generator seeded by (task, episode seed, step) alone, so that it is the same for every arm, order and batch.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vla_energy.arms import split_arm
from vla_energy.results import check_writable, versions, write_json
from vla_energy.rollout.episode import Episode, decide_and_execute
from vla_energy.rollout.footage import Footage
from vla_energy.rollout.interface import Policy, check_arms
from vla_energy.rollout.record import Recorder, check_target
from vla_energy.rollout.simulator import FIXED_STATES, SimulatorProcess, backend_info, expand_tasks
from vla_energy.rollout.summary import summarize

logger = logging.getLogger(__name__)

EVALUATION_SEED_OFFSET = 1_000_000
"""Episode i starts from `seed + EVALUATION_SEED_OFFSET + i`; recordings stay far below."""


@dataclass(frozen=True)
class Settings:
    """What is run. Checked by `validate`; written into the results as `resolve` gives it.

    Attributes:
        max_steps: limit of an episode's steps, None for the backend's; resolved, the largest of `step_limits`.
        step_limits: limit by task; filled in by `resolve`.
    """

    tasks: list[str]
    episodes: int
    arms: list[str]
    seed: int
    replan_every: int
    max_steps: int | None
    workers: int
    backend: str
    step_limits: dict[str, int] = field(default_factory=dict)

    def validate(self) -> None:
        """Checks what needs neither simulator nor policy. Raises ValueError naming the setting."""
        for name in ("episodes", "replan_every", "max_steps", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < EVALUATION_SEED_OFFSET:
            raise ValueError(f"seed must be in 0..{EVALUATION_SEED_OFFSET - 1}, got {self.seed}")
        for arm in self.arms:
            split_arm(arm)
        for name, values in (("tasks", self.tasks), ("arms", self.arms)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be given, each once, got {values}")
        states = FIXED_STATES.get(self.backend)
        if states is not None and self.seed + self.episodes > states:
            raise ValueError(
                f"{self.backend} has {states} fixed initial states a task: from seed {self.seed} on there are "
                f"{max(0, states - self.seed)} episodes, not {self.episodes}"
            )

    def resolve(self) -> Settings:
        """These settings with suites as their tasks, and the backend's step limits where none is given.

        Raises:
            ValueError: unknown backend or tasks, or a task that comes twice.
            SimulatorError: the simulator is not installed.
        """
        tasks = expand_tasks(self.tasks, self.backend)
        limits = backend_info(self.backend).max_steps
        steps = {task: limits[task] if self.max_steps is None else self.max_steps for task in tasks}
        return replace(self, tasks=tasks, max_steps=max(steps.values()), step_limits=steps)

    def interval(self, arm: str) -> int:
        """Actions of a chunk that are executed before the next decision of an arm."""
        return split_arm(arm)[1] or self.replan_every

    def validate_policy(self, policy: Policy) -> None:
        """Checks the settings against the checkpoint and the simulator. Raises ValueError with the fix."""
        check_arms(self.arms, policy.arms)
        longest = max(self.interval(arm) for arm in self.arms)
        if longest > policy.horizon:
            raise ValueError(f"replan_every {longest} exceeds the checkpoint's horizon {policy.horizon}")
        action_dim = backend_info(self.backend).action_dim
        if policy.action_dim != action_dim:
            raise ValueError(
                f"the checkpoint's actions have {policy.action_dim} dimensions, {self.backend}'s have {action_dim}: "
                "roll out a checkpoint fine-tuned on this simulator's data"
            )


def run_rollouts(
    policy: Policy,
    tasks: Sequence[str],
    episodes: int,
    arms: Sequence[str],
    seed: int = 0,
    replan_every: int = 4,
    max_steps: int | None = None,
    workers: int = 2,
    *,
    backend: str = "metaworld",
    out: str | Path | None = None,
    record: str | Path | None = None,
    record_name: str | None = None,
    footage: str | Path | None = None,
) -> dict[str, Any]:
    """Runs `episodes` episodes of every task with every arm, on the same seeds.

    Args:
        policy: the checkpoint.
        tasks: task names of the backend, or names of its suites, which stand for all their tasks.
        episodes: episodes a task and arm.
        arms: arms to compare, `ARM` or `ARM@n`; the first is the baseline of the differences.
        seed: episode i starts from `seed + EVALUATION_SEED_OFFSET + i`.
        replan_every: actions of a chunk that are executed before the next decision, where the arm does not say.
        max_steps: physics steps after which an episode has failed; None takes the backend's limit of each task.
        workers: simulator processes, which is also the largest batch the policy sees.
        backend: simulator, see `simulator.BACKENDS`.
        out: JSON file, rewritten after every task; `"complete"` in it is false until the last.
        record: data root to write the episodes to as an RLDS dataset, see `record`; None records nothing.
        footage: file for the frames and energies of one episode, see `footage`: of the first task, the last arm and the
            first seed.
        record_name: the dataset's name, by default `metaworld_rollouts`, `libero_rollouts`, or else `rollouts`.

    Returns:
        What `summary.summarize` describes; the content of `out`.

    Raises:
        ValueError: settings that fit neither each other, nor the checkpoint, nor the simulator; a policy that
            answers with chunks of the wrong shape or with NaN; a dataset of this name is there.
        SimulatorError: a simulator failed, died or hung; tasks finished before are in `out`.
        OSError: `out` or `record` cannot be written; found before the first episode.
        DataDependencyError: `record` without tensorflow-datasets; found before the first episode.
        RecordingError: the dataset cannot be written at the end; the message says where the episodes are.
    """
    settings = Settings(list(tasks), episodes, list(arms), seed, replan_every, max_steps, workers, backend)
    settings.validate()
    if out is not None:
        check_writable(out)
    name = None if record is None else check_target(record, record_name, backend)
    settings = settings.resolve()
    settings.validate_policy(policy)
    first = seed + EVALUATION_SEED_OFFSET
    kept = None if footage is None else Footage(footage, settings.tasks[0], settings.arms[-1], first)
    _say_shut(settings.arms, policy.metadata)
    start = time.perf_counter()
    meta = {"checkpoint": policy.metadata, "versions": versions(), "first_episode_seed": first}
    records: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    total = len(settings.tasks) * len(settings.arms) * episodes
    with contextlib.ExitStack() as stack:
        recorder = None
        if record is not None and name is not None:
            description = f"Rollouts of {policy.metadata} in {backend}. Arms: {arms}, tasks: {settings.tasks}"
            recorder = stack.enter_context(Recorder(record, name, backend, description))
            meta["recorded"] = str(recorder.folder)
        # None: silent where stderr is no terminal.
        bar = stack.enter_context(tqdm(total=total, disable=None, unit="episode"))
        for index, task in enumerate(settings.tasks, start=1):
            bar.set_description(task)
            records += _run_task(policy, task, settings, bar, recorder, kept)
            if recorder is not None:
                recorder.finish_task()
            meta["seconds"] = time.perf_counter() - start
            result = summarize(records, settings, meta, complete=index == len(settings.tasks))
            if out is not None:
                write_json(out, result)
    return result


def _say_shut(arms: Sequence[str], metadata: dict[str, Any]) -> None:
    """Its episodes are those of the policy, which a table does not show."""
    gates = metadata.get("gates", {})
    if shut := [arm for arm in arms if gates.get(split_arm(arm)[0]) == math.inf]:
        logger.warning("the gate of %s is shut: the policy's chunks are executed", ", ".join(shut))


def _order(settings: Settings) -> Iterator[tuple[str, int]]:
    """(arm, seed) in the order of execution.

    Blocks of `workers` seeds with one arm, so that rows of a batch share their arm, and arms in turn, so that a
    machine that slows down slows all arms.
    """
    first = settings.seed + EVALUATION_SEED_OFFSET
    for block in range(first, first + settings.episodes, settings.workers):
        for arm in settings.arms:
            for seed in range(block, min(block + settings.workers, first + settings.episodes)):
                yield arm, seed


def _run_task(
    policy: Policy, task: str, settings: Settings, bar: tqdm, recorder: Recorder | None, footage: Footage | None
) -> list[dict[str, Any]]:
    """Records of all episodes of one task, sorted by seed, then by arm as given."""
    waiting = deque(_order(settings))
    records: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        count = min(settings.workers, len(waiting))
        idle = [stack.enter_context(SimulatorProcess(task, settings.backend)) for _ in range(count)]
        running: list[Episode] = []
        while waiting or running:
            started = [Episode(simulator, *waiting.popleft()) for simulator in idle[: len(waiting)]]
            for episode in started:
                episode.simulator.request_reset(episode.seed)
            for episode in started:
                episode.observation = episode.simulator.answer()
            running += started
            decide_and_execute(policy, running, settings, recorder, footage)
            finished = [episode for episode in running if episode.observation is None]
            running = [episode for episode in running if episode.observation is not None]
            idle = [episode.simulator for episode in finished]
            records += [episode.record() for episode in finished]
            for episode in finished:
                if footage is not None:
                    footage.finish(episode)
                if recorder is not None:
                    recorder.add(episode.trace, task, episode.seed, episode.arm, episode.success)
            bar.update(len(finished))
    return sorted(records, key=lambda record: (record["seed"], settings.arms.index(record["arm"])))
