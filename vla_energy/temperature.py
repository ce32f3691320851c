"""The temperature of `logits = -E / temperature` (report, remedy 2): fixed, adaptive or learnable.

A larger temperature shrinks logits. It helps only beside a wider energy range; the report argues the opposite.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vla_energy.config import TemperatureConfig
from vla_energy.contact import keep
from vla_energy.distributed import current


class Temperature(nn.Module):
    """The temperature by `config.mode`.

    - fixed: `value`, a Python float.
    - adaptive: `max(value, factor * std(E))` without gradient. The std (population) is over the finite valid energies
      of all ranks, so that every rank has the same temperature; each rank must call, also one without an energy.
      Above a std of `value / factor` logits have a fixed spread: scaling E up no longer sharpens p, while the gradient,
      to which the temperature is a constant, still asks for it. The anchor on E^2 has to hold the scale.
    - learnable: `exp(log_value)`, a parameter, projected into `[log(minimum), log(maximum)]` before each use. Unlike a
      clamp within the graph this leaves the gradient alive at the bound, so it can come back. CLIP (Radford et al.
      2021) clips its logit scale likewise.

    Under DDP the learnable one belongs to the head and is called within the head's forward: DDP synchronises the
    gradients of the parameters of the module it wraps, and no others. The optimiser's weight decay, if it covers
    `log_value`, pulls the temperature towards 1.

    Args:
        config: all fields are used.
        group: process group of the adaptive std; None is that of `distributed.current()`.
    """

    def __init__(self, config: TemperatureConfig, group: Any = None) -> None:
        super().__init__()
        self.config = config
        self._group = group
        if config.mode == "learnable":
            self.log_value = nn.Parameter(torch.tensor(math.log(config.value)))

    def forward(self, energies: Tensor, valid: Tensor | None = None) -> Tensor | float:
        """The temperature for these energies: a float if fixed, else a 0-d tensor of at least fp32.

        Args:
            energies: `(B,N)` or any other shape; only the adaptive mode looks at them.
            valid: bool of the same shape; None: all valid.

        Raises:
            ValueError: `valid` is not of the energies' shape.
        """
        if valid is not None and valid.shape != energies.shape:
            raise ValueError(f"valid {tuple(valid.shape)}: expected the energies' {tuple(energies.shape)}")
        if self.config.mode == "fixed":
            return self.config.value
        if self.config.mode == "adaptive":
            std = self._joint_std(energies.detach(), valid)
            value = (self.config.factor * std).clamp_min(self.config.value)
            return value.to(torch.promote_types(energies.dtype, torch.float32))
        with torch.no_grad():
            self.log_value.clamp_(math.log(self.config.minimum), math.log(self.config.maximum))
        return self.log_value.exp()

    def extra_repr(self) -> str:
        """The mode, for printing."""
        return f"mode={self.config.mode}"

    def _joint_std(self, energies: Tensor, valid: Tensor | None) -> Tensor:
        """Population std over all ranks, 0-d float64; 0 where there is no finite energy."""
        used = energies.isfinite() if valid is None else energies.isfinite() & valid
        kept = torch.where(used, energies, torch.zeros_like(energies)).double()
        # float64: squares of fp32 do not overflow in it, and the difference of two large sums keeps its digits.
        moments = torch.stack([used.sum().double(), kept.sum(), kept.square().sum()])
        if self._group is None:
            moments = current().sum(moments)
        else:
            keep(moments)
            dist.all_reduce(moments, group=self._group)
        count, total, squares = moments.unbind()
        mean = total / count.clamp_min(1)
        return (squares / count.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
