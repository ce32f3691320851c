"""Fine-tunes an OpenVLA(-OFT) checkpoint with an energy head. With no arguments: the tiny one that ships with us.

python scripts/finetune_energy.py --vla_path DIR --data_root_dir DIR --dataset_name libero_spatial_no_noops
"""

import logging
import sys

import draccus

from vla_energy.checkpoint import CheckpointError
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.trainer import Trainer


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = draccus.parse(FinetuneConfig)
    try:
        Trainer(config).run()
    except (ValueError, CheckpointError, ImportError) as error:
        if "VLA_ENERGY_TRACEBACK" in __import__("os").environ:
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
