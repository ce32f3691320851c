"""Where is the ceiling of choosing among candidates? Closed loop, with the scripted expert as judge of each decision.

    python benchmarks/oracle.py --checkpoint DIR --tasks a,b,c --episodes 25 --out FILE

Arms: `policy`; `oracle-<mode>`, the candidate of that mode (the policy's chunk among them) that is nearest, over the
actions that are executed, to what the expert would do from here; and `expert`, its own actions. No robot can run these.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from closed_loop_tables import arm_table, task_table
from oracle_metaworld import AHEAD

from vla_energy.actions import RawActions
from vla_energy.data.metaworld_env import SimulatorError
from vla_energy.modes import Frame
from vla_energy.rollout.interface import Decision, Request
from vla_energy.rollout.policy import CheckpointPolicy
from vla_energy.rollout.run import run_rollouts

BACKEND = "oracle_metaworld:OracleMetaWorld"
MODES = ("rerank", "retrieve", "rerank+retrieve")


class OraclePolicy(CheckpointPolicy):
    """A checkpoint with the expert's choice among its candidates as further arms; what fails is raised.

    Raises:
        ValueError: its head asks for candidates that the oracle does not make.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, strict=True)
        candidates = self._head_config().candidates
        more = [name for name in ("overlap", "crops", "samples") if getattr(candidates, name)]
        if more or self._vla.diffuses:
            raise ValueError(
                f"{folder}: the oracle chooses among the policy's chunk, inner layers, noise and retrieved chunks, "
                f"not {', '.join(more) or 'samples of a diffusion head'}"
            )

    @property
    def arms(self) -> frozenset[str]:
        """Those of the checkpoint, `oracle-<mode>` and `expert`."""
        return super().arms | {f"oracle-{mode}" for mode in MODES if mode in self._advisor.modes} | {"expert"}

    @torch.no_grad()
    def act(self, requests: Sequence[Request], arm: str) -> list[Decision]:
        """As the checkpoint's, and the expert's choice."""
        if arm == "expert":
            return [Decision(RawActions(self._filled(request))) for request in requests]
        if not arm.startswith("oracle-"):
            return super().act(requests, arm)
        output = self._vla.predict(self._batch(requests), "raw")
        frame = Frame(output.context, output.context_mask, output.actions, output.layer_actions)
        proposal = self._advisor.propose(arm.removeprefix("oracle-"), frame, [each.generator for each in requests])
        own = torch.stack([output.actions, proposal.actions], 1)
        chunks = own if proposal.candidates is None else proposal.candidates.actions
        expert = torch.stack([self._statistics.normalize(RawActions(self._filled(each))) for each in requests])
        errors = (chunks - expert.to(chunks)[:, None])[:, :, :AHEAD].abs().mean((2, 3))
        errors = errors.masked_fill(~errors.isfinite(), torch.inf)
        best = errors.argmin(1)
        return [
            Decision(
                self._statistics.unnormalize(chunks[row, index]),
                bool(index),
                {"l1": float(errors[row, 0]), "l1_best": float(errors[row, index])},
            )
            for row, index in enumerate(best.tolist())
        ]

    def _filled(self, request: Request) -> np.ndarray:
        """`(H,A)` raw: the expert's actions, the last one repeated."""
        actions = request.observation.extras["expert"].reshape(AHEAD, -1)
        return np.concatenate([actions, np.repeat(actions[-1:], self.horizon - AHEAD, 0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--tasks", required=True, help="comma-separated")
    parser.add_argument("--episodes", type=int, default=25)
    parser.add_argument(
        "--arms", default=",".join(["policy", "retrieve", *(f"oracle-{mode}" for mode in MODES), "expert"])
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/oracle.json"))
    args = parser.parse_args()
    if "@" in args.arms:
        sys.exit(f"error: --arms {args.arms}: the expert is known for the {AHEAD} steps of a decision, without @n")
    try:
        result = run_rollouts(
            OraclePolicy(args.checkpoint), args.tasks.split(","), args.episodes, args.arms.split(","), args.seed, AHEAD,
            workers=args.workers, backend=BACKEND, out=args.out,
        )  # fmt: skip
    except (ValueError, OSError, SimulatorError) as error:
        sys.exit(f"error: {error}")
    print(arm_table([result]), task_table(result), sep="\n\n")


if __name__ == "__main__":
    main()
