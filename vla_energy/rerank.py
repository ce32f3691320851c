"""Choose among candidates by energy, behind a gate that falls back to the policy's own chunk bit for bit.

`rerank` takes any `energy_fn: (B,N,H,A) -> (B,N)`; `Reranker` is it with a trained head. `calibrate.py` sets the
gate from held-out data.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vla_energy.actions import DatasetStatistics
from vla_energy.checkpoint import CheckpointError, find_one, load_head
from vla_energy.compatibility import CompatibilityError, check_statistics
from vla_energy.config import EnergyConfig
from vla_energy.durable import MANIFEST, check_seal
from vla_energy.fallback import Fallback
from vla_energy.gates import load_gates

logger = logging.getLogger(__name__)

MARGIN_KEY = "rerank_margin"
"""Under this name a checkpoint's own metadata hold the calibrated margin; None there is a gate that stays shut."""


class EnergyError(ValueError):
    """The head gives no energy for a chunk that is finite."""


class ScoringHead(Protocol):
    """What is needed of an energy head; `EnergyHead` is one."""

    context_dim: int
    action_dim: int
    horizon: int
    training: bool

    def encode(self, context: Tensor, context_mask: Tensor, reference: Tensor, /) -> Any:
        """Reads `context (B,S,D)` with `context_mask (B,S)` and the policy's chunk `(B,H,A)`; goes to `__call__`."""
        ...

    def __call__(self, encoded: Any, actions: Tensor, /) -> Tensor:
        """Energies `(B,N)` of normalised `actions (B,N,H,A)`."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Sets training (True) or eval mode, as `nn.Module.train`."""
        ...


@dataclass(frozen=True)
class RerankResult:
    """The choice for each row.

    Attributes:
        actions: `(B,H,A)` chosen chunks, in the candidates' dtype; a bit-for-bit copy of one of them.
        index: `(B,)` their position among the candidates, 0 = the policy's.
        energies: `(B,N)` fp32, without the prior; inf where a candidate or its energy is not finite.
        accepted: `(B,)` bool, True where another chunk than the policy's passed the gate.
        scores: `(B,N)` fp32, energies with the prior; what the choice was made by.
    """

    actions: Tensor
    index: Tensor
    energies: Tensor
    accepted: Tensor
    scores: Tensor


@contextmanager
def scoring(head: ScoringHead) -> Iterator[None]:
    """Eval mode (no dropout) and no gradient; the head's mode is restored afterwards."""
    with torch.no_grad():
        if not head.training:  # setting the mode visits every module, which costs a third of scoring one candidate
            yield
            return
        head.train(False)
        try:
            yield
        finally:
            head.train(True)


def choose(energies: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """The gate: `(index, accepted)`, both `(B,)`, for energies `(B,N)` without NaN.

    The lowest energy is accepted where `E_policy - E_lowest > margin`, else the index is 0. Where the policy's energy
    is inf any finite one is accepted; margin inf accepts nothing.
    """
    lowest, index = energies.min(1)
    accepted = energies[:, 0] - lowest > margin  # inf - inf is NaN: not accepted
    return torch.where(accepted, index, torch.zeros_like(index)), accepted


def rerank(
    energy_fn: Callable[[Tensor], Tensor], candidates: Tensor, margin: float, prior: Tensor | None = None
) -> RerankResult:
    """Best of N behind the gate, see `choose`.

    Candidates that are not finite are dropped. Where the policy's chunk is finite and its energy is not, nothing can be
    compared and the policy's chunk stays.

    Args:
        energy_fn: normalised chunks `(B,N,H,A)` to energies `(B,N)`, lower is better.
        candidates: `(B,N,H,A)` normalised, N >= 1, index 0 the policy's.
        margin: in units of energy, 0 or more; inf returns the policy's chunk always.
        prior: `(B,N)` added to the energies, 0 for the policy's; inf rules a candidate out. None is 0.

    Raises:
        TypeError: candidates are no tensor (raw actions, arrays).
        ValueError: shapes do not fit, there is no candidate, the margin is negative or NaN, or a prior is NaN or -inf.
    """
    _check_candidates(candidates)
    _check_choice(candidates, margin, prior)
    finite = _finite(candidates)
    # A dropped candidate is scored as zeros: NaN must not reach the head, which may mix candidates in a matrix product.
    scored = torch.where(finite[:, :, None, None], candidates, torch.zeros_like(candidates))
    energies = energy_fn(scored).float()
    if energies.shape != finite.shape:
        raise ValueError(f"energy_fn gave {tuple(energies.shape)} for candidates {tuple(candidates.shape)}")
    usable = finite & energies.isfinite()
    energies = torch.where(usable, energies, torch.full_like(energies, math.inf))
    scores = energies if prior is None else energies + prior.to(energies)
    index, accepted = choose(scores, margin)
    accepted = accepted & (usable[:, 0] | ~finite[:, 0])
    index = torch.where(accepted, index, torch.zeros_like(index))
    actions = candidates[torch.arange(len(candidates), device=candidates.device), index]
    return RerankResult(actions, index, energies, accepted, scores)


class Reranker:
    """A trained head as a chooser. Works under `torch.inference_mode()`; draws no random number.

    Args:
        head: trained on normalised actions.
        statistics: those it was trained with; None if they are not known (then `ensure_compatible` raises).
        config: `config.rerank.margin` is the gate.
        margin: overrides the config's, e.g. by `calibrate_margin`; may be inf.
        strict: an exception of the head or the gate is raised. Else it is answered with the policy's own chunk for all
            rows of the call, logged, and counted in `fallback.counts`: a robot goes on. For evaluation: True.

    Attributes:
        fallback: what failed so far, where not strict.
        counters: `decisions` (rows), `accepted`, `dropped_candidates` (not finite), `dropped_energies` (finite
            candidates whose energy is not), `no_alternative` (rows of several candidates, of which only the policy's or
            none was left).
    """

    def __init__(
        self,
        head: ScoringHead,
        statistics: DatasetStatistics | None,
        config: EnergyConfig,
        margin: float | None = None,
        strict: bool = False,
    ) -> None:
        self.fallback = Fallback(strict, fatal=(CompatibilityError,))
        self.head = head
        self.statistics = statistics
        self.config = config
        self.margin = config.rerank.margin if margin is None else margin
        if not self.margin >= 0:
            raise ValueError(f"margin={self.margin}: expected 0 or more")
        names = ("decisions", "accepted", "dropped_candidates", "dropped_energies", "no_alternative")
        self.counters = dict.fromkeys(names, 0)

    @classmethod
    def from_checkpoint(cls, path: str | Path, margin: float | None = None, strict: bool = False) -> Reranker:
        """Reads the head, its config and its statistics from a file, or from a folder with exactly one.

        The gate's margin is the first there is of: `margin`; the folder's `energy_gates.json`, which preflight writes;
        what calibration while fine-tuning stored with the head (None is a shut gate); with a warning, the config's.

        Raises:
            CheckpointError: there is none or more than one, or it cannot be used, or is not the one that was saved with
                the folder, or the folder's gates cannot be used; the message names it.
        """
        path = Path(path)
        file = find_one(path, "energy_head--") if path.is_dir() else path
        loaded = load_head(file)
        _check_sealed(file)
        loaded.head.eval()
        if margin is None:
            margin = load_gates(path)[0].get("rerank")
        if margin is None and MARGIN_KEY in loaded.extra:
            stored = loaded.extra[MARGIN_KEY]
            margin = math.inf if stored is None else float(stored)
        elif margin is None:
            logger.warning(
                "the gate of %s was never calibrated: its margin is the config's %g", path, loaded.config.rerank.margin
            )
        return cls(loaded.head, loaded.statistics, loaded.config, margin, strict)

    def __call__(
        self,
        context: Tensor,
        context_mask: Tensor,
        candidates: Tensor,
        prior: Tensor | None = None,
        margin: float | None = None,
    ) -> RerankResult:
        """Chooses for each row, see `rerank`; where not `strict`, also after an exception.

        Args:
            context: `(B,S,D)` hidden states.
            context_mask: `(B,S)` True = valid.
            candidates: `(B,N,H,A)` normalised, index 0 the policy's own chunk.
            prior: `(B,N)`, see `rerank`.
            margin: instead of the reranker's own, for this call.

        Raises:
            TypeError, ValueError: as `rerank`.
            CompatibilityError: H, A or D is not the head's.
            EnergyError: where `strict`, the energy of a finite chunk is not finite. Else a row keeps the policy's chunk
                where that is the policy's own, and chooses among the others where it is another's.
        """
        _check_candidates(candidates)
        for name, value in (("context", context), ("prior", candidates if prior is None else prior)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} is {type(value).__name__}: expected a tensor")
        if context.ndim != 3 or len(context) != len(candidates):
            raise ValueError(f"context {tuple(context.shape)} for candidates {tuple(candidates.shape)}")
        self._check_dims(candidates.shape[2], candidates.shape[3], context.shape[2])
        margin = self.margin if margin is None else margin
        _check_choice(candidates, margin, prior)
        return self.fallback(
            lambda: self._choose(context, context_mask, candidates, prior, margin), lambda: _own(candidates), "rerank"
        )

    def _choose(
        self, context: Tensor, context_mask: Tensor, candidates: Tensor, prior: Tensor | None, margin: float
    ) -> RerankResult:
        with scoring(self.head):
            # A policy's chunk that is not finite is no reference.
            finite = _finite(candidates)
            reference = candidates[:, 0].float().masked_fill(~finite[:, 0, None, None], math.nan)
            encoded = self.head.encode(context, context_mask, reference)
            result = rerank(lambda actions: self.head(encoded, actions), candidates, margin, prior)
        check_energies(finite & ~result.energies.isfinite(), self.fallback, "rerank")
        self._count(finite, result)
        return result

    def ensure_compatible(self, statistics: DatasetStatistics, horizon: int, action_dim: int, context_dim: int) -> None:
        """Checks that the head was trained for this policy's actions and context.

        Raises:
            CompatibilityError: H, A or D differ, or normalised actions mean something else; the message says what.
        """
        self._check_dims(horizon, action_dim, context_dim)
        if self.statistics is None:
            raise CompatibilityError("the head carries no dataset statistics: train it again, or save it with them")
        check_statistics(self.statistics, statistics, "the head")

    def _check_dims(self, horizon: int, action_dim: int, context_dim: int) -> None:
        asked = {"horizon": horizon, "action_dim": action_dim, "context_dim": context_dim}
        for name, value in asked.items():
            trained = getattr(self.head, name)
            if value != trained:
                raise CompatibilityError(f"{name} is {value} here, the head was trained with {trained}")

    def _count(self, finite: Tensor, result: RerankResult) -> None:
        usable = result.energies < math.inf
        alone = ~usable[:, 1:].any(1) if finite.shape[1] > 1 else torch.zeros_like(result.accepted)
        tallies = torch.stack([result.accepted.sum(), (~finite).sum(), (finite & ~usable).sum(), alone.sum()]).tolist()
        for name, value in zip(self.counters, (len(finite), *tallies), strict=True):
            self.counters[name] += value


def _check_sealed(file: Path) -> None:
    """A head that is whole may still be another step's, put there under this one's name; see `durable.seal`."""
    try:
        check_seal(file.parent, lambda name: name == file.name)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; take another copy of the checkpoint, or, if you changed it on purpose, delete its {MANIFEST}"
        ) from error


def check_energies(broken: Tensor, fallback: Fallback, what: str) -> None:
    """Tells of a head that has no number for a chunk: it would pass for a gate that stays shut.

    Args:
        broken: `(B,N)` where a chunk is finite and its energy is not, the policy's own in column 0.
        fallback: counts and logs it, a failure a call; where strict it is raised.
        what: was attempted, for the log.

    Raises:
        EnergyError: where the fallback is strict.
    """
    if not broken.any():
        return
    own = broken[:, 0]
    if own.any():
        row = int(own.int().argmax())
        fallback.failed(EnergyError(f"the energy of the policy's own chunk is not finite (row {row})"), what)
    else:
        row = int(broken.any(1).int().argmax())
        error = EnergyError(f"the energy of another chunk than the policy's own is not finite (row {row})")
        fallback.failed(error, what, "that chunk is left out")


def _check_choice(candidates: Tensor, margin: float, prior: Tensor | None) -> None:
    if not margin >= 0:
        raise ValueError(f"margin={margin}: expected 0 or more")
    if prior is not None and (prior.shape != candidates.shape[:2] or not (prior > -math.inf).all()):
        raise ValueError(f"prior {tuple(prior.shape)}: expected (B,N) = {tuple(candidates.shape[:2])}, no NaN or -inf")


def _own(candidates: Tensor) -> RerankResult:
    """The policy's chunk in each row, no energy known."""
    rows, count = candidates.shape[:2]
    unknown = torch.full((rows, count), math.inf, device=candidates.device)
    index = torch.zeros(rows, dtype=torch.long, device=candidates.device)
    return RerankResult(candidates[:, 0].clone(), index, unknown, index > 0, unknown)


def _finite(candidates: Tensor) -> Tensor:
    """`(B,N)` bool. The largest number tells: NaN passes through `amax`, and compares as False."""
    return candidates.flatten(2).abs().amax(2) < math.inf


def _check_candidates(candidates: Any) -> None:
    if not isinstance(candidates, Tensor):
        kind = type(candidates).__name__
        raise TypeError(
            f"candidates are {kind}: expected a tensor of normalised actions; use statistics.normalize(raw)"
        )
    shape = tuple(candidates.shape)
    if candidates.ndim != 4 or not candidates.is_floating_point():
        raise ValueError(f"candidates: expected a floating point (B,N,H,A), got {candidates.dtype} {shape}")
    if 0 in shape:
        raise ValueError(f"candidates {shape}: at least the policy's own chunk is needed in each row")
