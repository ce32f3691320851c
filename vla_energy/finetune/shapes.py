"""What the report draws of a head and no metric says: landscapes, ranking by distance, the gate by its margin.

Written at each validation to `shapes.json` in the run's folder, so that `vla-energy report` needs no model:

    frames  up to `FRAMES` held-out frames of different episodes: `task`, `episode`, `step` and
            `plane` {xs, ys, energies (R,R)} of `landscape.plane_slice`, `time` {xs, energies (H,R)} of `step_slice`
    bands   share of pairs of candidates in the right order, by distance, see `measures.pairs_by_band`
    gate    see `calibrate.margin_curve`, on the episodes that did not set the margin; `l1_policy`, and `chosen`, the
            calibrated margin, null where the gate stays shut; null where one episode is all there is
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vla_energy.calibrate import margin_curve
from vla_energy.head import EnergyHead
from vla_energy.landscape import plane_slice, step_slice
from vla_energy.measures import pairs_by_band
from vla_energy.rerank import scoring
from vla_energy.results import SHAPES, write_json

if TYPE_CHECKING:
    from vla_energy.monitors import Batch, RankingReport

FRAMES = 3
_PLANE, _STEPS = 25, 31  # the plane: 1 more than a multiple of 3 and odd, so that both chunks are on the grid
_DIGITS = 5


class FirstBatch:
    """Passes batches on and keeps the first; iterated once.

    Attributes:
        first: None before the iteration.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self.first: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            if self.first is None:
                self.first = batch
            yield batch


def halves(episodes: Tensor) -> tuple[Tensor, Tensor]:
    """`(M,)` bool of frames that calibrate and of those that judge: every other of the `episodes (M,)`."""
    _, rank = episodes.unique(return_inverse=True)
    return rank % 2 == 0, rank % 2 == 1


def write_shapes(
    folder: Path,
    head: EnergyHead,
    batches: FirstBatch,
    places: Sequence[tuple[str, int]],
    report: RankingReport,
    episodes: Tensor,
    margin: float | None,
) -> Path:
    """Writes `SHAPES`, see the module.

    Args:
        folder: of the run.
        head: trained on these chunks.
        batches: what the report was made of, iterated.
        places: instruction and step of each of the M frames; an empty one and -1 where they are not known.
        report: of M frames.
        episodes: `(M,)`.
        margin: the calibrated one; None keeps the gate shut.

    Raises:
        OSError: the file cannot be written.
    """
    assert batches.first is not None
    _, rest = halves(episodes)
    gate = None
    if rest.any():
        policy = float(report.distances[rest, 0].mean())
        gate = {**margin_curve(report.energies[rest], report.distances[rest]), "l1_policy": policy, "chosen": margin}
    usable = report.energies.isfinite()
    counts = pairs_by_band(report.energies, report.distances, usable)
    bands = {band: right / pairs for band, (right, pairs) in counts.items() if pairs}
    frames = landscapes(head, batches.first, episodes, places)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SHAPES, {"frames": frames, "bands": bands, "gate": gate})
    return folder / SHAPES


def landscapes(
    head: EnergyHead, batch: Batch, episodes: Tensor, places: Sequence[tuple[str, int]]
) -> list[dict[str, Any]]:
    """`frames` of the module's text, of the batch's first frames of different episodes.

    A frame whose two chunks are equal, or not finite, has no plane and is passed over.

    Args:
        head: scores in eval mode.
        batch: B frames or more.
        episodes: `(B,)` or more, of these frames first.
        places: as in `write_shapes`.
    """
    context, mask, expert, layers = batch[:4]
    policy = layers[:, -1]
    apart = (expert - policy).flatten(1).abs().amax(1)
    rows: dict[int, int] = {}
    for row in range(len(expert)):
        if 0 < float(apart[row]) < math.inf and len(rows) < FRAMES:
            rows.setdefault(int(episodes[row]), row)
    if not rows:
        return []
    picked = torch.tensor(list(rows.values()), device=expert.device)
    policy, expert = policy[picked], expert[picked]
    with scoring(head):
        encoded = head.encode(context[picked], mask[picked], policy)
        draw = torch.Generator().manual_seed(0)
        plane = plane_slice(lambda chunks: head(encoded, chunks), policy, expert, resolution=_PLANE, generator=draw)
        xs, along = step_slice(lambda chunks: head(encoded, chunks), policy, expert, resolution=_STEPS)
    return [
        {
            "task": places[row][0], "episode": episode, "step": int(places[row][1]),
            "plane": {"xs": _short(plane.xs), "ys": _short(plane.ys), "energies": _short(plane.energies[index])},
            "time": {"xs": _short(xs), "energies": _short(along[index])},
        }
        for index, (episode, row) in enumerate(rows.items())
    ]  # fmt: skip


def _short(values: Tensor) -> list[Any]:
    """Nested lists of numbers with few digits: a picture needs no more."""
    if values.ndim > 1:
        return [_short(row) for row in values]
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]
