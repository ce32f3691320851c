"""The host's packages imported once, for many runs of its scripts: importing takes longer than a tiny run.

`HostServer` starts this file with the host's Python. It imports what the host takes from other projects, TensorFlow
above all, and forks a process for every run; nothing is run before the fork, and the host's own modules are imported
after it, so that a run is what it would be in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "tensorflow", "tensorflow_datasets", "tensorflow_graphics.geometry.transformation", "dlimp", "torch",
    "transformers.models.llama.modeling_llama", "transformers.models.auto", "torch.utils.tensorboard",
    "timm", "peft", "accelerate", "diffusers.schedulers.scheduling_ddim", "draccus", "wandb", "json_numpy",
)  # fmt: skip
"""Left out where there is none: then a run imports, or misses, it itself."""


class HostServer:
    """Runs scripts by the host's Python, each in a fork of one process; the client's side.

    Args:
        args: `python`, `transformers` and `dlimp`, paths.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        paths = [ROOT, args.transformers.resolve() / "src", args.dlimp.resolve()]
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3",
        }  # fmt: skip
        command = [str(args.python), str(Path(__file__).resolve())]
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, checkout: Path, *commands: Sequence[str]) -> list[str]:
        """What each of the commands printed; they run side by side in `checkout`.

        Args:
            checkout: of the host; the working folder, and first on Python's path.
            commands: each a script of this folder, and its arguments.

        Raises:
            SystemExit: one failed; with the end of what it printed.
        """
        printed = []
        for command, (code, text) in zip(commands, self.attempt(checkout, *commands), strict=True):
            if code:
                sys.exit(f"error: {' '.join(map(str, command))}\n{text[-3000:]}")
            printed.append(text)
        return printed

    def attempt(self, checkout: Path, *commands: Sequence[str]) -> list[tuple[int, str]]:
        """As `run`, but exit codes and what was printed, whether the commands failed or not."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            logs = [str(Path(folder, f"{index}.txt")) for index in range(len(commands))]
            jobs = [{"command": [*map(str, one)], "log": log} for one, log in zip(commands, logs, strict=True)]
            self._process.stdin.write(json.dumps({"checkout": str(checkout.resolve()), "jobs": jobs}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            if not answer:
                sys.exit(f"error: {self._process.args} ended with {self._process.wait()}; run it to see why")
            printed = [Path(log).read_text(errors="replace") for log in logs]
        return list(zip(json.loads(answer), printed, strict=True))

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    """The host's side: a line of JSON in, the runs' exit codes out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print as they are imported is no answer
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    sys.path.insert(0, str(ROOT / "benchmarks"))
    for line in sys.stdin:
        request = json.loads(line)
        children = [_fork(request["checkout"], job) for job in request["jobs"]]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


def _fork(checkout: str, job: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(checkout)
        sys.path.insert(0, checkout)
        sys.argv = [str(ROOT / "benchmarks" / job["command"][0]), *job["command"][1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
        print(end.code if code else "", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:] == ["--quick"]:  # as the other benchmarks
        print("left out: run by host_plugin.py and host_resume.py")
    else:
        serve()
