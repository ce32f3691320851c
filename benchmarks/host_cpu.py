"""openvla-oft's own scripts on a CPU, for `benchmarks/host_plugin.py`; run by the host's Python, from its checkout.

    python host_cpu.py finetune --vla_path DIR ...              its finetune.py as it is, with a CPU in a GPU's place
    python host_cpu.py evaluate CHECKPOINT UNNORM_KEY INPUTS    its get_action and deploy.py with and without reranking

INPUTS 1 is one image; 2 the wrist camera and proprioception too; film these with FiLM. `host_episodes.py` runs its
LIBERO evaluation.
Stand-ins: a process state and mixed precision whose device is the CPU, DDP without device ids, and the small vision
towers for timm that tiny checkpoints name. Nothing of the host is changed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import random
import runpy
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def prepare(rank: int = 0, world: int = 1, store: str | None = None) -> None:
    """Puts the CPU where the host expects a GPU, and fixes every seed.

    Args:
        rank, world: of this process in a gloo group.
        store: file by which the group's processes meet; None makes one for a process alone.
    """
    import accelerate
    import torch.nn.parallel

    for towers in ("tests/golden_towers.py", "vla_energy/backbones/timm_models.py"):
        register(Path(__file__).parents[1] / towers)

    class CpuState:
        """The part of accelerate's PartialState that the host reads."""

        local_process_index, is_main_process = "cpu", rank == 0

    class CpuDDP(torch.nn.parallel.DistributedDataParallel):
        """DDP without device ids, which a CPU has not."""

        def __init__(self, module: torch.nn.Module, device_ids: Any = None, **options: Any) -> None:
            super().__init__(module, **options)

    class CpuAutocast(torch.autocast):
        """Mixed precision on the CPU, where the host asks for a GPU's: its proprio projector is fp32, not bf16."""

        def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
            super().__init__("cpu", *args, **options)

    torch.autocast = CpuAutocast  # type: ignore[misc]
    accelerate.PartialState = CpuState  # type: ignore[misc,assignment]
    torch.nn.parallel.DistributedDataParallel = CpuDDP  # type: ignore[misc]
    torch.cuda.set_device = lambda *args: None
    torch.cuda.empty_cache = lambda: None
    torch.set_num_threads(1)
    store = store or str(Path(tempfile.mkdtemp()) / "store")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    import tensorflow

    tensorflow.random.set_seed(0)  # of the host's order of frames
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def register(path: Path) -> None:
    """A module's `register()`, by its file: the package around it may need more than the host has."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # timm looks a tower's module up
    spec.loader.exec_module(module)
    module.register()


def evaluate(checkpoint: str, unnorm_key: str, inputs: str) -> dict[str, Any]:
    """What the host's `get_action` answers: without the energy, with its gate shut, and with it open."""
    from experiments.robot.openvla_utils import (  # pyright: ignore[reportMissingImports]
        get_action_head,
        get_processor,
        get_proprio_projector,
    )
    from experiments.robot.robot_utils import get_action, get_model  # pyright: ignore[reportMissingImports]

    from vla_energy.gates import save_gates
    from vla_energy.hosts.openvla_oft import HostRerankConfig, rerank_action_head

    cfg = SimpleNamespace(
        model_family="openvla", pretrained_checkpoint=checkpoint, unnorm_key=unnorm_key, use_l1_regression=True,
        use_diffusion=False, use_film=inputs == "film", num_images_in_input=1 if inputs == "1" else 2,
        use_proprio=inputs != "1",
        center_crop=True, load_in_8bit=False, load_in_4bit=False, lora_rank=4, energy=HostRerankConfig(),
    )  # fmt: skip
    vla, processor = get_model(cfg), get_processor(cfg)
    head = get_action_head(cfg, vla.llm_dim)
    projector = get_proprio_projector(cfg, vla.llm_dim, proprio_dim=8) if cfg.use_proprio else None
    seen = pickle.loads(Path("experiments/robot/libero/sample_libero_spatial_observation.pkl").read_bytes())

    def act(action_head: Any) -> list[list[float]]:
        actions = get_action(
            cfg, vla, dict(seen), seen["task_description"], processor, action_head, projector, use_film=cfg.use_film
        )
        return [np.asarray(action, np.float64).tolist() for action in actions]

    answers: dict[str, Any] = {"off_is_the_head": rerank_action_head(head, cfg, vla) is head, "plain": act(head)}
    cfg.energy = HostRerankConfig(enabled=True)
    for seed in range(20):  # until a head prefers another chunk here
        _randomize(checkpoint, seed)
        save_gates(checkpoint, {"rerank": 0.0})
        chosen = rerank_action_head(head, cfg, vla)
        act(chosen)
        if chosen.counts["accepted"]:
            break
    for name, margin in (("shut", float("inf")), ("open", 0.0)):
        save_gates(checkpoint, {"rerank": margin, "refine": margin})
        for mode in ("rerank", "refine"):
            cfg.energy = HostRerankConfig(enabled=True, mode=mode)
            chosen, normalised = rerank_action_head(head, cfg, vla), []
            predict = chosen.predict_action
            chosen.predict_action = lambda states, predict=predict, kept=normalised: (
                kept.append(predict(states)) or kept[-1]
            )
            answers[f"{mode} {name}"] = act(chosen)
            answers[f"{mode} {name} normalised"] = normalised[0][0].double().tolist()
            answers[f"{mode} {name} accepted"] = chosen.counts["accepted"]
    for name, instruction in (("this", seen["task_description"]), ("another", "do something else")):
        save_gates(checkpoint, {"rerank": 0.0}, {instruction: "rerank"})
        cfg.energy = HostRerankConfig(enabled=True, mode="recommended")
        answers[f"recommended for {name}"] = act(rerank_action_head(head, cfg, vla))
    answers["scored"] = _energies(checkpoint, vla, lambda: act(head))
    answers["deploy"] = _deployed(cfg, checkpoint, {**seen, "instruction": seen["task_description"]})
    _unround(checkpoint, {"action_head": head, "proprio_projector": projector}, vla)
    answers["scored in fp32"] = _energies(checkpoint, vla, lambda: act(head))
    return answers


def _deployed(cfg: Any, checkpoint: str, payload: dict[str, Any]) -> dict[str, Any]:
    """What the host's deploy.py answers to a client: without the energy, with its gate shut, and with it open."""
    import json_numpy  # pyright: ignore[reportMissingImports]

    from vla_energy.gates import save_gates
    from vla_energy.hosts.openvla_oft import HostRerankConfig

    server, answers = runpy.run_path("vla-scripts/deploy.py", run_name="deploy")["OpenVLAServer"], {}
    for name, margin in (("off", None), ("shut", float("inf")), ("open", 0.0)):
        cfg.energy = HostRerankConfig(enabled=margin is not None)
        if margin is not None:
            save_gates(checkpoint, {"rerank": margin})
        reply = server(cfg).get_server_action(dict(payload))
        if reply == "error":  # the host's answer to whatever goes wrong; it has logged what
            sys.exit(f"deploy.py, {name}: error")
        answers[name] = [np.asarray(action, np.float64).tolist() for action in json_numpy.loads(reply.body)]
    return answers


def _randomize(checkpoint: str, seed: int) -> None:
    """Random weights in the head's file: after three steps no candidate is below the policy's chunk yet."""
    from vla_energy.checkpoint import find_one, load_head, save_head

    loaded = load_head(checkpoint)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.head.parameters():
            parameter.normal_(0, 0.3)
    save_head(find_one(checkpoint, "energy_head--"), loaded.head, loaded.step, loaded.statistics)


def _unround(checkpoint: str, components: dict[str, Any], vla: Any) -> None:
    """fp32 in place of the bf16 in which the host evaluates, and of what it rounded when it loaded the files."""
    from experiments.robot.openvla_utils import (  # pyright: ignore[reportMissingImports]
        find_checkpoint_file,
        load_component_state_dict,
    )

    vla.float()
    for name, module in {**components, "vision_backbone": vla.vision_backbone}.items():
        if module is not None and list(Path(checkpoint).glob(f"{name}--*")):
            module.float().load_state_dict(load_component_state_dict(find_checkpoint_file(checkpoint, name)))


def _energies(checkpoint: str, vla: Any, act: Any) -> dict[str, Any]:
    """The head's energies of fixed chunks in the context of one observation, and what the model was given of it."""
    from vla_energy.checkpoint import load_head
    from vla_energy.hosts.hidden_states import HiddenStates, predicted_positions, visible_context

    hidden, given, predict = HiddenStates(vla), {}, vla.predict_action
    dtype = next(vla.parameters()).dtype

    def noted(**inputs: Any) -> Any:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        given.update(inputs)
        return predict(**inputs)

    vla.predict_action = noted
    act()
    del vla.predict_action
    context = hidden.take()[-1].float()
    hidden.remove()
    head = load_head(checkpoint).head.eval()
    positions = predicted_positions(1, context.shape[1], head.horizon * head.action_dim)
    mask = visible_context(positions, context.shape[1])
    chunks = torch.rand(1, 5, head.horizon, head.action_dim, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        energies = head(head.encode(context, mask, chunks[:, 0]), chunks)
    tensors = {
        "context": context,
        "mask": mask,
        "chunks": chunks,
        "energies": energies,
        **{name: given[name] for name in ("pixel_values", "input_ids", "attention_mask")},
    }
    if given.get("proprio") is not None:
        tensors["proprio"] = torch.as_tensor(np.asarray(given["proprio"])).reshape(1, -1)
    return {
        name: value.float().tolist() if value.is_floating_point() else value.tolist() for name, value in tensors.items()
    }


def main() -> None:
    """See the module's text."""
    if sys.argv[1:] == ["--quick"]:
        print("left out: run by host_plugin.py")
        return
    what, *rest = sys.argv[1:]
    prepare()
    sys.path.insert(0, os.getcwd())
    if what == "evaluate":
        print("ANSWERS " + json.dumps(evaluate(*rest)))
        return
    script = "vla-scripts/finetune.py"
    sys.argv = [script, *rest]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
