"""openvla-oft's own run_libero_eval.py on a CPU, for `host_libero.py`; run by the host's Python, from its checkout.

    python host_episodes.py TASKS REPORT --pretrained_checkpoint DIR ...

TASKS are numbers of tasks in the suite, comma-separated. The script runs as it is; from outside, the suite is cut down
to these tasks, and what the simulator is told to do is noted. REPORT gets JSON: `episodes`, each with `actions` (all
that the simulator was given, waiting steps included) and `done`; `instructions`, one a task; `counts` of the energy's
stand-in for the action head, null where the script made none.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import host_cpu

SCRIPT = "experiments/robot/libero/run_libero_eval.py"


def cut_suites(tasks: list[int]) -> list[str]:
    """Every LIBERO suite has these tasks only, in this order; their instructions, once the script has made a suite."""
    from libero.libero import benchmark

    whole, instructions = benchmark.get_benchmark_dict(), []

    def cut(name: str) -> Any:
        suite = whole[name]()
        suite.tasks = [suite.tasks[task] for task in tasks]
        suite.n_tasks = len(tasks)
        instructions[:] = [task.language for task in suite.tasks]
        return suite

    benchmark.get_benchmark_dict = lambda *_, **__: {name: lambda name=name: cut(name) for name in whole}
    return instructions


def note_episodes() -> list[dict[str, Any]]:
    """Episodes as the simulator sees them, from now on; a reset starts one."""
    from libero.libero.envs import OffScreenRenderEnv

    episodes: list[dict[str, Any]] = []
    reset, step = OffScreenRenderEnv.reset, OffScreenRenderEnv.step

    def noted_reset(self: Any) -> Any:
        episodes.append({"actions": [], "done": False})
        return reset(self)

    def noted_step(self: Any, action: Any) -> Any:
        result = step(self, action)
        episodes[-1]["actions"].append([float(value) for value in action])
        episodes[-1]["done"] = bool(result[2])
        return result

    OffScreenRenderEnv.reset, OffScreenRenderEnv.step = noted_reset, noted_step
    return episodes


def note_heads() -> list[Any]:
    """What `rerank_action_head` gives the patched script, from now on."""
    from vla_energy.hosts import openvla_oft

    heads: list[Any] = []
    original = openvla_oft.rerank_action_head

    def noted(*args: Any) -> Any:
        heads.append(original(*args))
        return heads[-1]

    openvla_oft.rerank_action_head = noted
    return heads


def main() -> None:
    """See the module's text."""
    if sys.argv[1:] == ["--quick"]:
        print("left out: run by host_libero.py")
        return
    tasks, report, *flags = sys.argv[1:]
    sys.argv = [SCRIPT, *flags]
    host_cpu.prepare()
    sys.path.insert(0, os.getcwd())
    instructions = cut_suites([int(task) for task in tasks.split(",")])
    episodes, heads = note_episodes(), note_heads()
    runpy.run_path(SCRIPT, run_name="__main__")
    counts = dict(heads[-1].counts) if heads and hasattr(heads[-1], "counts") else None
    Path(report).write_text(json.dumps({"episodes": episodes, "instructions": instructions, "counts": counts}))


if __name__ == "__main__":
    main()
