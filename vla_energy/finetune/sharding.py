"""FSDP2 of the policy: each rank keeps its part of every decoder layer, of its gradients and of its optimiser states.

Only the language model's decoder layers are sharded: they hold nearly all weights, and everything else of the policy is
called piece by piece, which FSDP's hooks do not follow. Shards and gradients are fp32, so a step is the replicated
one's up to rounding; with bf16 the gathered weights are, as autocast would make them, and go after the layer's forward
(autocast's own copies would stay until the backward pass). Rank 0 validates and saves alone: the others lend it their
shards before, see `whole` and `gathered`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from vla_energy.backbones.openvla import OpenVLA
from vla_energy.distributed import Ranks
from vla_energy.finetune.config import FlagError


def shard(vla: OpenVLA, ranks: Ranks, precision: str) -> None:
    """Shards the decoder layers over the ranks, in place; their parameters become DTensors.

    Args:
        vla: on the rank's device, equal on all ranks, LoRA added.
        ranks: several.
        precision: "bf16" or "fp32", of the weights while a layer uses them.

    Raises:
        FlagError: there is one process, or this torch has no FSDP2.
    """
    if ranks.world == 1:
        raise FlagError(
            "--fsdp True needs several processes, as torchrun starts them (docs/scaling.md); leave it out with one"
        )
    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    except ImportError as error:
        raise FlagError(f"--fsdp True needs torch 2.6 or newer, this is {torch.__version__}") from error
    device = next(vla.parameters()).device.type
    mesh = init_device_mesh(device, (ranks.world,))
    gathered = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(gathered, None if gathered is None else torch.float32, cast_forward_inputs=False)
    for layer in vla.backbone.language_model.model.layers:
        sharded = fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        if device == "cpu":
            _sum_only(sharded)


def _sum_only(layer: Any) -> None:
    """For gloo, which knows no mean."""
    if not hasattr(layer, "set_force_sum_reduction_for_comms"):
        raise FlagError(f"--fsdp True on CPUs needs a newer torch than {torch.__version__}; on GPUs it works with this")
    layer.set_force_sum_reduction_for_comms(True)


def sharded_layers(vla: nn.Module) -> list[Any]:
    """The modules that `shard` has sharded."""
    return [module for module in vla.modules() if hasattr(module, "set_reshard_after_forward")]


def is_shard(tensor: Tensor) -> bool:
    """Whether a parameter, gradient or state is this rank's part of one."""
    return hasattr(tensor, "full_tensor")


@contextlib.contextmanager
def whole(vla: nn.Module) -> Iterator[None]:
    """Within it every rank holds the layers as its forward needs them, so that one may run the policy alone.

    All ranks enter it. What is written to the weights within it is lost.
    """
    layers = sharded_layers(vla)
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()


@contextlib.contextmanager
def gathered(vla: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Within it rank 0's policy has whole weights on the CPU, fp32, to be saved and not run; all ranks enter it."""
    sharded: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for module in (module for layer in sharded_layers(vla) for module in layer.modules()):
            for name, parameter in module._parameters.items():
                if parameter is not None and is_shard(parameter):
                    full = parameter.detach().full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
                    if ranks.is_main:
                        sharded.append((module, name, parameter))
                        module._parameters[name] = nn.Parameter(full.cpu(), parameter.requires_grad)
        yield
    finally:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def write(parameter: Tensor, value: Tensor) -> None:
    """Copies a whole `value`, equal on all ranks, into a parameter that may be a shard."""
    parameter.copy_(_like(parameter, value))


def sharded_norm(gradients: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """`()`: the norm of whole and sharded gradients together; all ranks call it, their whole gradients being equal."""
    local = [gradient.to_local() if is_shard(gradient) else gradient for gradient in gradients]  # pyright: ignore
    squares = [part.float().square().sum() for part in local]
    zero = torch.zeros((), device=local[0].device)
    apart = sum((square for square, grad in zip(squares, gradients, strict=True) if is_shard(grad)), zero)
    own = sum((square for square, grad in zip(squares, gradients, strict=True) if not is_shard(grad)), zero)
    return (own + ranks.sum(apart)).sqrt()


def optimizer_state(optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any]:
    """The optimiser's state with whole tensors, on the CPU of rank 0 where they were sharded; all ranks call it."""

    def gather(value: Tensor) -> Tensor:
        full = value.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
        return full.cpu() if ranks.is_main else full.new_empty(0)

    state = optimizer.state_dict()
    return {**state, "state": _mapped(state["state"], lambda _, value: gather(value) if is_shard(value) else value)}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes over a state of whole tensors, whether it was saved sharded or not; all ranks call it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    how = [{key: group[key] for key in ("fused", "foreach")} for group in optimizer.param_groups]

    def place(index: int, value: Tensor) -> Tensor:
        return _like(parameters[index], value) if value.dim() else value

    optimizer.load_state_dict({**state, "state": _mapped(state["state"], place)})
    for group, own in zip(optimizer.param_groups, how, strict=True):
        group.update(own)


def _mapped(state: dict[int, dict[str, Any]], change: Callable[[int, Tensor], Tensor]) -> dict[int, dict[str, Any]]:
    return {
        index: {key: change(index, value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for index, entry in state.items()
    }


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    if not is_shard(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # pyright: ignore[reportAttributeAccessIssue]
    return distribute_tensor(value.to(parameter.device, parameter.dtype), mesh, placements)
