"""RLDS builder of LIBERO demonstrations by the library's own scripted experts, in the layout of openvla-oft's data.

    python -m vla_energy.data.libero --suite libero_spatial --episodes 20 --val-episodes 2 --out DIR

writes `DIR/libero_spatial_no_noops/1.0.0/` with splits `train` and `val`; openvla-oft reads it under this name, and
takes its statistics from both splits. Episodes start from LIBERO's own random placements, never from
the fixed states that rollouts evaluate on. As in `vla_energy.data.metaworld`, a share of the training episodes is
disturbed in its execution while the recorded action stays the expert's answer, and episodes that the expert fails are
replaced by the next seed. Steps that neither move the hand nor switch the gripper are executed, but not recorded.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_energy.data import libero_env as lb
from vla_energy.data.libero_expert import SUITES, Expert, Style, require_experts
from vla_energy.data.recording import (
    ATTEMPTS_PER_EPISODE,
    VAL_SEED_OFFSET,
    Disturbance,
    Episode,
    Layout,
    Recording,
    Step,
    check_new,
    finish,
    jpeg,
    make_step,
    record_dataset,
    record_successes,
    run_alone,
)

NOISE_STD = 0.6
"""Standard deviation of the disturbance of a noisy episode, in units of the action's range."""
NOOP_NORM = 1e-4
"""Below this norm of its first six values an action does not move the hand."""
JPEG_QUALITY = 95
JOINTS = 7
STYLES = ("one", "several")
_STYLE_STREAM = 1  # an episode's style is drawn apart from its disturbance


@dataclass(frozen=True)
class LiberoRecording(Recording):
    """What to record of one LIBERO task.

    Attributes:
        suite: the task's suite, whose step limit holds.
        image_size: side of the images.
        styles: `one` way of solving the task, or `several`, drawn an episode.
    """

    suite: str
    image_size: int
    styles: str


def layout(image_size: int) -> Layout:
    """The fields of openvla-oft's LIBERO data, with images of this side; what is ours is in the metadata."""
    image = (image_size, image_size, 3)
    observation = {"image": image, "wrist_image": image, "state": (lb.PROPRIO_DIM,), "joint_state": (JOINTS,)}
    return Layout(observation, lb.ACTION_DIM, texts=("file_path",))


def is_noop(action: np.ndarray, gripper: float | None) -> bool:
    """Whether an action `(7,)` does nothing: the hand rests, and the gripper's command is the one it had.

    Args:
        action: in the environment's convention.
        gripper: command of the last recorded step, None if there is none: then only the hand counts.
    """
    return bool(np.linalg.norm(action[:-1]) < NOOP_NORM) and (gripper is None or action[-1] == gripper)


def record(recording: LiberoRecording) -> list[Episode]:
    """Records one task in this process (one renderer per process, see `libero_env`).

    Returns:
        Episodes in RLDS layout; images are JPEG bytes.

    Raises:
        SimulatorError: the expert solves fewer episodes than asked in four times as many attempts.
    """
    world = lb.Libero(recording.task, recording.image_size)
    attempts: list[tuple[bool, int]] = []  # solved, and no-op steps of each

    def attempt(seed: int, noise_std: float) -> list[Step] | None:
        steps, noops = _run_expert(world, recording, seed, noise_std)
        attempts.append((steps is not None, noops))
        return steps

    episodes = record_successes(recording, NOISE_STD, attempt)
    for episode in episodes:
        metadata = episode["episode_metadata"]
        metadata["file_path"] = f"scripted/{recording.suite}/{recording.task}/seed_{metadata['seed']}"
    failed = sum(not solved for solved, _ in attempts)
    noops = sum(noops for solved, noops in attempts if solved)
    steps = sum(len(episode["steps"]) for episode in episodes)
    print(
        f"{recording.task}: {len(episodes)} episodes, {steps} steps, {noops} no-op steps left out, "
        f"{failed} failed attempts replaced",
        file=sys.stderr,
        flush=True,
    )
    return episodes


def _run_expert(
    world: lb.Libero, recording: LiberoRecording, seed: int, noise_std: float
) -> tuple[list[Step] | None, int]:
    """One episode's steps, None if the expert does not solve it within the suite's limit; and its no-op steps."""
    disturbance = Disturbance(seed, noise_std, lb.ACTION_DIM)
    instruction = lb.instruction(world.task)
    world.reset(seed)
    expert = _expert(world, seed, recording.styles)
    steps: list[Step] = []
    noops = 0
    for index in range(lb.MAX_STEPS[recording.suite]):
        noise = disturbance.at(index)
        action = np.clip(expert.action(world), -1.0, 1.0).astype(np.float32)
        if is_noop(action, float(steps[-1]["action"][-1]) if steps else None):
            noops += 1
        else:
            steps.append(make_step(_observe(world), action, instruction, first=not steps))
        if world.step_raw(action + noise):
            return (finish(steps) if steps else None), noops
    return None, noops


def _observe(world: lb.Libero) -> dict[str, Any]:
    main, wrist = (jpeg(image, JPEG_QUALITY) for image in world.render())
    return {"image": main, "wrist_image": wrist, "state": world.state(), "joint_state": world.joints()}


def _expert(world: lb.Libero, seed: int, styles: str) -> Expert:
    return Expert(world, Style.draw(np.random.default_rng([seed, _STYLE_STREAM])) if styles == "several" else None)


def choose_tasks(suite: str, tasks: list[str] | None) -> list[str]:
    """The tasks to record, by default all of the suite, which then all need an expert.

    Raises:
        ValueError: a suite without experts, tasks that are not in it, or tasks that have no expert.
        SimulatorError: LIBERO is not installed.
    """
    if suite not in SUITES:
        raise ValueError(f"no experts for the suite {suite!r}; there are for: {', '.join(SUITES)}")
    known = lb.suite_tasks(suite)
    if unknown := [task for task in tasks or () if task not in known]:
        raise ValueError(f"not in {suite}: {', '.join(unknown)}; its tasks: {', '.join(known)}")
    chosen = tasks or known
    require_experts(suite, chosen)  # none is left out silently
    return chosen


def build(
    out: str,
    suite: str,
    episodes: int,
    val_episodes: int,
    *,
    name: str | None = None,
    tasks: list[str] | None = None,
    image_size: int = lb.IMAGE_SIZE,
    styles: str = "one",
    seed: int = 0,
    noise_share: float = 0.4,
    workers: int = 2,
) -> str:
    """Records and writes an RLDS dataset; returns its folder.

    Args:
        out: the data root (`data_root_dir` of the fine-tuning script).
        suite: one of `libero_expert.SUITES`.
        episodes, val_episodes: successful episodes a task in `train` and in `val`.
        name: dataset name in snake case, by default openvla-oft's for the suite.
        tasks: tasks of the suite, by default all ten.
        image_size: side of the images, pixels.
        styles: `one` or `several` ways of solving a task.
        seed: first seed of `train`; `val` starts `VAL_SEED_OFFSET` later.
        noise_share: share of disturbed episodes in `train`; `val` has none.
        workers: simulator processes at a time.

    Raises:
        ValueError: a setting that cannot be, a task unknown or named twice, or a dataset of this name is there.
        SimulatorError: simulator or OpenGL missing, or an expert that fails too often.
    """
    _check(episodes, val_episodes, image_size, styles, seed, noise_share, workers)
    name = name or f"{suite}_no_noops"
    check_new(out, name)
    chosen = run_alone(choose_tasks, suite, tasks)
    counts = {"train": (episodes, seed, noise_share)}
    if val_episodes:
        counts["val"] = (val_episodes, seed + VAL_SEED_OFFSET, 0.0)
    splits = {
        split: [LiberoRecording(task, *count, suite, image_size, styles) for task in chosen]
        for split, count in counts.items()
    }
    description = f"LIBERO demonstrations by scripted experts. Suite {suite}, tasks: {', '.join(chosen)}"
    return record_dataset(out, name, layout(image_size), record, splits, workers, description)


def _check(
    episodes: int, val_episodes: int, image_size: int, styles: str, seed: int, noise_share: float, workers: int
) -> None:
    most = VAL_SEED_OFFSET // ATTEMPTS_PER_EPISODE
    if not 1 <= episodes <= most or not 0 <= val_episodes <= most:
        raise ValueError(
            f"episodes={episodes}, val_episodes={val_episodes}: expected 1 to {most} and 0 to {most}, beyond which "
            "seeds of training and validation would meet"
        )
    last = lb.FIXED_STATES_FROM - 2 * VAL_SEED_OFFSET
    if not 0 <= seed <= last:
        raise ValueError(f"seed={seed}: expected 0 to {last}, beyond which are the fixed states of the evaluation")
    if styles not in STYLES:
        raise ValueError(f"styles={styles!r}: expected one of {', '.join(STYLES)}")
    if not 0.0 <= noise_share <= 1.0:
        raise ValueError(f"noise_share={noise_share}: expected 0 to 1")
    if image_size < 1 or workers < 1:
        raise ValueError(f"image_size={image_size}, workers={workers}: expected at least 1")


def main() -> None:
    """Runs `build` with the command line's flags and prints the dataset's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, help=f"one of {', '.join(SUITES)}")
    parser.add_argument("--tasks", help="comma-separated tasks of the suite (default all)")
    parser.add_argument("--name", help="dataset name (default SUITE_no_noops)")
    parser.add_argument("--episodes", type=int, default=20, help="training episodes a task (default 20)")
    parser.add_argument("--val-episodes", type=int, default=2, help="validation episodes a task (default 2)")
    parser.add_argument("--image-size", type=int, default=lb.IMAGE_SIZE, help="side of the images (default 128)")
    parser.add_argument("--styles", default="one", choices=STYLES, help="ways of solving a task (default one)")
    parser.add_argument("--noise-share", type=float, default=0.4, help="share of disturbed episodes (default 0.4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="simulator processes (default 2)")
    parser.add_argument("--out", required=True, help="data root; the dataset goes to OUT/NAME/1.0.0")
    args = vars(parser.parse_args())
    if args["tasks"] is not None:
        args["tasks"] = [task.strip() for task in args["tasks"].split(",") if task.strip()]
    try:
        print(build(**args))
    except (ValueError, ImportError, lb.SimulatorError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
