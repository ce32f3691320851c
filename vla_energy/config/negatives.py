"""Settings of the sources of negatives (report, remedy 3); `count=0` turns a source off.

`weight` is what each chunk of a source counts in the losses.
"""

from dataclasses import dataclass, field

from vla_energy.config import checks


def _source(name: str, count: int, weight: float) -> None:
    checks.count(f"negatives.{name}.count", count)
    checks.positive(f"negatives.{name}.weight", weight)


@dataclass
class LayerExitsConfig:
    """Chunks decoded from inner layers; layer 0 (a constant) and the last (the policy) are left out.

    Attributes:
        count: at most so many, spread evenly over the inner layers and ending with the last of them; 0 is off.
        layers: these layers instead of a spread of `count` (which then only has to be above 0); empty is the spread.
        normed: pass inner states through the language model's final norm before the action head decodes them, as the
            last layer's are; the report's exits are raw.
        weight: what each chunk counts in the losses.
    """

    count: int = 4
    weight: float = 1.0
    layers: tuple[int, ...] = ()
    normed: bool = False

    def __post_init__(self) -> None:
        _source("layer_exits", self.count, self.weight)
        for layer in self.layers:
            checks.count("negatives.layer_exits.layers", layer, 1)
        checks.flag("negatives.layer_exits.normed", self.normed)


@dataclass
class ExpertNoiseConfig:
    """Gaussian noise on the expert chunk.

    Attributes:
        stds: standard deviations in normalised action units.
        count: chunks per standard deviation; 0 is off.
        per_dimension: scale the noise by each dimension's spread in the demonstrations, see `noise.noise_scale`.
        weight: what each chunk counts in the losses.
    """

    count: int = 2
    weight: float = 1.0
    stds: tuple[float, ...] = (0.1, 0.3, 0.5)
    per_dimension: bool = False

    def __post_init__(self) -> None:
        _source("expert_noise", self.count, self.weight)
        checks.stds("negatives.expert_noise.stds", self.stds, self.count)
        checks.flag("negatives.expert_noise.per_dimension", self.per_dimension)


@dataclass
class PolicyNoiseConfig:
    """The policy's own chunk, and Gaussian noise on it: the region in which inference chooses.

    Attributes:
        stds: standard deviations in normalised action units, around the size of the policy's error.
        count: noisy chunks per standard deviation, beside the policy's own chunk; 0 turns the noise and the chunk off.
        per_dimension: as in `ExpertNoiseConfig`.
        correlation: of the noise at neighbouring steps; inference proposes smooth noise (0.9), so training meets it.
        weight: what each chunk counts in the losses.
    """

    count: int = 2
    weight: float = 1.0
    stds: tuple[float, ...] = (0.02, 0.05, 0.1)
    per_dimension: bool = False
    correlation: float = 0.9

    def __post_init__(self) -> None:
        _source("policy_noise", self.count, self.weight)
        checks.stds("negatives.policy_noise.stds", self.stds, self.count)
        checks.flag("negatives.policy_noise.per_dimension", self.per_dimension)
        checks.share("negatives.policy_noise.correlation", self.correlation)


@dataclass
class ShuffleConfig:
    """The expert's steps in another order, no step in its own place (a derangement for each row).

    Attributes:
        count: chunks a row; 0 is off.
        weight: what each chunk counts in the losses.
    """

    count: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        _source("shuffle", self.count, self.weight)


@dataclass
class ShiftConfig:
    """The expert's chunk early or late by up to `max_steps` steps; the ends repeat the first or last step.

    Attributes:
        count: chunks a row; 0 is off.
        weight: what each chunk counts in the losses.
        max_steps: the largest shift, in steps.
    """

    count: int = 0
    weight: float = 1.0
    max_steps: int = 3

    def __post_init__(self) -> None:
        _source("shift", self.count, self.weight)
        checks.count("negatives.shift.max_steps", self.max_steps, 1)


@dataclass
class AmplitudeConfig:
    """The expert's chunk, all but the gripper, times each of `factors`.

    Attributes:
        count: 1 is on, one chunk a factor; 0 is off.
        weight: what each chunk counts in the losses.
        factors: of the action; none is 1.
    """

    count: int = 0
    weight: float = 1.0
    factors: tuple[float, ...] = (0.5, 1.5)

    def __post_init__(self) -> None:
        _source("amplitude", self.count, self.weight)
        checks.stds("negatives.amplitude.factors", self.factors, self.count)
        checks.require(1.0 not in self.factors, "negatives.amplitude.factors", self.factors, "no factor of 1")


@dataclass
class GripperFlipConfig:
    """The expert's chunk with the gripper open where it was closed; count 1 is on, 0 is off.

    Attributes:
        count: 1 is on, 0 is off.
        weight: what each chunk counts in the losses.
    """

    count: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        _source("gripper_flip", self.count, self.weight)
        checks.require(self.count <= 1, "negatives.gripper_flip.count", self.count, "0 or 1, there is but one")


@dataclass
class InBatchConfig:
    """Expert chunks of other rows of the batch.

    Attributes:
        count: at most so many of the other B - 1 rows, drawn without replacement; 0 is off.
        weight: what each chunk counts in the losses.
    """

    count: int = 7
    weight: float = 1.0

    def __post_init__(self) -> None:
        _source("in_batch", self.count, self.weight)


@dataclass
class HardConfig:
    """The chunks of lowest energy among `pool` chunks drawn around expert and policy and from other rows.

    Costs one more scoring of `pool` chunks a step, without gradient.

    Attributes:
        count: chunks a row; 0 is off.
        weight: what each chunk counts in the losses.
        pool: chunks that are scored to find them.
    """

    count: int = 0
    weight: float = 1.0
    pool: int = 64

    def __post_init__(self) -> None:
        _source("hard", self.count, self.weight)
        checks.count("negatives.hard.pool", self.pool, 1)
        checks.require(self.count <= self.pool, "negatives.hard.count", self.count, f"at most hard.pool={self.pool}")


@dataclass
class RetrievedConfig:
    """Expert chunks of the nearest contexts in other episodes, from the memory beside the policy's checkpoint.

    Near misses, mostly: what the head has to choose among when it reranks retrieved chunks. Needs a policy that no
    longer changes (`--energy.freeze_backbone True`).

    Attributes:
        count: so many of the nearest; 0 is off.
        weight: what each chunk counts in the losses.
    """

    count: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        _source("retrieved", self.count, self.weight)


@dataclass
class SamplesConfig:
    """More chunks of a policy that chunks are drawn from: what inference will choose among.

    Samples of a diffusion head (`--use_diffusion True`), or draws from discrete tokens' distributions
    (`--use_l1_regression False`) at `candidates.sample_temperature`.

    Attributes:
        count: so many beside the policy's own chunk; 0 is off.
        steps: of a diffusion head's denoising while the energy head trains, of the policy's own chunk, too; each is a
            pass of the language model without gradient over `1 + count` rows a frame. At most
            `num_diffusion_steps_train`.
        weight: what each chunk counts in the losses.
    """

    count: int = 0
    weight: float = 1.0
    steps: int = 10

    def __post_init__(self) -> None:
        _source("samples", self.count, self.weight)
        checks.count("negatives.samples.steps", self.steps, 1)


SOURCES = (
    "layer_exits", "expert_noise", "policy_noise", "shuffle", "shift", "amplitude", "gripper_flip", "in_batch", "hard",
    "retrieved", "samples",
)  # fmt: skip
"""Names of the sources, the fields of `NegativesConfig`."""


@dataclass
class NegativesConfig:
    """Sources of negatives (report, remedy 3).

    Attributes:
        near_positive_threshold: a negative nearer to the expert than this (mean absolute distance, normalised units)
            is no negative: one-hot losses leave it out and count it, graded ones keep it.
    """

    layer_exits: LayerExitsConfig = field(default_factory=LayerExitsConfig)
    expert_noise: ExpertNoiseConfig = field(default_factory=ExpertNoiseConfig)
    policy_noise: PolicyNoiseConfig = field(default_factory=PolicyNoiseConfig)
    in_batch: InBatchConfig = field(default_factory=InBatchConfig)
    shuffle: ShuffleConfig = field(default_factory=ShuffleConfig)
    shift: ShiftConfig = field(default_factory=ShiftConfig)
    amplitude: AmplitudeConfig = field(default_factory=AmplitudeConfig)
    gripper_flip: GripperFlipConfig = field(default_factory=GripperFlipConfig)
    hard: HardConfig = field(default_factory=HardConfig)
    retrieved: RetrievedConfig = field(default_factory=RetrievedConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    near_positive_threshold: float = 0.02

    def __post_init__(self) -> None:
        checks.not_negative("negatives.near_positive_threshold", self.near_positive_threshold)
        counts = {name: getattr(self, name).count for name in SOURCES}
        checks.require(any(counts.values()), "negatives.*.count", counts, "at least one source above 0")
