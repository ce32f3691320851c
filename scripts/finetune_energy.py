"""Fine-tunes an OpenVLA(-OFT) checkpoint with an energy head. With no arguments: the tiny one that ships with us.

For example:
  python scripts/finetune_energy.py --config_path configs/demo.yaml --run_id_override mine     (three minutes)
  python scripts/finetune_energy.py --vla_path DIR --data_root_dir DIR --dataset_name libero_spatial_no_noops
  torchrun --standalone --nproc-per-node 8 scripts/finetune_energy.py ...     (see docs/scaling.md)

docs/config-reference.md has every flag in a table.
"""

import contextlib
import io
import logging
import os
import sys

import draccus

from vla_energy.distributed import RankError, start
from vla_energy.finetune.config import FinetuneConfig
from vla_energy.finetune.flags import parse_flags
from vla_energy.finetune.signals import DivergedError, RunStoppedError
from vla_energy.finetune.trackers import wanted_trackers


def _known_fields(name: str) -> str:
    """The fields of one of our config classes: draccus tells a wrong one in a file, but not which there are."""
    import dataclasses

    import vla_energy.config as parts

    cls = getattr(parts, name.strip("`'."), FinetuneConfig)
    return "known: " + ", ".join(field.name for field in dataclasses.fields(cls))


def _flags() -> FinetuneConfig:
    """The command line's. A wrong flag is told in one line: argparse's usage before it is 158 lines long."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__, flush=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = parse_flags()
    except SystemExit as ended:
        if ended.code:
            _, _, what = said.getvalue().rpartition("error: ")
            what = what.strip().replace("unrecognized arguments:", "unknown flag or value:")
            print(f"error: {what} (--help and docs/config-reference.md list the flags)", file=sys.stderr)
        raise
    sys.stderr.write(said.getvalue())
    return config


def main() -> None:
    rank = os.environ.get("RANK", "0")
    level = logging.INFO if rank == "0" else logging.ERROR  # the others would say the same
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        config = _flags()
        config.check()
        if rank == "0":  # which alone shows metrics; a missing tracker is told before policy and data are loaded
            wanted_trackers(config, {})
        from vla_energy.finetune.trainer import Trainer  # seconds of imports, so only with flags that can work

        with start(config.device, config.longest_wait) as ranks:
            Trainer(config, ranks).run()
    except RunStoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command with --resume True goes on from the last checkpoint")
    except (ValueError, OSError, ImportError, RankError, DivergedError, draccus.ParsingError) as error:
        if os.environ.get("VLA_ENERGY_TRACEBACK"):
            raise
        # draccus says where, the cause says why: our own messages name the values that are known.
        why = f" ({error.__cause__})" if isinstance(error, draccus.ParsingError) and error.__cause__ else ""
        if "are not valid for" in str(error):
            why += f"; {_known_fields(str(error).split()[-1])}"
        which = f" on rank {rank}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        sys.exit(f"error{which}: {error}{why}\nVLA_ENERGY_TRACEBACK=1 shows where it was raised")


if __name__ == "__main__":
    main()
