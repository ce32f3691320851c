"""Trains the tiny OpenVLA that ships with the project, from random weights, on 25 of Meta-World's 50 tasks.

    python scripts/pretrain_tiny.py --data_root_dir DATA --run_root_dir RUNS --max_steps 6000

Needs the dataset first (about 10 minutes on two cores):

    python -m vla_energy.data.metaworld --name metaworld_seen25 \
        --tasks "$(python scripts/pretrain_tiny.py --list_tasks True)" \
        --episodes 40 --val-episodes 2 --noise-share 0.5 --out DATA

It is the fine-tuning job with every weight trained, so what it shows of the loop holds for fine-tuning too.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import draccus

from vla_energy.backbones.tiny import write_random_start
from vla_energy.config import EnergyConfig
from vla_energy.data import RldsDataset
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.trainer import Trainer

SEEN_TASKS = [
    "reach",
    "push",
    "pick-place",
    "door-open",
    "door-lock",
    "door-unlock",
    "drawer-close",
    "button-press",
    "button-press-wall",
    "button-press-topdown-wall",
    "coffee-button",
    "faucet-open",
    "faucet-close",
    "window-open",
    "handle-press",
    "handle-pull",
    "lever-pull",
    "plate-slide",
    "plate-slide-back",
    "plate-slide-back-side",
    "dial-turn",
    "peg-unplug-side",
    "sweep-into",
    "soccer",
    "hammer",
]
"""The tasks the shipped weights have seen; the other 25 are new to them."""

HORIZON = 8


@dataclass
class PretrainConfig:
    """Flags.

    Attributes:
        data_root_dir: has the RLDS dataset `dataset_name`.
        start_dir: the random start is written there.
    """

    data_root_dir: str = "data"
    dataset_name: str = "metaworld_seen25"
    run_root_dir: Path = Path("runs")
    start_dir: Path = Path("runs/tiny_start")
    batch_size: int = 32
    learning_rate: float = 1e-3
    max_steps: int = 6000
    val_freq: int = 1000
    save_freq: int = 1000
    seed: int = 7
    resume: bool = False
    list_tasks: bool = False


def main() -> None:
    config = draccus.parse(PretrainConfig)
    if config.list_tasks:
        print(",".join(SEEN_TASKS))
        sys.exit()
    dataset = RldsDataset(config.data_root_dir, config.dataset_name, horizon=HORIZON, use_proprio=True)
    write_random_start(
        config.start_dir,
        [task.replace("-", " ") for task in SEEN_TASKS],
        {config.dataset_name: dataset.statistics},
        horizon=HORIZON,
        seed=config.seed,
    )
    Trainer(
        FinetuneConfig(
            vla_path=str(config.start_dir),
            data_root_dir=config.data_root_dir,
            dataset_name=config.dataset_name,
            run_root_dir=config.run_root_dir,
            run_id_override="pretrain_tiny",
            use_proprio=True,
            image_aug=False,
            use_lora=False,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            lr_warmup_steps=200,
            lr_schedule="cosine",
            max_grad_norm=1.0,
            max_steps=config.max_steps,
            use_val_set=True,
            val_freq=config.val_freq,
            val_time_limit=20,
            save_freq=config.save_freq,
            save_latest_checkpoint_only=True,
            resume=config.resume,
            energy=EnergyConfig(enabled=False),
            precision="fp32",  # bf16 only pays on processors with AMX
            seed=config.seed,
        )
    ).run()


if __name__ == "__main__":
    main()
