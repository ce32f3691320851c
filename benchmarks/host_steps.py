"""openvla-oft's finetune.py on a CPU over chosen batches, for `host_resume.py`; run by the host's Python.

    python host_steps.py JOB.json --vla_path DIR ...

JOB.json has `rank`, `world` and `store` (a path) of a gloo group; `skip`, batches left out at the start; `restore`, a
file of an earlier run's `note`, or null; `note`, where this run's state goes. Every global batch is cut into one part a
rank, so that one rank and two see the same rows. `restore` puts back what the host's own resume drops: trainable
weights as they are, unmerged, and the optimiser.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import host_cpu
import torch


def batches(job: dict[str, Any], rows: Iterable[Any], batch_size: int, collate_fn: Any) -> Iterator[Any]:
    """This rank's part of every global batch, in the order in which the host's dataset gives its rows."""
    source, first = iter(rows), job["rank"] * batch_size
    for index in count():
        batch = list(islice(source, batch_size * job["world"]))
        if index >= job["skip"]:
            yield collate_fn(batch[first : first + batch_size])


def state(plugin: Any, optimizer: torch.optim.Optimizer, action_head: Any) -> dict[str, Any]:
    """All that a run has learnt: the policy's trainable weights, the head's, and both optimisers."""
    head = plugin.head is not None
    return {
        "policy": {str(index): value for index, value in enumerate(_parameters(optimizer))},
        "policy's optimiser": optimizer.state_dict(),
        "action head": action_head.state_dict(),
        "head": plugin._bare.state_dict() if head else {},
        "head's optimiser": plugin.guard.state_dict() if head else {},
    }


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]


def main() -> None:
    """See the module's text."""
    if sys.argv[1:] == ["--quick"]:
        print("left out: run by host_resume.py")
        return
    job = json.loads(Path(sys.argv[1]).read_text())
    host_cpu.prepare(job["rank"], job["world"], job["store"])
    sys.path.insert(0, str(Path.cwd()))
    import torch.utils.data

    from vla_energy.hosts import openvla_oft

    kept: list[Any] = []

    class NotedPlugin(openvla_oft.EnergyPlugin):
        """The plugin, remembered; what `restore` names is put back as it attaches."""

        @classmethod
        def attach_here(cls, host: Any, names: Any) -> Any:
            plugin = super().attach_here(host, names)
            kept[:] = [plugin, names["optimizer"], names["action_head"]]
            if job["restore"]:
                saved = torch.load(job["restore"], weights_only=True)
                with torch.no_grad():
                    for one, value in zip(_parameters(kept[1]), saved["policy"].values(), strict=True):
                        one.copy_(value)
                kept[1].load_state_dict(saved["policy's optimiser"])
            return plugin

    openvla_oft.EnergyPlugin = NotedPlugin  # type: ignore[misc]
    torch.utils.data.DataLoader = (  # type: ignore[misc,assignment]
        lambda rows, batch_size, collate_fn, **_: batches(job, rows, batch_size, collate_fn)
    )
    script = "vla-scripts/finetune.py"
    sys.argv = [script, *sys.argv[2:]]
    runpy.run_path(script, run_name="__main__")
    torch.save(state(*kept), job["note"])


if __name__ == "__main__":
    main()
