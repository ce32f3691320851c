"""A real fine-tuning run as a child process, for the harnesses that kill or watch it."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from vla_energy.config import EnergyConfig
from vla_energy.finetune.config import FinetuneConfig


def config(root: Path, name: str, steps: int, save_freq: int) -> FinetuneConfig:
    """The shipped policy on the bundled demonstrations: LoRA and energy head, dropout, one row of metrics a step."""
    energy = EnergyConfig()
    energy.head.hidden_dim = 32
    return FinetuneConfig(
        run_root_dir=root, run_id_override=name, use_proprio=True, image_aug=True, batch_size=2, lora_rank=2,
        lora_dropout=0.1, max_steps=steps, save_freq=save_freq, save_latest_checkpoint_only=True, wandb_log_freq=1,
        shuffle_buffer_size=16, precision="fp32", device="cpu", energy=energy,
    )  # fmt: skip


def warm_up() -> None:
    """The imports that a run begins with, so that children forked from here need no seconds for them."""
    import torch

    import vla_energy.finetune.trainer
    from vla_energy.data import tensorflow_quiet

    tensorflow_quiet.tf()
    tensorflow_quiet.tfds()
    torch.set_num_threads(1)
    del vla_energy


def start(settings: FinetuneConfig, log: Path, allocated: Path | None = None) -> int:
    """Forks a child that does the run; its process id.

    Args:
        settings: of the run.
        log: its output is appended to it.
        allocated: gets what the child holds after each validation, a row of JSON each: see `allocations`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        from vla_energy.finetune.signals import RunStoppedError
        from vla_energy.finetune.trainer import Trainer

        try:
            trainer = Trainer(settings)
            if allocated is not None:
                _note_allocations(trainer, allocated)
            trainer.run()
            code = 0
        except RunStoppedError as error:
            code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def allocations() -> dict[str, int] | None:
    """What this process has allocated and not freed: `bytes` by malloc in all arenas, `blocks` of Python's own.

    Unlike its resident memory this has no holes in it, and no pages that the allocator keeps for later. None where the
    C library has no `mallinfo2` (glibc before 2.33, and others).
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return None
    library.mallinfo2.restype = _MallInfo
    found = library.mallinfo2()
    return {"bytes": found.uordblks + found.hblkhd, "blocks": sys.getallocatedblocks()}


def _note_allocations(trainer: Any, path: Path) -> None:
    """After each validation, at the same place of the cycle: within a step it depends on the moment."""
    validate, begun = trainer.validate, time.monotonic()

    def noted() -> Any:
        result = validate()  # which ends in a collection of garbage
        if (found := allocations()) is not None:
            with path.open("a") as file:
                row = {"step": trainer.step, "seconds": round(time.monotonic() - begun, 1)} | found
                file.write(json.dumps(row) + "\n")
        return result

    trainer.validate = noted


def exit_code(pid: int) -> int | None:
    """Of a child: negative for the signal that ended it, None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def last_step(run: Path) -> int:
    """Of the whole rows of `metrics.jsonl`; 0 without any."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65_536))
        rows = file.read().split(b"\n")[:-1]
    return int(json.loads(rows[-1])["step"]) if rows else 0
