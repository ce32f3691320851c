"""Functions run on several gloo ranks, in processes forked from one that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vla_energy.distributed import Ranks, start

Work = Callable[..., Any]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["vla_energy.finetune.trainer", "tensorflow_datasets", "tensorflow"])


class Failed(Exception):
    """A rank ended otherwise than with a result."""


def run_ranks(world: int, work: Work, folder: Path, *args: Any, left: int | None = None) -> list[Any]:
    """What `work(ranks, *args)` returns on each rank; where it raises, or is killed, the text of that instead.

    The rank `left` is killed when all others have ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [_CONTEXT.Process(target=_child, args=(rank, world, port, folder, work, args)) for rank in range(world)]
    try:
        for process in processes:
            process.start()
        for process in (process for rank, process in enumerate(processes) if rank != left):
            process.join(300)  # of a busy machine
            if process.exitcode is None:
                raise Failed(f"a rank of {world} hangs")
    finally:
        for process in processes:
            process.kill()
    found = [folder / f"{rank}.pt" for rank in range(world)]
    return [torch.load(path, weights_only=False) if path.exists() else "killed" for path in found]


def results(world: int, work: Work, folder: Path, *args: Any) -> list[Any]:
    """As `run_ranks`, where no rank may fail."""
    found = run_ranks(world, work, folder, *args)
    failed = [text for text in found if isinstance(text, str)]
    if failed:
        raise Failed("\n".join(failed))
    return found


def _child(rank: int, world: int, port: int, folder: Path, work: Work, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        with start("cpu") as ranks:
            torch.save(work(Ranks() if world == 1 else ranks, *args), folder / f"{rank}.pt")
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        torch.save(f"{type(error).__name__}: {error}", folder / f"{rank}.pt")
