"""Settings of the losses, the temperature, recorded rollouts, the guarded optimiser step and the monitors."""

from dataclasses import dataclass

from vla_energy.config import checks
from vla_energy.config.negatives import SOURCES

TEMPERATURE_MODES = ("fixed", "adaptive", "learnable")


@dataclass
class TemperatureConfig:
    """Temperature of `logits = -energy / temperature` (report, remedy 2).

    Attributes:
        mode: `fixed` at `value`; `adaptive`, `max(value, factor * std(E))` without gradient, over all ranks' energies;
            `learnable`, starting at `value` and kept within `minimum` and `maximum`.
        value: of `fixed`, the least of `adaptive`, the start of `learnable`.
        factor: of `adaptive`.
        minimum, maximum: bounds of `learnable`.
    """

    mode: str = "fixed"
    value: float = 1.0
    factor: float = 2.0
    minimum: float = 0.05
    maximum: float = 10.0

    def __post_init__(self) -> None:
        checks.one_of("temperature.mode", self.mode, TEMPERATURE_MODES)
        for name in ("value", "factor", "minimum", "maximum"):
            checks.positive(f"temperature.{name}", getattr(self, name))
        bounds = f"within temperature.minimum={self.minimum} and maximum={self.maximum}"
        inside = self.minimum <= self.value <= self.maximum
        checks.require(inside or self.mode != "learnable", "temperature.value", self.value, bounds)


@dataclass
class LossConfig:
    """Weights of the losses; 0 turns one off.

    The defaults are small because graded energies are steep (1 / distance_scale); Adam's step does not depend on the
    factor, the bounds on the gradient's norm do.

    Attributes:
        info_nce: one-hot softmax of the expert against the negatives.
        listwise: cross-entropy to `softmax(-distance / distance_scale)` over expert and negatives.
        distance_regression: squared difference of energy gaps and scaled distance gaps, over pairs of chunks.
        margin: `relu(E_expert - E_negative + margin_width)`, mean over negatives.
        hinge: the same against the most offending negative alone.
        diversity: `relu(diversity_std - std(E))` of each row, against collapse.
        centre: L1 of the head's centre (the point from which it measures deviations) to the expert's chunk. Row-wise
            losses alone leave the centre far from the expert, where deviations say little.
        distance_scale: mean absolute distance (normalised units) that lowers a chunk's target by a factor e.
        margin_width: of margin and hinge, in units of energy.
        diversity_std: below this standard deviation of a row's energies the diversity loss acts.
        margin_sources: the margin's negatives, by names of sources (`layer_exit_1` is layer 1's); empty is all.
        mix_steps: the report's schedule `alpha = min(1, step / mix_steps)`: alpha times InfoNCE and (1 - alpha) times
            margin and hinge; 0 is no schedule.
        log_q: subtract from the expert's and in-batch chunks' logits the log of how common they are in the batch
            (kernel width `log_q_width`, mean absolute distance): in-batch InfoNCE punishes common actions.
        log_q_width: mean absolute distance, normalised units, at which a chunk counts as another.
        logit_clamp: the report's clamp of logits to +-50; 0 is off. It kills the gradient where it acts.
    """

    info_nce: float = 0.002
    listwise: float = 0.02
    distance_regression: float = 0.0
    margin: float = 0.0
    hinge: float = 0.0
    diversity: float = 0.0
    centre: float = 1.0
    distance_scale: float = 0.03
    margin_width: float = 0.5
    margin_sources: tuple[str, ...] = ()
    diversity_std: float = 0.1
    mix_steps: int = 0
    log_q: bool = False
    log_q_width: float = 0.05
    logit_clamp: float = 0.0

    def __post_init__(self) -> None:
        ranking = ("info_nce", "listwise", "distance_regression", "margin", "hinge")
        for name in (*ranking, "diversity", "centre", "logit_clamp"):
            checks.not_negative(f"loss.{name}", getattr(self, name))
        weights = tuple(getattr(self, name) for name in ranking)
        checks.require(any(weights), f"loss.{', '.join(ranking)}", weights, "at least one weight above 0")
        for name in ("distance_scale", "margin_width", "diversity_std", "log_q_width"):
            checks.positive(f"loss.{name}", getattr(self, name))
        for source in self.margin_sources:
            exits = isinstance(source, str) and source.removeprefix("layer_exit_").isdigit()
            known = source in (*SOURCES, "policy") or exits
            expected = f"among {', '.join(SOURCES)}, policy, layer_exit_<layer>"
            checks.require(known, "loss.margin_sources", source, expected)
        checks.count("loss.mix_steps", self.mix_steps)
        checks.flag("loss.log_q", self.log_q)


@dataclass
class RolloutsConfig:
    """What the head learns from recorded rollouts, solved and failed; the policy never learns from them.

    Attributes:
        dataset: RLDS dataset under `data_root_dir`, of `vla-energy rollout --record` or any with
            `episode_metadata/success`; empty is off.
        batch_size: frames of it a step and accumulation step, drawn evenly over all its frames.
        discount: per step; a frame of a solved episode has the target `discount**remaining`.
        outcome: weight of the outcome loss, see `losses.outcome`; 0 turns it off.
        failed: at most so many chunks executed in failed episodes of the same instruction are negatives of a
            demonstration's frame; 0 is off.
    """

    dataset: str = ""
    batch_size: int = 16
    discount: float = 0.99
    outcome: float = 0.02
    failed: int = 4

    def __post_init__(self) -> None:
        checks.require(isinstance(self.dataset, str), "rollouts.dataset", self.dataset, "a dataset's name, or empty")
        checks.count("rollouts.batch_size", self.batch_size, 1)
        inside = checks.is_number(self.discount) and 0 <= self.discount <= 1
        checks.require(inside, "rollouts.discount", self.discount, "0 <= discount <= 1")
        checks.not_negative("rollouts.outcome", self.outcome)
        checks.count("rollouts.failed", self.failed)
        used = not self.dataset or self.outcome > 0 or self.failed > 0
        checks.require(used, "rollouts.outcome, failed", (self.outcome, self.failed), "at least one above 0")
        fits = not self.dataset or self.failed <= self.batch_size
        checks.require(fits, "rollouts.failed", self.failed, f"at most rollouts.batch_size={self.batch_size}")

    @property
    def learns_outcome(self) -> bool:
        """Whether the outcome loss is on."""
        return bool(self.dataset) and self.outcome > 0


@dataclass
class GuardConfig:
    """The optimiser step of the head (report, remedy 6).

    Attributes:
        max_grad_norm: the gradient's norm is clipped to this.
        skip_grad_norm: above this norm, or where it is not finite, the step is skipped. The report's 10 starves a head
            beside an untrained policy, whose finite gradients clipping makes harmless (norms of 13 to 37 seen).
        weight_decay: of AdamW, on the head's weights; a learnt temperature has none.
        lr_factor: times `energy_learning_rate`; the report's stage 2 asks for a tenth.
    """

    max_grad_norm: float = 0.5
    skip_grad_norm: float = 100.0
    weight_decay: float = 1e-4
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        checks.positive("guard.max_grad_norm", self.max_grad_norm)
        checks.positive("guard.skip_grad_norm", self.skip_grad_norm)
        checks.not_negative("guard.weight_decay", self.weight_decay)
        checks.positive("guard.lr_factor", self.lr_factor)
        ordered = self.skip_grad_norm >= self.max_grad_norm
        expected = f"at least max_grad_norm={self.max_grad_norm}"
        checks.require(ordered, "guard.skip_grad_norm", self.skip_grad_norm, expected)


@dataclass
class MonitorConfig:
    """Monitors, and when they warn.

    Attributes:
        every: optimiser steps between two measurements.
        flat_steps, flat_band: warn where InfoNCE stayed within `flat_band` of the loss of a head that knows nothing
            (the log of the number of chunks) for `flat_steps` steps.
        saturated_share: warn where more than this share of energies sits where the range has no slope.
        skipped_share: warn where more than this share of the steps since the last measurement was skipped.
    """

    every: int = 100
    flat_steps: int = 500
    flat_band: float = 0.02
    saturated_share: float = 0.5
    skipped_share: float = 0.1

    def __post_init__(self) -> None:
        checks.count("monitor.every", self.every, 1)
        checks.count("monitor.flat_steps", self.flat_steps, 1)
        checks.positive("monitor.flat_band", self.flat_band)
        checks.share("monitor.saturated_share", self.saturated_share)
        checks.share("monitor.skipped_share", self.skipped_share)
