"""What ends a run before its last step.

SIGTERM, SIGINT and SIGHUP (a dropped ssh connection): the step under way is finished and saved, then the run ends; a
second signal ends it at once, but for SIGHUP, of which a lost terminal sends several. Under nohup SIGHUP stays ignored.
A validation under way is broken off, as a rented machine may give half a minute; that of the last step is finished.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
from pathlib import Path
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RunStoppedError(KeyboardInterrupt):
    """A signal ended the run after its checkpoint was saved. Its text says how to go on.

    Attributes:
        exit_code: 128 + the signal's number, as shells have it: 130 of SIGINT, 143 of SIGTERM, 129 of SIGHUP.
    """

    def __init__(
        self, number: int, saved: Path, how: str = "the same command with --resume True goes on from there"
    ) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped and saved {saved}; {how}")
        self.exit_code = 128 + number


class ValidationStoppedError(Exception):
    """A validation was broken off; nothing of it counts."""


class DivergedError(ArithmeticError):
    """The policy's gradient is not finite any more; nothing was saved of it."""


class StopSignals:
    """A context manager that notes the first signal instead of dying of it. Outside the main thread it does nothing.

    Attributes:
        number: of the signal, None before one came.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.number = None
        if threading.current_thread() is threading.main_thread():
            nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            wanted = (number for number in _SIGNALS if not (nohup and number == signal.SIGHUP))
            self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _: object) -> None:
        self.number = number
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN if other == signal.SIGHUP else signal.SIG_DFL)
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # a terminal that is gone
            print(
                f"\n{name}: the step is finished and saved, then the run ends; again ends it at once", file=sys.stderr
            )
        if number == signal.SIGHUP:
            _mute()


def _mute() -> None:
    """Output to a lost terminal, or through a pipe to what ends with it, would fail and end the run before it saves."""
    with open(os.devnull, "wb") as null:
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                if not stat.S_ISREG(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                    os.dup2(null.fileno(), descriptor)
