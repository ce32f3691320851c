"""A run's folder with everything the report reads, made up: for the fuzzer and the report's tests."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("in_batch", "at_0.05", "noise_0.3", "shuffle", "layer_exits")


def rows(steps: int = 30, shift: float = 0.0) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl: each metric of `PLOTS`, one value that was not finite, a validation at the end."""
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row = {"step": step, "train/l1": shift + 1 / step, "energy/loss": 2 / step, "frames_per_second": 40.0}
        row |= {"energy/positive": -0.1 * step, "energy/negative": 0.1 * step, "energy/spearman": 0.5}
        row |= {"energy/min": -0.2 * step, "energy/max": 0.3 * step, "energy/std": 0.1, "energy/std_row": 0.05}
        row |= {"energy/logits_min": -0.3 * step, "energy/logits_max": 0.2 * step, "energy/info_nce": 3 / step}
        row |= {"energy/grad_norm": None if step == 3 else 0.2, "energy/skipped": float(step == 3)}
        row |= {"train/grad_norm": 0.4 + shift, "train/skipped": 0.0}
        row |= {"energy/clipped": 0.0, "energy/win_rate/in_batch": 0.9, "energy/win_rate/policy": 0.6}
        row |= {"energy/chance": 2.0, "energy/centre_l1_0": 9 / step, "energy/centre_l1_1": 8 / step}
        found.append(row)
    last = {"step": steps, "val/finetune/l1_val": 0.1 + shift, "val/energy/spearman": 0.7}
    found.append(last | {f"val/energy/win_rate/{kind}": 0.5 + 0.1 * n for n, kind in enumerate(KINDS)})
    return found


def rollout(tasks: tuple[str, ...] = ("reach", "press")) -> dict[str, Any]:
    """Results of `vla-energy rollout`."""
    arm = {"episodes": 5, "success": 0.6, "interval": [0.2, 0.9], "milliseconds_per_decision": {"mean": 15.0}}
    change = {"baseline": "policy", "difference": 0.2, "interval": [-0.1, 0.4]}
    change |= {"won": 2, "lost": 1, "p_value": 1.0, "pairs": 5}
    compared = {"arms": {"policy": arm, "rerank": arm}, "differences": {"rerank": change}}
    return {"overall": compared, "tasks": dict.fromkeys(tasks, compared)}


def preflight() -> dict[str, Any]:
    """What preflight writes, as far as the report reads it."""
    effect = {"change": -0.2, "interval": [-0.3, -0.1]}
    bands = {"from_0": 0.9, "from_0.02": 0.8, "from_0.1": 0.7}
    modes = {"rerank": {"effect": effect, "bands": bands}, "retrieve": {"effect": effect, "bands": {}}}
    return {"verdict": {"use": "rerank", "reasons": ["use rerank: it <helps>", "retrieve helps less"]}, "modes": modes}


def shapes() -> dict[str, Any]:
    """What `finetune.shapes` keeps: two frames, a curve of the gate, ranking by distance."""
    xs, ys = np.linspace(-1, 2, 13), np.linspace(-1.5, 1.5, 13)
    plane = [[round((x - 1) ** 2 + y**2, 4) for x in xs] for y in ys]
    along = [[round(h * (x - 1) ** 2, 4) for x in xs] for h in range(1, 5)]
    frame = {"task": "reach", "episode": 3, "step": 7, "plane": {"xs": [*xs], "ys": [*ys], "energies": plane}}
    frame["time"] = {"xs": [*xs], "energies": along}
    damaged = json.loads(json.dumps(frame))
    damaged["plane"]["energies"][0][0] = None
    curve = {"margins": [0.0, 0.5, 1.0], "accepted": [0.9, 0.5, 0.0], "worse": [0.3, 0.1, None], "l1": [0.1, 0.08, 0.1]}
    gate = {**curve, "l1_policy": 0.1, "chosen": 0.5}
    return {"frames": [frame, damaged], "gate": gate, "bands": {"from_0": 0.7, "from_0.3": 0.9}}


def footage(decisions: int = 6) -> dict[str, Any]:
    """Frames of one episode."""
    from PIL import Image

    kept = []
    for number in range(decisions):
        buffer = io.BytesIO()
        Image.fromarray(np.full((16, 16, 3), 40 * number, np.uint8)).save(buffer, "JPEG")
        image = base64.b64encode(buffer.getvalue()).decode()
        energy = {"energy": math.sin(number), "energy_policy": 0.5 + math.sin(number), "accepted": number == 2}
        kept.append({"step": 4 * number, "image": image, **energy})
    about = {"task": "reach", "instruction": "reach </script>", "arm": "rerank", "seed": 1, "success": True}
    return {**about, "steps": 4 * decisions, "decisions": kept}


def metrics(with_rollout: bool = True) -> dict[str, Any]:
    """The demo's metrics.json."""
    return {
        "finetune": {"l1_val": 0.1, "l1_val_before": 0.5},
        "energy": {"win_rate": {"in_batch": 0.995, "<odd>": 0.5}, "spearman": None},
        "rerank": {"l1_policy": 0.1, "l1_reranked": 0.08, "l1_gated": 0.09, "l1_oracle": 0.05, "kept": 0.4},
        "gate": {"margin": 0.5},
        "rollout": rollout() if with_rollout else None,
        "rollout_reason": None if with_rollout else "no OpenGL library",
        "seconds": {"total": 12.0},
        "versions": {"python": "3.11"},
    }


def write_run(folder: Path, shift: float = 0.0, rate: float = 1e-3) -> Path:
    """The folder of a run that has everything."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(shift=shift)))
    stored = {
        "flags": {
            "seed": 7,
            "learning_rate": rate,
            "energy": {"range": {"name": "softplus"}, "rerank": {"margin": 0.5}},
        },
        "versions": {},
    }
    files = {"metrics.json": metrics(), "rollout.json": rollout(), "preflight.json": preflight()}
    files |= {"shapes.json": shapes(), "footage.json": footage(), "settings.json": stored}
    files |= {"energy_gates.json": {"margins": {"rerank": None, "retrieve": 0.0}, "tasks": {"reach": "retrieve@2"}}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder
