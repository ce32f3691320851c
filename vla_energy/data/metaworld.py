"""RLDS builder of Meta-World demonstrations by Meta-World's own scripted experts.

    python -m vla_energy.data.metaworld --name metaworld_mine --tasks drawer-open,reach \
        --episodes 20 --val-episodes 2 --noise-share 0.5 --out DIR

writes `DIR/metaworld_mine/1.0.0/` with splits `train` and `val`. In a noisy episode the executed
action is the expert's plus a disturbance held for a few steps, while the *recorded* action stays the
expert's answer to the state it was pushed into (DART, Laskey et al. 2017): recoveries, not mistakes. Only `train`
has noisy episodes.
With `--styles several` each episode, of both splits, first goes a way to the left or to the right, and at a speed of
its own: from the same observation different demonstrations go different ways, as human ones do.
Episodes that the expert fails are dropped and replaced by the next seed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_energy.data import metaworld_env as mw
from vla_energy.data.recording import (
    VAL_SEED_OFFSET,
    Disturbance,
    Episode,
    Layout,
    Recording,
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
JPEG_QUALITY = 92
STYLES = ("one", "several")
_STYLE_STREAM = 1  # an episode's style is drawn apart from its disturbance
LAYOUT = Layout({"image": (mw.IMAGE_SIZE, mw.IMAGE_SIZE, 3), "state": (mw.PROPRIO_DIM,)}, mw.ACTION_DIM)


@dataclass(frozen=True)
class MetaWorldRecording(Recording):
    """A `Recording` with `styles`: `one` way of solving the task, or `several`, drawn an episode."""

    styles: str


@dataclass(frozen=True)
class Style:
    """A way of solving a task: first `steps` steps sideways, and all of it at `speed`.

    Attributes:
        sideways: x of the actions of the detour, raw; negative is to the left.
        steps: its length.
        speed: factor of the expert's translation.
    """

    sideways: float
    steps: int
    speed: float

    @classmethod
    def draw(cls, seed: int) -> Style:
        """The style of an episode."""
        rng = np.random.default_rng([seed, _STYLE_STREAM])
        return cls(float(rng.choice([-0.9, 0.9])), int(rng.integers(8, 17)), float(rng.uniform(0.7, 1.0)))

    def apply(self, action: np.ndarray, index: int) -> np.ndarray:
        """The expert's `action (A,)` of step `index` in this style."""
        action = action.copy()
        if index < self.steps:
            action[0] = self.sideways
        action[:3] *= self.speed
        return action


def record(recording: MetaWorldRecording) -> list[Episode]:
    """Records one task in this process (one renderer per process, see `metaworld_env`).

    Returns:
        Episodes in RLDS layout; images are JPEG bytes.

    Raises:
        SimulatorError: the expert solves fewer episodes than asked in four times as many attempts.
    """
    world = mw.MetaWorld(recording.task)
    several = recording.styles == "several"
    return record_successes(
        recording,
        NOISE_STD,
        lambda seed, noise_std: _run_expert(world, seed, noise_std, Style.draw(seed) if several else None),
    )


def _run_expert(world: mw.MetaWorld, seed: int, noise_std: float, style: Style | None) -> list[dict[str, Any]] | None:
    """One episode's steps, or None if the expert does not solve it within `MAX_STEPS`."""
    disturbance = Disturbance(seed, noise_std, mw.ACTION_DIM)
    instruction = mw.instruction(world.task)
    steps: list[dict[str, Any]] = []
    world.reset(seed)
    for index in range(mw.MAX_STEPS):
        noise = disturbance.at(index)
        action = world.expert_action()
        if style is not None:
            action = style.apply(action, index)
        observation = {"image": jpeg(world.render(), JPEG_QUALITY), "state": world.state()}
        steps.append(make_step(observation, action, instruction, first=index == 0))
        if world.step(action + noise):
            return finish(steps)
    return None


def build(
    out: str,
    name: str,
    tasks: list[str],
    episodes: int,
    val_episodes: int,
    *,
    seed: int = 0,
    noise_share: float = 0.5,
    workers: int = 2,
    styles: str = "one",
) -> str:
    """Records and writes an RLDS dataset; returns its folder.

    Args:
        out: the data root (`data_root_dir` of the fine-tuning script).
        name: dataset name in snake case.
        tasks: Meta-World task names.
        episodes, val_episodes: successful episodes a task in `train` and in `val`.
        seed: first seed of `train`; `val` starts `VAL_SEED_OFFSET` later.
        noise_share: share of disturbed episodes in `train`; `val` has none, as a chunk that answers disturbances
            to come cannot be foreseen and would hide how well a policy does.
        workers: simulator processes at a time.
        styles: `one` or `several` ways of solving a task.

    Raises:
        ValueError: unknown task names, one named twice, unknown `styles`, or a dataset of this name is there.
        SimulatorError: simulator or OpenGL missing, or an expert that fails too often.
    """
    if styles not in STYLES:
        raise ValueError(f"styles={styles!r}: expected one of {', '.join(STYLES)}")
    check_new(out, name)
    run_alone(mw.check_tasks, tasks)
    splits = {"train": [MetaWorldRecording(task, episodes, seed, noise_share, styles) for task in tasks]}
    if val_episodes:
        held_out = (val_episodes, seed + VAL_SEED_OFFSET, 0.0, styles)
        splits["val"] = [MetaWorldRecording(task, *held_out) for task in tasks]
    return record_dataset(out, name, LAYOUT, record, splits, workers, f"Tasks: {tasks}; styles: {styles}")


def main() -> None:
    """Runs `build` with the command line's flags and prints the dataset's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--tasks", required=True, help="comma-separated Meta-World task names")
    parser.add_argument("--episodes", type=int, default=20, help="training episodes a task")
    parser.add_argument("--val-episodes", type=int, default=2, help="validation episodes a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise-share", type=float, default=0.5)
    parser.add_argument("--styles", default="one", choices=STYLES, help="ways of solving a task (default one)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", required=True, help="data root; the dataset goes to OUT/NAME/1.0.0")
    args = parser.parse_args()
    try:
        print(_build(args))
    except (ValueError, ImportError, mw.SimulatorError) as error:
        sys.exit(f"error: {error}")


def _build(args: argparse.Namespace) -> str:
    return build(
        args.out,
        args.name,
        args.tasks.split(","),
        args.episodes,
        args.val_episodes,
        seed=args.seed,
        noise_share=args.noise_share,
        workers=args.workers,
        styles=args.styles,
    )


if __name__ == "__main__":
    main()
