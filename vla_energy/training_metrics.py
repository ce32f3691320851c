"""Metrics of one training batch, 0-d tensors without gradient: what the monitors and the log see."""

from __future__ import annotations

import math

from torch import Tensor, nn

from vla_energy import losses
from vla_energy.config import EnergyConfig
from vla_energy.head import HeadOutput
from vla_energy.measures import spearman
from vla_energy.ranges import saturated_share
from vla_energy.sources import NegativeSet

REPORT_CLAMP = 50.0
"""The report's clamp of logits (remedy 4); how often it would act is counted whether it is on or not."""


def energy_metrics(output: HeadOutput, negatives: NegativeSet, config: EnergyConfig) -> dict[str, Tensor]:
    """`energy/*` of a batch; the expert's chunk is column 0 of `output.energies`.

    Win rates count ties as lost: a head that gives every chunk the same energy must not look good. A source without a
    valid negative has the rate 1. Where an energy that is compared is not finite, `top1` and the rates it is part of
    are NaN.
    """
    energies, temperature = output.energies.detach(), output.temperature
    valid, positive, others = negatives.valid, energies[:, :1], energies[:, 1:]
    negative = (others * valid).sum() / valid.sum().clamp_min(1)
    lost = valid & (others <= positive)
    # NaN is never lower, and would read as won.
    unknown = valid & ~(others.isfinite() & positive.isfinite())
    logits = losses.logits_of(energies, temperature)
    all_valid = nn.functional.pad(valid, (1, 0), value=True)
    spread = energies[:, 1:].where(valid, positive).sub(positive)
    metrics = {
        "positive": positive.mean(),
        "negative": negative,
        "gap": negative - positive.mean(),
        "top1": (1 - lost.any(1).float().mean()).masked_fill(unknown.any(), math.nan),
        "min": energies.min(),
        "max": energies.max(),
        "std": energies.std(unbiased=False),
        "std_row": nn.functional.pad(spread, (1, 0)).std(1, unbiased=False).mean(),
        "std_positive": positive.std(unbiased=False),
        "logits_min": logits.min(),
        "logits_max": logits.max(),
        "clamped": losses.clamp_count(energies, temperature, config.loss.logit_clamp or REPORT_CLAMP, all_valid),
        "saturated": saturated_share(energies, config.range),
        "nonfinite": (~energies.isfinite()).float().mean(),
        "masked": (~valid).sum().float(),
        "masked_share": (~valid).float().mean() if valid.numel() else energies.new_zeros(()),
        "no_negatives": losses.count_no_negatives(energies, all_valid),
        "empty_sources": energies.new_tensor(float(len(negatives.empty))),
        "spearman": spearman(energies, nn.functional.pad(negatives.distances, (1, 0))),
    }
    for name, columns in negatives.sources.items():
        if name in negatives.empty:
            continue  # nothing was ranked: a rate of 1 would look like a success
        count = valid[:, columns].sum().clamp_min(1)
        rate = 1 - lost[:, columns].sum() / count
        metrics[f"win_rate/{name}"] = rate.masked_fill(unknown[:, columns].any(), math.nan)
        metrics[f"negative/{name}"] = (others * valid)[:, columns].sum() / count
    if "policy_noise" in negatives.sources:
        near = slice(negatives.sources["policy"].start, negatives.sources["policy_noise"].stop)
        metrics["spearman/policy_noise"] = spearman(others[:, near], negatives.distances[:, near])
    return {f"energy/{name}": value.detach() for name, value in metrics.items()}
