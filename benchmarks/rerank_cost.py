"""What choosing costs at inference, beside the tiny policy's forward: scoring 1 and 64 candidates, each mode whole.

    python benchmarks/rerank_cost.py [--quick] [--checkpoint DIR] [--out runs/bench/rerank_cost.json]

Rounds of all measurements interleaved in one run, one thread, one observation a time as a robot asks; medians and
their ratios, which other load on the machine moves little. Without a checkpoint: the shipped policy, an untrained head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vla_energy.config import EnergyConfig
from vla_energy.finetune.config import EMBEDDED
from vla_energy.finetune.frames import FrameReader
from vla_energy.finetune.setup import EMBEDDED_DATA
from vla_energy.gates import load_advisor
from vla_energy.head import EnergyHead
from vla_energy.modes import Advisor, Frame
from vla_energy.rerank import Reranker, scoring

CANDIDATES = 64


def measurements(reader: FrameReader, advisor: Advisor) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each call does it once for one observation."""
    frames = next(reader.read("val", 1, batch_size=1))
    assert advisor.reranker is not None
    frame = Frame(frames.context, frames.context_mask, frames.policy, frames.layer_actions)
    head, vla = advisor.reranker.head, reader.vla
    with scoring(head):
        encoded = head.encode(frames.context, frames.context_mask, frames.policy)
    one = frames.policy[:, None]
    many = one.expand(-1, CANDIDATES, -1, -1) + 0.05 * torch.randn(1, CANDIDATES, *one.shape[2:])
    size = vla.processor.image_size
    batch = vla.processor.batch(
        torch.zeros(1, reader.num_images, *size, 3, dtype=torch.uint8).numpy(), frames.instructions,
        proprio=torch.zeros(1, reader.proprio_dim) if reader.proprio_dim else None,
    )  # fmt: skip

    def score(actions: torch.Tensor) -> Callable[[], object]:
        def run() -> object:
            with scoring(head):
                return head(encoded, actions)

        return run

    table = {
        "policy's forward": lambda: vla.predict(batch, "off"),
        "encode": lambda: head.encode(frames.context, frames.context_mask, frames.policy),
        "score 1": score(one),
        f"score {CANDIDATES}": score(many),
    }
    for mode in advisor.modes:
        table[mode] = lambda mode=mode: advisor.propose(mode, frame, [torch.Generator()])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30 rounds instead of 300")
    parser.add_argument("--checkpoint", default=EMBEDDED)
    parser.add_argument("--data_root_dir", default=str(EMBEDDED_DATA))
    parser.add_argument("--dataset_name", default="metaworld_demo")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/rerank_cost.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    reader = FrameReader(args.checkpoint, args.data_root_dir, args.dataset_name)
    vla = reader.vla
    if args.checkpoint == EMBEDDED:
        head = EnergyHead(vla.context_dim, vla.action_dim, vla.horizon, EnergyConfig()).eval()
        advisor = Advisor(Reranker(head, reader.statistics, EnergyConfig()))
    else:
        advisor = load_advisor(args.checkpoint, reader.statistics, vla.horizon, vla.action_dim, vla.context_dim)
    table = measurements(reader, advisor)
    seconds: dict[str, list[float]] = {name: [] for name in table}
    with torch.no_grad():
        for index in range((30 if args.quick else 300) + 5):
            for name, run in table.items():
                started = time.perf_counter()
                run()
                if index >= 5:
                    seconds[name].append(time.perf_counter() - started)
    medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    forward = medians["policy's forward"]
    print("| | ms | of the policy's forward |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {100 * median / forward:.0f} % |")
    print(f"{CANDIDATES} candidates cost {medians[f'score {CANDIDATES}'] / medians['score 1']:.2f} times one, "
          f"with the encoding {(medians[f'score {CANDIDATES}'] + medians['encode']) / (medians['score 1'] + medians['encode']):.2f}")  # fmt: skip  # noqa: E501
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"ms": medians, "checkpoint": args.checkpoint}, indent=1) + "\n")


if __name__ == "__main__":
    main()
