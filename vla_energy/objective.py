"""The head's training objective: schedule, negatives, one forward of the head, losses -> `(loss, metrics)`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vla_energy import losses
from vla_energy.config import EnergyConfig, checks
from vla_energy.distributed import ALONE, Ranks
from vla_energy.head import HeadOutput
from vla_energy.landscape import descent_alignment
from vla_energy.measures import success_auc
from vla_energy.outcomes import RolloutFrames, failed_chunks, gather_chunks, join_contexts
from vla_energy.sources import ActionTraits, NegativeSet, add_failed, build_negatives
from vla_energy.training_metrics import energy_metrics


class EnergyObjective:
    """Trains a head to give the expert's chunk the lowest energy, and the others energies that grow with distance.

    InfoNCE takes the expert against the negatives without near-positives. The listwise term keeps those, the policy's
    own chunk and the noise around it among them, and grades every chunk by its distance to the expert's: this region
    is where reranking chooses. An anchor on E^2 (`config.range.anchor_weight`) removes the null direction that both
    share, an offset that depends on the context alone.

    With recorded rollouts (`config.rollouts`) the energies of executed chunks predict success, and chunks of failed
    episodes are negatives of demonstrations. Their contexts join the demonstrations' in the same call of the head.

    Args:
        head: called as `head((context, context_mask, reference), actions (B,N,H,A), training_output=True)`, with
            `executed` where there are rollouts, once a step, so that a DDP-wrapped head synchronises its gradients.
            The objective owns no parameters.
        config: uses `negatives`, `loss`, `range`, `head` and `rollouts`.
        traits: of the action space, for sources that scale or flip its dimensions.
        ranks: of a training on several processes. Each calls with its own B rows; negatives, losses and metrics are
            those of all ranks' rows, the same on every rank, with the gradient that the head's gradients, averaged
            over the ranks, need (see `Ranks.gather_with_gradient`). Chunks are gathered without gradient and contexts
            not at all. `generator` must be in the same state on every rank.
    """

    def __init__(
        self, head: Any, config: EnergyConfig, traits: ActionTraits | None = None, ranks: Ranks = ALONE
    ) -> None:
        self.head, self.config, self.traits, self.ranks = head, config, traits, ranks

    def __call__(
        self,
        context: Tensor,
        context_mask: Tensor,
        expert: Tensor,
        layer_actions: Tensor,
        generator: torch.Generator,
        step: int = 0,
        retrieved: Tensor | None = None,
        rollouts: RolloutFrames | None = None,
        samples: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, with gradients to the head alone, and metrics as 0-d tensors without gradient.

        Args:
            context: `(B,S,D)`; detached here.
            context_mask: `(B,S)` bool, True = valid.
            expert: `(B,H,A)` normalised.
            layer_actions: `(B,L,H,A)` normalised, the policy's chunk last (L = 1 for a policy without layer exits);
                detached here.
            generator: draws the negatives, and the rows that get no reference.
            step: optimiser step, for schedules.
            retrieved: `(B,K,H,A)` chunks of remembered contexts, where `negatives.retrieved` is on.
            rollouts: frames of recorded rollouts, where `config.rollouts` is on; detached here.
            samples: `(B,K,H,A)` more samples of the policy, where `negatives.samples` is on.

        Raises:
            ValueError: the shapes do not fit together, or rollouts are on and not given, or given and off.
        """
        if (rollouts is not None) != bool(self.config.rollouts.dataset):
            given = "no frames of rollouts are given" if rollouts is None else "frames of rollouts are given"
            raise ValueError(f"rollouts.dataset={self.config.rollouts.dataset!r}, but {given}")
        ranks = self.ranks
        expert, layer_actions = ranks.gather(expert), ranks.gather(layer_actions)
        retrieved, samples = (None if more is None else ranks.gather(more) for more in (retrieved, samples))
        policy = layer_actions[:, -1].detach().float()
        inputs = (context.detach(), context_mask, ranks.own(self._reference(policy, generator)))
        negatives = build_negatives(
            self.config.negatives,
            expert,
            policy,
            layer_actions,
            generator,
            self.traits,
            energy_fn=lambda chunks: ranks.gather(getattr(self.head, "module", self.head)(inputs, ranks.own(chunks))),
            retrieved=retrieved,
            samples=samples,
        )
        theirs = None if rollouts is None else gather_chunks(rollouts, ranks)
        if theirs is not None and self.config.rollouts.failed:
            failed = failed_chunks(theirs, policy, self.config.rollouts.failed)
            negatives = add_failed(negatives, *failed, expert, self.config.negatives.near_positive_threshold)
        chunks = torch.cat([expert.detach().float()[:, None], negatives.chunks], 1)
        output = self._gather(self._call_head(inputs, ranks.own(chunks), rollouts))
        centre_errors: list[Tensor] = [(centre - chunks[:, 0]).abs().mean() for centre in output.centres]
        loss, parts = self._ranking_loss(output, negatives, chunks, step)
        if self.config.loss.centre:
            loss = loss + self.config.loss.centre * sum(centre_errors)
        if theirs is not None and output.executed is not None and output.outcome_bias is not None:
            parts |= self._outcome(output.executed, output.outcome_bias, output.temperature, theirs)
            loss = loss + self.config.rollouts.outcome * parts["outcome"]
        with torch.no_grad():
            parts |= {"loss": loss, **{f"centre_l1_{i}": error for i, error in enumerate(centre_errors)}}
            metrics = {f"energy/{name}": torch.as_tensor(value).detach() for name, value in parts.items()}
            return loss, metrics | energy_metrics(output, negatives, self.config)

    def alignment(self, context: Tensor, context_mask: Tensor, expert: Tensor, layer_actions: Tensor) -> Tensor:
        """Mean over rows of cos(-dE/da, expert - a) at the policy's chunk, gradients of the head untouched; 0-d."""
        head, policy = getattr(self.head, "module", self.head), layer_actions[:, -1].detach().float()
        training = head.training
        head.train(False)
        try:
            encoded = head.encode(context.detach(), context_mask, policy)
            own = descent_alignment(lambda chunks: head(encoded, chunks), policy[:, None], expert).mean()
            return self.ranks.mean(own)
        finally:
            head.train(training)

    def _reference(self, policy: Tensor, generator: torch.Generator) -> Tensor:
        """The policy's chunk, but NaN (none) in a share of the rows: the head must also work where it is not given."""
        drawn = torch.rand(len(policy), generator=generator, device=generator.device).to(policy)
        return policy.masked_fill((drawn < self.config.head.blind_share)[:, None, None], math.nan)

    def _call_head(
        self, inputs: tuple[Tensor, Tensor, Tensor], chunks: Tensor, rollouts: RolloutFrames | None
    ) -> HeadOutput:
        """One call for demonstrations and rollouts. Rollouts keep their reference: it is there where a head is used."""
        if rollouts is None or not self.config.rollouts.learns_outcome:
            return self.head(inputs, chunks, training_output=True)
        theirs = (rollouts.context.detach(), rollouts.context_mask, rollouts.policy.detach().float())
        return self.head(join_contexts(inputs, theirs), chunks, training_output=True, executed=rollouts.executed)

    def _gather(self, output: HeadOutput) -> HeadOutput:
        """All ranks' rows. Temperature and bias are the same on every rank, and so is their gradient."""
        gather = self.ranks.gather_with_gradient
        return output._replace(
            energies=gather(output.energies),
            centres=tuple(gather(centre) for centre in output.centres),
            executed=None if output.executed is None else gather(output.executed),
        )

    def _outcome(
        self, energies: Tensor, bias: Tensor, temperature: float | Tensor, rollouts: RolloutFrames
    ) -> dict[str, Tensor]:
        """The outcome loss, unweighted, and what tells whether it learns."""
        targets = losses.outcome_targets(rollouts.success, rollouts.remaining, self.config.rollouts.discount)
        return {
            "outcome": losses.outcome(energies, targets, temperature, bias, rollouts.whole),
            "outcome_auc": success_auc(energies.detach(), rollouts.success, rollouts.whole),
            "outcome_bias": bias,
        }

    def _ranking_loss(
        self, output: HeadOutput, negatives: NegativeSet, chunks: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """The weighted sum of all losses on energies, and each of them, unweighted, by name."""
        config, energies, temperature = self.config.loss, output.energies, output.temperature
        valid, distances = nn.functional.pad(negatives.valid, (1, 0), value=True), _pad(negatives.distances, 0.0)
        weight = _pad(negatives.weight, 1.0)
        alpha = losses.mixed_alpha(step, config.mix_steps)
        there = weight > 0 if weight.ndim == 2 else None  # a row without its chunk of a failed rollout
        parts: dict[str, Any] = {"anchor": losses.anchor(energies, there), "temperature": temperature}
        loss = self.config.range.anchor_weight * parts["anchor"]
        if config.info_nce:
            log_q = self._log_q(chunks, negatives) if config.log_q else None
            arguments = (energies, temperature, valid, weight, log_q, config.logit_clamp)
            parts["info_nce"] = losses.info_nce(*arguments)
            parts["chance"] = losses.chance(energies, valid, weight, log_q)
            loss = loss + alpha * config.info_nce * parts["info_nce"]
        graded = (energies, distances, temperature, config.distance_scale)
        for name, function in (("listwise", losses.listwise), ("distance_regression", losses.distance_regression)):
            if getattr(config, name):
                parts[name] = function(*graded, weight=weight)  # near-positives stay in, with their distances
                loss = loss + getattr(config, name) * parts[name]
        for name, function in (("margin", losses.margin), ("hinge", losses.hinge)):
            if getattr(config, name):
                chosen = valid & self._margin_columns(negatives, name)
                parts[name] = function(energies, config.margin_width, chosen, weight)
                # Where a schedule is on, the margin makes room for InfoNCE (report, remedy 5).
                share = 1 - alpha if config.mix_steps else 1.0
                loss = loss + share * getattr(config, name) * parts[name]
        if config.diversity:
            parts["diversity"] = losses.diversity(energies, config.diversity_std, valid)
            loss = loss + config.diversity * parts["diversity"]
        return loss, parts

    def _margin_columns(self, negatives: NegativeSet, name: str) -> Tensor:
        """`(N,)` bool, column 0 the expert: the negatives that the margin looks at."""
        names = self.config.loss.margin_sources if name == "margin" else ()
        known = f"among what is drawn here: {', '.join(negatives.sources)}"
        checks.require(set(names) <= set(negatives.sources), "loss.margin_sources", names, known)
        columns = torch.full((1 + negatives.weight.shape[-1],), not names, device=negatives.weight.device)
        for source in names:
            columns[1:][negatives.sources[source]] = True
        columns[0] = True
        return columns

    def _log_q(self, chunks: Tensor, negatives: NegativeSet) -> Tensor:
        """`(B,N)`: how common the expert's and the in-batch chunks are in this batch; 0 elsewhere."""
        log_q = torch.zeros(chunks.shape[:2], device=chunks.device)
        # Times B, so that a chunk that occurs once has 0, as the chunks of the other sources.
        frequency = losses.log_frequency(chunks[:, 0], self.config.loss.log_q_width) + math.log(len(chunks))
        log_q[:, 0] = frequency
        columns = negatives.sources.get("in_batch")
        if columns is not None:
            # A chunk of another row is found again by equality: sources carry chunks, not row numbers.
            drawn = chunks[:, 1:][:, columns]
            same = (drawn[:, :, None] == chunks[None, None, :, 0]).flatten(3).all(3)
            log_q[:, 1:][:, columns] = frequency[same.float().argmax(2)]
        return log_q


def _pad(values: Tensor, first: float) -> Tensor:
    return nn.functional.pad(values, (1, 0), value=first)
