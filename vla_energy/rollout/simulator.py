"""A simulated world in a process of its own, driven by chunks.

The renderer tolerates neither a second renderer nor TensorFlow in its process, so the world lives in a
fresh interpreter that imports nothing of the parent's: not torch, not the parent's `__main__` (which is why
this is no `multiprocessing.Process`). Requests and answers go through a pipe; the image is rendered once a
chunk, since drawing costs forty times a physics step; before every step if the episode is recorded.

What a backend must offer is in `world`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from vla_energy.data.metaworld_env import SimulatorError
from vla_energy.rollout.world import BackendInfo, Execution, Observation

BACKENDS = {
    "metaworld": "vla_energy.data.metaworld_env:MetaWorld",
    "libero": "vla_energy.data.libero_env:Libero",
}
"""Where each backend's `World` class is; `module:Class` is also accepted wherever a backend is named."""
FIXED_STATES = {"libero": 50}
"""Evaluation episodes a task, where a backend has a fixed number of initial states instead of a seed's."""
TIMEOUT = 120.0
"""Seconds to wait for an answer; the first includes starting Python and building the world."""

_OUTPUT_LINES = 5
_CLOSE_SECONDS = 5.0
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from vla_energy.rollout.world import serve; serve(int(sys.argv[2]), sys.argv[3], sys.argv[4])"
)


class SimulatorProcess:
    """Client of one world. A context manager; the process ends with it, or with the parent.

    `request_reset` and `request_execute` return at once, so that several worlds work at a time; each is followed
    by one `answer()`. `reset` and `execute` do both.

    Args:
        task: a task of the backend.
        backend: a name in `BACKENDS`, or `module:Class`.
        timeout: seconds to wait for an answer.

    Raises:
        ValueError: unknown backend. Wrong tasks are reported by the first answer, as SimulatorError.
    """

    def __init__(self, task: str, backend: str = "metaworld", timeout: float = TIMEOUT) -> None:
        self.task = task
        self._timeout = timeout
        self._request = ""
        # What the simulator prints: kept off stdout, quoted if it dies; `close` closes it.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._pipe, theirs = multiprocessing.Pipe()
        arguments = [json.dumps([path or os.getcwd() for path in sys.path]), str(theirs.fileno()), task]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, *arguments, _resolve(backend)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> SimulatorProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; harmless if it already ended."""
        self._pipe.close()  # the child leaves when it finds the pipe closed
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def reset(self, seed: int) -> Observation:
        """Starts the episode of `seed`.

        Raises:
            SimulatorError: the world failed (its own message), died, or did not answer in time.
        """
        self.request_reset(seed)
        return self.answer()

    def execute(self, actions: np.ndarray, observe: bool = True, record: bool = False) -> Execution:
        """Executes `actions (n, A)` in the robot's units until solved, then renders once if `observe`.

        Args:
            actions: in the robot's units.
            observe: give what is seen afterwards, unless solved.
            record: give also what is seen before each action.

        Raises:
            ValueError: actions are not (n >= 1, A) or not finite.
            SimulatorError: as in `reset`.
        """
        self.request_execute(actions, observe, record)
        return self.answer()

    def request_reset(self, seed: int) -> None:
        """As `reset`, without waiting."""
        self._send("reset", seed)

    def request_execute(self, actions: np.ndarray, observe: bool = True, record: bool = False) -> None:
        """As `execute`, without waiting."""
        actions = np.asarray(actions, np.float64)
        if actions.ndim != 2 or not len(actions) or not np.isfinite(actions).all():
            raise ValueError(f"{self.task}: expected finite actions (n, A), got shape {actions.shape}: {actions}")
        self._send("execute", actions, observe, record)

    def answer(self) -> Any:
        """Waits for the outcome of the last request: an Observation after a reset, else an Execution.

        Raises:
            SimulatorError: as in `reset`.
        """
        try:
            if not self._pipe.poll(self._timeout):
                self._process.kill()
                raise SimulatorError(f"{self.task}: no answer to {self._request} in {self._timeout:g} s; ended it")
            good, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if not good:
            message, trace = value
            raise SimulatorError(f"{self.task}: {message}") from _ChildError(trace)
        return value

    def _send(self, name: str, *arguments: Any) -> None:
        self._request = name
        try:
            self._pipe.send((name, arguments))
        except OSError as error:
            raise self._death() from error

    def _death(self) -> SimulatorError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()[-_OUTPUT_LINES:]
        output = "; its last output: " + " | ".join(lines) if lines else ""
        return SimulatorError(f"{self.task}: the simulator process ended ({how}) during {self._request}{output}")


@functools.cache
def backend_info(backend: str) -> BackendInfo:
    """Asks a backend, in a process of its own, for its tasks and dimensions.

    Raises:
        ValueError: unknown backend.
        SimulatorError: the simulator is not installed, or its process died.
    """
    with SimulatorProcess(backend, backend) as process:
        process._send("info")
        return process.answer()


def expand_tasks(names: list[str], backend: str = "metaworld") -> list[str]:
    """Task names, each suite's name replaced by the suite's tasks; the order is kept.

    Raises:
        ValueError: unknown names, listing the known ones; or a task that comes twice, itself or in a suite.
        SimulatorError: as `backend_info`.
    """
    info = backend_info(backend)
    unknown = [name for name in names if name not in info.tasks and name not in info.suites]
    if unknown:
        known = ", ".join((*info.suites, *info.tasks))
        raise ValueError(f"unknown {backend} task(s): {', '.join(unknown)}; known: {known}")
    tasks = [task for name in names for task in info.suites.get(name, (name,))]
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise ValueError(f"task(s) given twice, themselves or in a suite: {', '.join(twice)}")
    return tasks


class _ChildError(Exception):
    """Carries the child's traceback as the cause of the error raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _resolve(backend: str) -> str:
    target = BACKENDS.get(backend, backend)
    if ":" not in target:
        raise ValueError(f"unknown simulator {backend!r}; known: {', '.join(BACKENDS)}, or module:Class")
    return target
