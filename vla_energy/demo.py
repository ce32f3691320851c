"""The whole job in a few minutes on two CPU cores: `python -m vla_energy.demo`, or `make demo`.

Fine-tunes the tiny OpenVLA with the energy head on the bundled demonstrations, measures ranking and reranking on
held-out episodes, and drives the simulated robot if an OpenGL library is there. Writes to `--out`:
`metrics.json`, `report.html`, `rollout.json`, `metrics.jsonl`, TensorBoard's events, and the checkpoint `latest/`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vla_energy.config import EnergyConfig
from vla_energy.data.metaworld_env import SimulatorError
from vla_energy.finetune.config import EMBEDDED, FinetuneConfig
from vla_energy.finetune.evaluate import evaluate
from vla_energy.finetune.setup import open_split
from vla_energy.finetune.trainer import Trainer
from vla_energy.results import FOOTAGE, SHAPES, check_writable, versions, write_json
from vla_energy.rollout.simulator import SimulatorProcess

TASKS = ("handle-press-side", "button-press-topdown")
"""Tasks of the bundled demonstrations."""
STEPS = 400


def demo_config(out: Path, steps: int = STEPS, vla_path: str = EMBEDDED) -> FinetuneConfig:
    """The demo's flags, those of `configs/demo.yaml`; the run's folder is `out`."""
    return FinetuneConfig(
        vla_path=vla_path,
        run_root_dir=out.parent,
        run_id_override=out.name,
        use_proprio=True,
        image_aug=False,
        precision="fp32",
        batch_size=16,
        learning_rate=1e-3,
        lr_warmup_steps=20,
        lr_schedule="cosine",
        max_grad_norm=1.0,
        max_steps=steps,
        use_val_set=True,
        val_freq=max(steps // 4, 1),
        val_time_limit=20,
        save_freq=steps,
        save_latest_checkpoint_only=True,
        wandb_log_freq=5,
        energy_learning_rate=1e-3,
        energy_warm_steps=20,
        device="cpu",
        energy=EnergyConfig(),
    )


def run_demo(config: FinetuneConfig, episodes: int) -> dict[str, Any]:
    """Trains, evaluates, rolls out and writes everything; returns what is in `metrics.json`.

    Args:
        config: see `demo_config`.
        episodes: of each task and arm; 0 leaves the rollout out.

    Raises:
        ValueError: flags, checkpoint and data do not fit; nothing was trained.
        SimulatorError: the simulator failed in the middle; `metrics.json` has what was measured before.
    """
    from vla_energy.report.html import write_report
    from vla_energy.report.runs import read_runs

    out = config.run_dir
    check_writable(out / "metrics.json")
    clock = _Clock()
    with clock.phase("load", "loading the tiny OpenVLA and its data"):
        earlier = out / "metrics.jsonl"
        kept = earlier.rename(out / "metrics.old.jsonl") if earlier.exists() else None
        try:
            trainer = Trainer(config)
        except BaseException:
            if kept is not None:
                kept.rename(earlier)  # this demo never began: the earlier one stays whole
            raise
        split = open_split(config, trainer.job.vla, "val", trainer.job.statistics)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)  # of an earlier demo: curves would overlap
    for name in ("rollout.json", FOOTAGE, SHAPES):
        (out / name).unlink(missing_ok=True)  # the report would take them for this one's
    if kept is not None:
        kept.unlink()
    with clock.phase("evaluate_before", f"measuring the start checkpoint on {split.num_frames} held-out frames"):
        before = evaluate(trainer.job, split, None, config)
    with clock.phase("finetune", f"fine-tuning it with the energy head, {config.max_steps} steps"):
        metrics = trainer.run()
    metrics["finetune"].update(l1_val_before=before["finetune"]["l1_val"], steps=config.max_steps)
    metrics["rollout"], metrics["rollout_reason"] = None, "not finished" if episodes else "left out by --no-rollout"
    metrics.update(seconds=clock.seconds, versions=versions())
    write_json(out / "metrics.json", metrics)  # what is measured so far, should the simulator fail
    if episodes:
        with clock.phase("rollout", f"driving the simulated robot, {episodes} episodes a task and arm"):
            metrics["rollout"], metrics["rollout_reason"] = _rollout(out, episodes)
    with clock.phase("report", "writing the report"):
        write_json(out / "metrics.json", metrics)
        write_report(read_runs([out]), out / "report.html")
    clock.seconds["total"] = clock.elapsed()
    write_json(out / "metrics.json", metrics)
    return metrics


def summary(metrics: dict[str, Any]) -> str:
    """The results for a terminal."""
    finetune, energy, rerank = metrics["finetune"], metrics["energy"], metrics["rerank"]
    lines = [
        "held-out L1 (normalised units)",
        f"  policy before fine-tuning  {finetune['l1_val_before']:.4f}",
        f"  policy                     {finetune['l1_val']:.4f}",
        f"  lowest energy, ungated     {rerank['l1_reranked']:.4f}",
        f"  best candidate there is    {rerank['l1_oracle']:.4f}",
        _gate_line(metrics["gate"]),
        f"energy: Spearman {energy['spearman']:.3f}; the expert wins against",
        *(f"  {kind:25}  {100 * rate:5.1f}%" for kind, rate in energy["win_rate"].items()),
    ]
    if metrics["rollout"] is None:
        lines.append(f"rollout: none; {metrics['rollout_reason']}")
    else:
        from vla_energy.rollout.command import table

        lines += ["closed loop", table(metrics["rollout"])]
    seconds = metrics["seconds"]
    phases = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total")
    return "\n".join([*lines, f"seconds: {seconds['total']:.0f} ({phases})"])


def _gate_line(gate: dict[str, Any]) -> str:
    """What the calibrated gate does on the held-out episodes that it was not calibrated on."""
    if gate["margin"] is None:
        return "gate: stays shut, no margin is safe on the held-out episodes; reranking returns the policy's own chunks"
    return (
        f"gate: margin {gate['margin']:.2f} accepts {100 * gate['accepted']:.0f}% of choices, "
        f"L1 {gate['l1_policy']:.4f} -> {gate['l1_gated']:.4f}"
    )


class _Clock:
    """Seconds by phase, from here on (starting Python and its imports come before); tells each phase on stderr."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    @contextmanager
    def phase(self, name: str, text: str) -> Iterator[None]:
        print(f"== {text}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _rollout(out: Path, episodes: int) -> tuple[dict[str, Any] | None, str | None]:
    """The rollouts without the list of episodes (that is in `rollout.json`), or None and why there are none."""
    from vla_energy.rollout.policy import load_policy
    from vla_energy.rollout.run import run_rollouts

    try:
        with SimulatorProcess(TASKS[0]) as probe:  # a child: a missing GL library may end its process
            probe.reset(0)
    except SimulatorError as error:
        return None, f"the simulator does not run here: {error}"
    result = run_rollouts(
        load_policy(str(out / "latest"), strict=True),
        TASKS,
        episodes,
        ["policy", "rerank"],
        out=out / "rollout.json",
        footage=out / FOOTAGE,
    )
    return {key: value for key, value in result.items() if key != "episodes"}, None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vla_energy.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (default runs/demo)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"fine-tuning steps (default {STEPS})")
    parser.add_argument("--episodes", type=int, default=5, help="rollout episodes a task and arm (default 5)")
    parser.add_argument("--no-rollout", action="store_true", help="do not drive the simulated robot")
    parser.add_argument("--vla_path", default=EMBEDDED, help="another start checkpoint (default: the one that ships)")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.episodes < 1:
        parser.error("--steps and --episodes must be 1 or more; --no-rollout leaves the rollout out")
    try:
        config = demo_config(args.out, args.steps, args.vla_path)
        metrics = run_demo(config, 0 if args.no_rollout else args.episodes)
    except (ValueError, OSError, SimulatorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(metrics))
    print(f"written: {args.out / 'metrics.json'}, {args.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
