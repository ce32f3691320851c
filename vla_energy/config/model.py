"""Settings of the energy head, its range, and of inference."""

from dataclasses import dataclass

from vla_energy.config import checks

HEADS = ("residual", "original")
CONTEXT_DTYPES = ("float32", "bfloat16")

RANGES: dict[str, tuple[float, float, float]] = {
    "sigmoid": (1.0, 1.0, 1e-6),
    "relu_scaled": (10.0, 1.0, 1e-3),
    "softplus": (2.0, 0.5, 1e-3),
    "bounded": (9.9, 1.0, 0.1),
    "softplus_scaled": (5.0, 0.1, 1e-3),
    "linear": (1.0, 1.0, 0.0),
}
"""Default (scale, slope, offset) of each range `scale * f(slope * raw) + offset`; report, remedies 1, 1a, 1b, 1c."""


@dataclass
class HeadConfig:
    """Kind and size of the energy head.

    Attributes:
        name: `residual`, ours, or `original`, the head whose training failed.
        hidden_dim: width; a multiple of `num_heads`.
        num_heads: of the attention over the context.
        num_layers: of ours; the original has one cross-attention.
        dropout: while training; off where candidates are scored.
        deviation_scale: an action's deviation from the centre that the head predicts from the context is measured in
            this unit (normalised action units): the size of a good policy's error, where candidates must be told apart.
        factor_bound: of ours: far from the centre the network multiplies the distance by up to exp(factor_bound) or
            its inverse, near it by less; what it learns must not drown the distance there.
        reference: of ours: measure deviations from the policy's own chunk, corrected, where the caller gives one.
        blind_share: of ours: share of training rows without a reference, so that the head also works without one.
        per_step: of the original: False scores the mean of the attended steps (its first version), True takes the mean
            of the steps' energies (its second).
        context_dtype: of ours: float32 or bfloat16, in which the products with the context are made, by far the widest
            of all; the rest stays float32. bfloat16 is for GPUs, and CPUs with instructions for it; on a CPU without
            them (AVX2) the products stay float32, with a warning. The checkpoint's weights are float32 either way.
        block_mib: memory that the forward of one block of rows may keep for the backward, in MiB. A training step of
            more goes in several blocks, whose forward is computed again in the backward; 0: one block, always.
    """

    name: str = "residual"
    hidden_dim: int = 64
    num_heads: int = 2
    num_layers: int = 1
    dropout: float = 0.0
    deviation_scale: float = 0.05
    factor_bound: float = 1.5
    reference: bool = True
    blind_share: float = 0.1
    per_step: bool = False
    context_dtype: str = "float32"
    block_mib: int = 256

    def __post_init__(self) -> None:
        checks.one_of("head.name", self.name, HEADS)
        checks.one_of("head.context_dtype", self.context_dtype, CONTEXT_DTYPES)
        checks.count("head.block_mib", self.block_mib)
        for name in ("hidden_dim", "num_heads", "num_layers"):
            checks.count(f"head.{name}", getattr(self, name), 1)
        multiple = self.hidden_dim % self.num_heads == 0
        checks.require(multiple, "head.hidden_dim", self.hidden_dim, f"a multiple of head.num_heads={self.num_heads}")
        checks.share("head.dropout", self.dropout)
        checks.positive("head.deviation_scale", self.deviation_scale)
        checks.positive("head.factor_bound", self.factor_bound)
        checks.flag("head.per_step", self.per_step)
        checks.flag("head.reference", self.reference)
        checks.share("head.blind_share", self.blind_share)


@dataclass
class RangeConfig:
    """Energy range `scale * f(slope * raw) + offset` (report, remedy 1), f given by `name`.

    Attributes:
        name: sigmoid, relu_scaled, softplus, bounded, softplus_scaled or linear.
        scale, slope, offset: the constants; None takes the name's own, see `RANGES`.
        anchor_weight: weight of the mean of E^2 in the loss; removes the null direction of row-wise losses, an offset
            that depends on the context alone.
    """

    name: str = "linear"
    scale: float | None = None
    slope: float | None = None
    offset: float | None = None
    anchor_weight: float = 1e-3

    def __post_init__(self) -> None:
        checks.one_of("range.name", self.name, RANGES)
        scale, slope, offset = self.constants()
        checks.positive("range.scale", scale)
        checks.positive("range.slope", slope)
        checks.require(checks.is_number(offset), "range.offset", offset, "a finite number")
        checks.not_negative("range.anchor_weight", self.anchor_weight)

    def constants(self) -> tuple[float, float, float]:
        """(scale, slope, offset), each the field's value or the name's own."""
        scale, slope, offset = RANGES[self.name]
        return (
            scale if self.scale is None else self.scale,
            slope if self.slope is None else self.slope,
            offset if self.offset is None else self.offset,
        )


@dataclass
class CandidatesConfig:
    """Proposals at inference; the policy's own chunk always comes first.

    Attributes:
        num_candidates: noisy copies of the policy's chunk, spread over `noise_stds`.
        noise_stds: standard deviations in normalised action units.
        layer_exits: add the chunks decoded from inner layers.
        overlap: add the rest of the chunk under way, filled up with the end of the policy's new one (in rollouts).
        crops: the policy's chunks for so many crops of the images, each at a random place; the policy reads so many
            more rows. In rollouts and preflight; the margin that fine-tuning calibrates does not know them.
        crop_scale: side of such a crop relative to the image, to whose size it is brought back. It takes the place of
            the centre crop; a policy trained on crops knows a side of 0.95.
        samples: so many more chunks of a policy that chunks are drawn from: a diffusion head's samples, of one encoding
            of the images, or draws from discrete tokens' distributions, all of the one forward pass. The policy's own
            chunk, the first sample or that of the likeliest tokens, comes first: reranking is best of 1 + `samples`.
        sample_temperature: of discrete tokens, divides the logits before drawing; smaller stays nearer to the likeliest
            tokens. Also of `negatives.samples`.
    """

    num_candidates: int = 16
    noise_stds: tuple[float, ...] = (0.02, 0.05, 0.1)
    layer_exits: bool = True
    overlap: bool = False
    crops: int = 0
    crop_scale: float = 0.9
    samples: int = 0
    sample_temperature: float = 1.0

    def __post_init__(self) -> None:
        checks.flag("candidates.overlap", self.overlap)
        checks.count("candidates.crops", self.crops)
        checks.count("candidates.samples", self.samples)
        checks.positive("candidates.sample_temperature", self.sample_temperature)
        scale = self.crop_scale
        within = checks.is_number(scale) and 0 < scale <= 1
        checks.require(within, "candidates.crop_scale", scale, "0 < crop_scale <= 1")
        checks.count("candidates.num_candidates", self.num_candidates)
        checks.stds("candidates.noise_stds", self.noise_stds, self.num_candidates)
        checks.flag("candidates.layer_exits", self.layer_exits)


@dataclass
class RetrievalConfig:
    """Chunks that the training set's nearest contexts lend, as candidates.

    Attributes:
        count: K, how many; 0 is none.
        weight: energy per unit of key distance; 1 is the distance at which remembered frames of different episodes
            typically lie.
        reach: key distance at which a retrieved chunk is believed as much as the policy's own.
    """

    count: int = 8
    weight: float = 1.0
    reach: float = 4.0

    def __post_init__(self) -> None:
        checks.count("retrieval.count", self.count)
        checks.not_negative("retrieval.weight", self.weight)
        checks.not_negative("retrieval.reach", self.reach)


@dataclass
class RefineConfig:
    """Descent on the energy from the policy's chunk.

    Attributes:
        radius: of the trust region, in normalised action units times the dimension's scale.
        num_steps: of the descent.
        step_size: of its first step, in radii.
    """

    radius: float = 0.05
    num_steps: int = 10
    step_size: float = 0.25

    def __post_init__(self) -> None:
        checks.positive("refine.radius", self.radius)
        checks.count("refine.num_steps", self.num_steps)
        checks.positive("refine.step_size", self.step_size)


@dataclass
class ReplanConfig:
    """How long a chunk is executed when its energy decides.

    Attributes:
        margin: the rest of a chunk is kept while its energy is at most so much above the policy's new chunk's.
        shortest, longest: steps between two decisions; a kept chunk doubles them. `longest` should leave some of the
            chunk to compare.
    """

    margin: float = 0.5
    shortest: int = 2
    longest: int = 6

    def __post_init__(self) -> None:
        checks.not_negative("replan.margin", self.margin)
        checks.count("replan.shortest", self.shortest, 1)
        checks.count("replan.longest", self.longest, self.shortest)


@dataclass
class RerankConfig:
    """The gate of the reranker, and how it is calibrated.

    Attributes:
        margin: a candidate replaces the policy's chunk only if its energy is lower by more than this; used where
            nothing was calibrated.
        risk: at most this share of the chunks that a calibrated gate accepts is worse than the policy's by more than
            the tolerance.
        tolerance: in units of the policy's own mean held-out error; 0 counts every difference.
    """

    margin: float = 0.5
    risk: float = 0.1
    tolerance: float = 1.0

    def __post_init__(self) -> None:
        checks.not_negative("rerank.margin", self.margin)
        checks.share("rerank.risk", self.risk)
        checks.positive("rerank.risk", self.risk)
        checks.not_negative("rerank.tolerance", self.tolerance)
