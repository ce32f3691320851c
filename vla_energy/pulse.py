"""Signs of life: how the processes of one training know that another is there, but does nothing any more."""

from __future__ import annotations

import threading
from typing import Any

BEAT = 1.0  # seconds between two signs of life
SILENCE = 30  # beats without one, after which a process counts as stopped


class Pulse:
    """A thread that leaves a sign of life in the store every `BEAT` seconds and counts how long the others left none.

    It goes on while the main thread reads data, validates or saves: torch, safetensors and TensorFlow let go of the
    interpreter meanwhile. Beats are counted and not seconds, so that a process that was itself stopped, and goes on,
    suspects nobody.

    Args:
        store: a `torch.distributed` store that no other thread waits in.
        rank, world: this process's number, and how many there are.

    Attributes:
        patience: beats without a sign, after which a process counts as stopped.
        silent: ranks that were heard once, and have left no sign for `patience` of this process's own beats.
        beats: how often this thread has looked; it stands still while the store does not answer.
        lost: the store is gone.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self._rank = store, rank
        self._seen: dict[int, bytes] = {}
        self._quiet = {other: 0 for other in range(world) if other != rank}
        self.silent: list[int] = []
        self.patience = SILENCE
        self.beats, self.lost = 0, False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """No more signs; does not wait for a store that does not answer."""
        self._ended.set()
        self._thread.join(BEAT)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._beat()
            except RuntimeError:
                self.lost = True
                return
            self._ended.wait(BEAT)

    def _beat(self) -> None:
        self._store.set(f"beat/{self._rank}", str(self.beats))
        for other in self._quiet:
            if other not in self._seen and not self._store.check([f"beat/{other}"]):
                continue
            sign = self._store.get(f"beat/{other}")
            self._quiet[other] = 0 if self._seen.get(other) != sign else self._quiet[other] + 1
            self._seen[other] = sign
        self.silent = [other for other, quiet in self._quiet.items() if quiet >= self.patience]
        self.beats += 1
