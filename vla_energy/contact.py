"""How the processes of one training notice that another failed, and learn why: a word left in the store, or a beat."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import re
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from vla_energy.pulse import Pulse

logger = logging.getLogger(__name__)

_LOOK = timedelta(seconds=1)  # between two looks at who is silent, while an exchange is waited for
_WORDS = 5.0  # seconds in which the ranks that are left say so
_NOTED = 2  # looks, after which a rank notes in the store that it waits
_LONG = 300  # looks, after which a wait is told
_FOREIGN = re.compile(r"gloo|NCCL")  # in the errors of exchanges that others begin
_TORCH_ERRORS = tuple(found for name in ("DistError", "DistBackendError") if (found := getattr(dist, name, None)))
_kept: deque[Sequence[Tensor]] = deque(maxlen=8)


class RankError(RuntimeError):
    """Another process of the training has failed; the message names it and why, as far as that is known."""


class Contact:
    """One process's lines to the others: exchanges end with the cause named where another ends, or stops.

    Args:
        rank, world: this process's number, and how many there are.
        store: where ranks leave word of why they failed; None where there is none to ask.
        pulse: who of the others still works.
        control: a gloo group without a timeout of note, for what is waited for however long; None is the default group.
        closes_all: breaking off closes the default group too. NCCL's might wait for a rank that is gone.
        longest_wait: seconds in which one that lives but reads data, validates or saves must be done.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: Any = None,
        pulse: Pulse | None = None,
        control: Any = None,
        closes_all: bool = False,
        longest_wait: float = math.inf,
    ) -> None:
        self.rank, self.world, self.control = rank, world, control
        self._store, self._pulse, self._closes_all = store, pulse, closes_all
        self._longest_wait, self._exchanges = longest_wait, 0
        self._silent: list[int] = []  # ranks that have been found to be gone
        self._unfinished: list[Any] = []  # exchanges with them

    def finish(self, start: Callable[[], Any], tensors: Sequence[Tensor], patient: bool = True) -> None:
        """Starts an exchange and waits for its end.

        Args:
            start: begins it and returns the handle that is waited for.
            tensors: all that `start` hands over, to send or to fill.
            patient: looks meanwhile who else still works.

        Raises:
            RankError: it failed, or another process does nothing any more, or keeps this one waiting too long.
        """
        work = None
        self._exchanges += 1  # as all ranks count
        keep(*tensors)
        try:
            work = start()
            self._wait(work, patient)
        except _Silence as error:
            self._unfinished.append(work)  # which cannot be broken off: its end would wait for the one that is silent
            raise RankError(str(error)) from None
        except RuntimeError as error:
            work = None
            traceback.clear_frames(error.__traceback__)  # which hold the group, and so its connections
            raise RankError(f"{self._cause()} ({str(error).splitlines()[0]})") from error

    def named(self, error: BaseException) -> BaseException:
        """The error itself, or the one with the cause named where an exchange failed that is not ours (FSDP's)."""
        text = str(error)
        if type(error) not in (RuntimeError, *_TORCH_ERRORS) or not _FOREIGN.search(text):
            return error
        traceback.clear_frames(error.__traceback__)  # as in `finish`
        if self._pulse is not None and self._pulse.silent:
            self._silent = self._pulse.silent
            return RankError(f"{self._stopped()} ({text.splitlines()[0]})")
        return RankError(f"{self._cause()} ({text.splitlines()[0]})")

    def leave_word(self, error: BaseException) -> None:
        """Tells the others why this rank ends, for those that cannot be reached by `share`.

        Rank 0, in whose process the store may live, stays until those that live have read what they want of it.
        """
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):
            if not isinstance(error, RankError):
                self._store.set(f"failed/{self.rank}", words(error))
            traceback.clear_frames(error.__traceback__)
            if not self._unfinished:
                self._disconnect()
            self._store.set(f"left/{self.rank}", "")
            deadline = time.monotonic() + 3 * _WORDS
            staying = [rank for rank in range(1, self.world) if rank not in self._silent] if self.rank == 0 else []
            while any(not self._store.check([f"left/{rank}"]) for rank in staying) and time.monotonic() < deadline:
                time.sleep(0.05)

    def _disconnect(self) -> None:
        """Closes this rank's connections: who waits for it, or for one that waits for it, notices at once."""
        groups = [self.control, None] if self._closes_all else [self.control]
        self.control = None
        for group in groups:
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                dist.destroy_process_group(group)

    def _wait(self, work: Any, patient: bool) -> None:
        """For the exchange's end.

        Raises:
            _Silence: somebody does not work any more.
            RuntimeError: the exchange failed.
        """
        if self._pulse is None or not patient:
            work.wait()
            return
        beats, unanswered = self._pulse.beats, 0
        for looks in itertools.count(1):
            try:
                work.wait(_LOOK)
                return
            except RuntimeError:
                if work.is_completed():
                    raise
            seconds = looks * _LOOK.seconds
            if looks == _NOTED:
                self._note_waiting()
            if seconds >= self._longest_wait:
                raise _Silence(self._overdue(seconds))
            if looks % _LONG == 0:
                logger.warning(
                    "rank %d has waited %d s for %s, alive but at something else: data, a validation, a save, or "
                    "hanging there (py-spy dump --pid PID shows where); the last checkpoint is whole if you end it",
                    self.rank, seconds, _named(self._busy()),
                )  # fmt: skip
            unanswered = unanswered + 1 if self._pulse.beats == beats and not self._pulse.lost else 0
            beats = self._pulse.beats
            if self._pulse.silent or unanswered >= self._pulse.patience:
                self._silent = self._pulse.silent or [0]
                self._store = self._store if self._pulse.silent else None  # rank 0 keeps it, and would not answer
                raise _Silence(self._stopped())

    def _stopped(self) -> str:
        seconds = "some" if self._pulse is None else self._pulse.patience
        return f"{_named(self._silent)} gave no sign of life for {seconds} s: stopped, or its machine hangs"

    def _overdue(self, seconds: int) -> str:
        """What is told of who keeps this rank waiting; left in the store for those that began to wait later."""
        self._silent = self._busy()
        cause = (
            f"rank {self.rank} has waited {seconds} s for {_named(self._silent)}, alive but at something else: data, a "
            "validation, a save, or hanging there (--rank_wait_minutes); the last checkpoint is whole"
        )
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                self._store.set("silent", json.dumps(self._silent))
                self._store.set("cause", cause)
        return cause

    def _note_waiting(self) -> None:
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                self._store.set(f"waits/{self.rank}", str(self._exchanges))

    def _busy(self) -> list[int]:
        """The ranks that have not come to the exchange that this one waits in; none where that is not known."""
        store = self._store
        if store is None:
            return []
        mine = str(self._exchanges).encode()

        def waits(rank: int) -> bool:
            key = f"waits/{rank}"
            return rank == self.rank or (store.check([key]) and store.get(key) == mine)

        with contextlib.suppress(RuntimeError):
            return [rank for rank in range(self.world) if not waits(rank)]
        return []

    def _cause(self) -> str:
        """Why an exchange broke: what a rank left word of, or who says nothing any more."""
        unknown = "lost touch with another process; its own output says more"
        if self._store is None:
            return unknown
        others = [rank for rank in range(self.world) if rank != self.rank]
        self._disconnect()
        deadline = time.monotonic() + _WORDS
        try:
            self._store.set(f"alive/{self.rank}", "")
            while True:
                if self._store.check(["cause"]):
                    self._silent = json.loads(self._store.get("silent"))
                    return self._store.get("cause").decode()
                failed = [rank for rank in others if self._store.check([f"failed/{rank}"])]
                silent = [rank for rank in others if not self._store.check([f"alive/{rank}"]) and rank not in failed]
                if failed or not silent or time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            words = [f"rank {rank}: {self._store.get(f'failed/{rank}').decode()}" for rank in failed]
            if silent and not failed:
                words = [f"rank {rank} ended without a word: killed, or out of memory?" for rank in silent]
                self._silent = silent
            cause = "; ".join(words) or unknown
            self._store.set("silent", json.dumps(self._silent))
            self._store.set("cause", cause)
            return cause
        except RuntimeError:
            return "rank 0, which the others talk through, is gone"


def keep(*tensors: Tensor) -> None:
    """Holds what an exchange is given for the next seven exchanges.

    In older torch (2.2; mended in 2025, pull request 154976) the end of a group waits for gloo's threads and keeps the
    interpreter's lock, and one of them that drops the last reference to a tensor waits for that lock, for ever. So the
    last is here for a while: two exchanges for each of the two threads of our two groups. Those of GPUs are NCCL's.
    """
    _kept.append([tensor for tensor in tensors if not tensor.is_cuda])


class _Silence(Exception):
    """A process does nothing any more."""


def _named(ranks: list[int]) -> str:
    return f"rank {' and '.join(map(str, ranks))}" if ranks else "another rank"


def words(error: BaseException) -> str:
    """An error in one line, as ranks tell it to each other."""
    return f"{type(error).__name__}: {error}"
