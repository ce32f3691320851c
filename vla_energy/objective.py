"""The head's training objective: negatives, one forward of the head, losses -> `(loss, metrics)`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla_energy import losses
from vla_energy.config import EnergyConfig
from vla_energy.measures import spearman
from vla_energy.negatives import NegativeSet, build_negatives


class EnergyObjective:
    """Trains a head to give the expert's chunk the lowest energy, and the others energies that grow with distance.

    InfoNCE takes the expert against the negatives without near-positives. The listwise term keeps those, the policy's
    own chunk and the noise around it among them, and grades every chunk by its distance to the expert's: this region
    is where reranking chooses. An anchor on E^2 (`config.range.anchor_weight`) removes the null direction that both
    share, an offset that depends on the context alone.

    Args:
        head: called as `head((context, context_mask), actions (B,N,H,A)) -> (B,N)`, once a step, so that a
            DDP-wrapped head synchronises its gradients. The objective owns no parameters.
        config: uses `negatives`, `loss`, `temperature` and `range.anchor_weight`.
    """

    def __init__(self, head: nn.Module, config: EnergyConfig) -> None:
        self.head, self.config = head, config

    def __call__(
        self,
        context: Tensor,
        context_mask: Tensor,
        expert: Tensor,
        layer_actions: Tensor,
        generator: torch.Generator,
        step: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, with gradients to the head alone, and metrics as 0-d tensors without gradient.

        Args:
            context: `(B,S,D)`; detached here.
            context_mask: `(B,S)` bool, True = valid.
            expert: `(B,H,A)` normalised.
            layer_actions: `(B,L,H,A)` normalised, the policy's chunk last; detached here.
            generator: draws the negatives.
            step: optimiser step, for schedules.

        Raises:
            ValueError: the shapes do not fit together.
        """
        negatives = build_negatives(self.config.negatives, expert, layer_actions[:, -1], layer_actions, generator)
        actions = torch.cat([expert.detach().float()[:, None], negatives.chunks], 1)
        inputs, weight = (context.detach(), context_mask), self.config.loss.centre
        if weight:
            energies, centre = self.head(inputs, actions, with_centre=True)
            centre_error = (centre - actions[:, 0]).abs().mean()
        else:
            energies, centre_error = self.head(inputs, actions), actions.new_zeros(())
        loss = self._loss(energies, negatives) + weight * centre_error
        with torch.no_grad():
            return loss, {
                "energy/loss": loss.detach(),
                "energy/centre_l1": centre_error.detach(),
                **self._metrics(energies.detach(), negatives),
            }

    def _loss(self, energies: Tensor, negatives: NegativeSet) -> Tensor:
        config, temperature = self.config.loss, self.config.temperature.value
        valid = nn.functional.pad(negatives.valid, (1, 0), value=True)
        distances = nn.functional.pad(negatives.distances, (1, 0))
        weight = nn.functional.pad(negatives.weight, (1, 0), value=1.0)
        loss = self.config.range.anchor_weight * losses.anchor(energies)
        if config.info_nce:
            loss = loss + config.info_nce * losses.info_nce(energies, temperature, valid, weight)
        if config.listwise:
            graded = losses.listwise(energies, distances, temperature, config.distance_scale, weight=weight)
            loss = loss + config.listwise * graded
        if config.margin:
            loss = loss + config.margin * losses.margin(energies, config.margin_width, valid, weight)
        return loss

    def _metrics(self, energies: Tensor, negatives: NegativeSet) -> dict[str, Tensor]:
        valid, positive, others = negatives.valid, energies[:, :1], energies[:, 1:]
        negative = (others * valid).sum() / valid.sum().clamp_min(1)
        # Shares of negatives that do not beat the expert: 1, not NaN, where there is nothing to beat it.
        lost = valid & (others <= positive)
        logits = losses.logits_of(energies, self.config.temperature.value)
        metrics = {
            "positive": positive.mean(),
            "negative": negative,
            "gap": negative - positive.mean(),
            "top1": 1 - lost.any(1).float().mean(),
            "min": energies.min(),
            "max": energies.max(),
            "std": energies.std(unbiased=False),
            "logits_min": logits.min(),
            "logits_max": logits.max(),
            "masked": (~valid).sum().float(),
            "no_negatives": losses.count_no_negatives(energies, nn.functional.pad(valid, (1, 0), value=True)),
            "empty_sources": energies.new_tensor(float(len(negatives.empty))),
            "spearman": spearman(energies, nn.functional.pad(negatives.distances, (1, 0))),
        }
        for name, columns in negatives.sources.items():
            count = valid[:, columns].sum().clamp_min(1)
            metrics[f"win_rate/{name}"] = 1 - lost[:, columns].sum() / count
        if "policy_noise" in negatives.sources:
            near = slice(negatives.sources["policy"].start, negatives.sources["policy_noise"].stop)
            metrics["spearman/policy_noise"] = spearman(others[:, near], negatives.distances[:, near])
        return {f"energy/{name}": value for name, value in metrics.items()}
