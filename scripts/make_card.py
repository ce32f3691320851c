"""Writes the model card of the tiny OpenVLA from what was measured: its pretraining run and its rollouts.

    python scripts/make_card.py --run runs/pretrain_tiny --rollouts runs/pretrain_tiny/rollout.json \
        --out vla_energy/backbones/tiny_openvla

Copies the checkpoint's files (without the training state) and draws the curves from `metrics.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import matplotlib
import torch
from pretrain_tiny import SEEN_TASKS

from vla_energy.backbones import load_openvla
from vla_energy.finetune.checkpoints import STATE

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "card"  # the same run gives the same file

TEXT = """# Tiny OpenVLA

{parameters:.2f} million parameters, bf16, in the folder format of OpenVLA-OFT: two timm vision towers, projector,
Llama with bidirectional attention, parallel decoding of 8 actions, proprioception, L1 action head. Made to run
the whole job on two CPU cores; it is no general robot policy.

- **Data**: {frames} frames, 40 demonstrations of each of the 25 tasks below by Meta-World's own scripted experts,
  half of them disturbed (see `vla_energy/data/metaworld.py`); recorded with seeds from 0 (train) and 5000 (val).
- **Training**: `python scripts/pretrain_tiny.py --max_steps {steps}`: from random weights, seed {seed}, batch
  {batch}, AdamW at {rate} with 200 steps of warm-up and a cosine, gradient norm clipped at 1, fp32, one CPU
  thread ({minutes:.0f} minutes at the median step time).
- **Held-out L1** (normalised units): {l1:.4f}; its held-out episodes were disturbed like those of training, while the
  recorder now keeps held-out episodes clean.
- **Unseen tasks**: the other 25 of Meta-World's 50.

![curves](curves.svg)

## Use

- **For**: running the whole job (fine-tuning, energy head, preflight, rollouts, the openvla-oft plugin) on two CPU
  cores, in tests, demos and small measurements of methods.
- **Not for**: driving a real robot, claims about policies of billions of parameters, or tasks and cameras other than
  Meta-World's as recorded here. It has seen a few words of English: the tasks' names.
- **Limits**: no success on {failed} of its own {count} tasks; its success rates have wide intervals.
- **Licence**: MIT, as this package. Trained from random weights on simulated demonstrations: no other model's weights
  are in it.

## Closed loop

Seeds 1,000,000 and up (never recorded), {episodes} episodes a task, a new chunk every {replan} steps, at most
{limit} steps. Overall {overall:.0f} percent.

| task | success | 95 percent interval |
|---|---|---|
{table}

Command: `vla-energy rollout --checkpoint DIR --tasks ... --episodes {episodes} --arms policy --seed 0 --out FILE`.

Seen tasks: {tasks}.
"""


def _curves(rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3))
    train = [(row["step"], row["train/l1"]) for row in rows if "train/l1" in row]
    val = [(row["step"], row["val/finetune/l1_val"]) for row in rows if "val/finetune/l1_val" in row]
    window = 20
    smooth = [
        (train[i][0], sum(value for _, value in train[i - window : i]) / window) for i in range(window, len(train))
    ]
    axis.plot(*zip(*smooth, strict=True), label=f"train, mean of {window} rows")
    axis.plot(*zip(*val, strict=True), "o-", label="held out")
    axis.set(xlabel="step", ylabel="L1 (normalised)")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of pretrain_tiny.py")
    parser.add_argument("--rollouts", type=Path, required=True, help="JSON of `vla-energy rollout --arms policy`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shipped checkpoint")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    latest, rollouts = args.run / "latest", json.loads(args.rollouts.read_text())
    state = torch.load(latest / STATE, weights_only=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.iterdir():
        old.unlink()
    for path in latest.iterdir():
        if path.name != STATE:
            shutil.copyfile(path, args.out / path.name)
    _curves(rows, args.out / "curves.svg")
    vla = load_openvla(args.out, use_proprio=True)
    entry = next(iter(vla.statistics.values()))
    speeds = sorted(row["frames_per_second"] for row in rows if "frames_per_second" in row)
    batch = int(state["flags"]["batch_size"])
    arms = {task: data["arms"]["policy"] for task, data in rollouts["tasks"].items()}
    table = "\n".join(
        f"| {task} | {100 * arm['success']:.0f} % | {100 * arm['interval'][0]:.0f} to {100 * arm['interval'][1]:.0f} |"
        for task, arm in arms.items()
    )
    settings = rollouts["settings"]
    card = TEXT.format(
        parameters=sum(p.numel() for p in vla.parameters()) / 1e6,
        frames=f"{entry.num_transitions:,}",
        steps=state["step"],
        seed=state["flags"]["seed"],
        batch=batch,
        rate=state["flags"]["learning_rate"],
        minutes=state["step"] * batch / speeds[len(speeds) // 2] / 60,
        l1=next(row["val/finetune/l1_val"] for row in reversed(rows) if "val/finetune/l1_val" in row),
        episodes=settings["episodes"],
        replan=settings["replan_every"],
        limit=settings["max_steps"],
        overall=100 * rollouts["overall"]["arms"]["policy"]["success"],
        table=table,
        failed=sum(not arm["success"] for arm in arms.values()),
        count=len(arms),
        tasks=", ".join(SEEN_TASKS),
    )
    (args.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
