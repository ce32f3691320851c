"""Memory and communication of fine-tuning OpenVLA-7B on many GPUs, by formulae, and the formulae as text.

Parameters are counted on our own modules without memory (device "meta"); everything else is arithmetic with the
constants below, which the text names. Nothing here was measured on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vla_energy.backbones.config import OpenVLAConfig
from vla_energy.backbones.openvla import OpenVLA
from vla_energy.config import EnergyConfig
from vla_energy.head import EnergyHead

BEGIN, END = "<!-- plan -->", "<!-- /plan -->"
D, FFN, LAYERS, HORIZON, A, PROPRIO = 4096, 11008, 32, 8, 7, 8
TOKENS = 600  # two images of 256 patches, BOS, proprio, prompt, 56 action tokens, stop
ROWS, CANDIDATES, RANK = 8, 24, 32
GB = 1e9
FLOPS = 0.4 * 312e12  # of an A100 in bf16, at 40 percent
NVLINK, NETWORK = 200e9, 20e9  # bytes/s that a GPU sends: within a machine, and between machines

_SEVEN_B = {
    "model_type": "openvla",
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "image_sizes": [224, 224],
    "timm_override_act_layers": [None, None],
    "text_config": {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000},
    "n_action_bins": 256,
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
}


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: backbone, of it decoder layers, LoRA, of it in those, action head and proprio, head."""

    backbone: int
    layers: int
    lora: int
    lora_layers: int
    components: int
    head: int

    @property
    def trained(self) -> int:
        """All that have a gradient in a LoRA fine-tuning."""
        return self.lora + self.components + self.head


def sizes() -> Sizes:
    """Of OpenVLA-7B in openvla-oft's shape."""
    with torch.device("meta"):
        vla = OpenVLA(OpenVLAConfig.from_dict(_SEVEN_B), A, proprio_dim=PROPRIO, num_images=2, horizon=HORIZON)
        head = EnergyHead(D, A, HORIZON, EnergyConfig())
    lora = lora_layers = 0
    for name, module in vla.backbone.named_modules():
        if name.endswith("lm_head"):
            continue
        if isinstance(module, nn.Linear):
            lora += (added := RANK * (module.in_features + module.out_features))
            lora_layers += added if ".layers." in name and "language_model" in name else 0
        elif isinstance(module, nn.Conv2d):  # as peft: a convolution of rank channels, then one of 1 x 1
            lora += RANK * (module.weight[0].numel() + module.out_channels)
    total, backbone = (sum(p.numel() for p in module.parameters()) for module in (vla, vla.backbone))
    layers = sum(p.numel() for p in vla.backbone.language_model.model.layers.parameters())
    head_size = sum(p.numel() for p in head.parameters())
    return Sizes(backbone, layers, lora, lora_layers, total - backbone, head_size)


def activations(rows: int) -> float:
    """Bytes kept for the backward pass by the language model: a lower bound, without checkpointing."""
    return rows * TOKENS * LAYERS * 2 * (8 * D + 4 * FFN)


def ring(payload: float, ranks: int) -> float:
    """Bytes that each rank sends in an all-reduce; all-gather and reduce-scatter send half."""
    return 2 * (ranks - 1) / ranks * payload


def gathered(rows: int, ranks: int) -> dict[str, float]:
    """Bytes that each rank sends for the objective in a step, and what contexts would be."""
    chunk = HORIZON * A * 4
    exits = LAYERS + 1
    return {
        "chunks": (ranks - 1) * rows * (1 + exits) * chunk,
        "energies and centres": (ranks - 1) * rows * ((1 + CANDIDATES) * 4 + 2 * chunk),
        "contexts, which stay": (ranks - 1) * rows * TOKENS * D * 2,
    }


def plan() -> str:
    """Everything as Markdown."""
    found = sizes()
    return "\n".join([*_parameters(found), *_memory(found), *_communication(found)])


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]


def _gb(count: float) -> str:
    return f"{count / GB:.1f}" if count >= 0.05 * GB else f"{count / GB:.3f}"


def _parameters(found: Sizes) -> list[str]:
    rows = [
        ["backbone P (frozen under LoRA)", f"{found.backbone / 1e6:,.0f} M"],
        ["of it in the decoder layers, P'", f"{found.layers / 1e6:,.0f} M"],
        [f"LoRA, rank {RANK}", f"{found.lora / 1e6:,.1f} M"],
        ["L1 action head and proprio projector", f"{found.components / 1e6:,.1f} M"],
        ["energy head", f"{found.head / 1e6:,.2f} M"],
        ["trained under LoRA in all, T", f"{found.trained / 1e6:,.1f} M"],
        ["of it in the decoder layers, T'", f"{found.lora_layers / 1e6:,.1f} M"],
    ]
    return ["### Parameters, counted on our modules", "", *_table(["", "parameters"], rows)]


def _memory(found: Sizes) -> list[str]:
    states, rows = 16 * found.trained, []
    rest, every = found.backbone - found.layers, found.backbone + found.components + found.head
    unit = (4 * D * D + 3 * D * FFN) * 2  # one decoder layer in bf16
    kept = activations(ROWS)

    def sharded(ranks: int) -> tuple[float, float]:
        """Frozen and trained under LoRA with --fsdp True."""
        trained = 16 * (found.trained - found.lora_layers + found.lora_layers / ranks)
        return 6 * rest + 4 * found.layers / ranks + unit, trained

    def all_sharded(ranks: int) -> tuple[float, float]:
        """The same where every weight is trained."""
        return 2 * rest + unit, 16 * (every - found.layers + found.layers / ranks)

    arms = {
        "LoRA, replicated, weights in fp32 (what the script does)": (6 * found.backbone, states),
        "LoRA, `--fsdp True` on 8": sharded(8),
        "LoRA, `--fsdp True` on 64": sharded(64),
        "every weight, replicated, fp32": (2 * found.backbone, 16 * every),
        "every weight, `--fsdp True` on 8": all_sharded(8),
        "every weight, `--fsdp True` on 64": all_sharded(64),
    }
    for name, (weights, trained) in arms.items():
        total = weights + trained + kept
        rows.append([name, _gb(weights), _gb(trained), _gb(kept), f"{_gb(total)}{'' if total < 80 * GB else ' > 80'}"])
    return [
        f"### Memory of one GPU, GB ({ROWS} rows each)",
        "",
        "- frozen weights: 4 P in fp32, and 2 P of bf16 copies that autocast keeps for the backward pass. With",
        "  `--fsdp True` on N GPUs `6 (P - P') + 4 P' / N`, and one decoder layer in bf16, `2 (4 D^2 + 3 D F)`: a",
        "  gathered layer goes after use. Where every weight is trained the column has the copies alone.",
        "- trained weights: 16 bytes each (fp32 weight, gradient, Adam's two moments); of those in the decoder layers",
        "  16 / N with `--fsdp True`.",
        f"- activations: `rows * S * L * 2 * (8 D + 4 F)` with S={TOKENS}, L={LAYERS}, D={D}, F={FFN}: for each token",
        "  and layer in bf16 the inputs of both norms and of q/k/v, q, k, v, the attention's output, the residual and",
        "  the MLP's input, gate, up, their product and the activation. A lower bound: vision towers, LoRA's own and",
        "  the allocator's waste are not in it.",
        "",
        *_table(["", "frozen and copies", "trained", "activations", "sum"], rows),
    ]


def _communication(found: Sizes) -> list[str]:
    compute = 4 * found.backbone * ROWS * TOKENS / FLOPS
    full = 6 * found.backbone * ROWS * TOKENS / FLOPS
    rows = []
    for ranks, speed in ((8, NVLINK), (64, NETWORK)):
        own = gathered(ROWS, ranks)
        chunks = own["chunks"] + own["energies and centres"]
        gathers = 2 * ring(2 * found.layers, ranks) / 2  # an all-gather in the forward pass, and one in the backward
        rest = found.backbone - found.layers
        arms = {
            "LoRA, replicated": (ring(4 * found.trained, ranks) + chunks, compute),
            "LoRA, `--fsdp True`": (
                gathers
                + ring(2 * found.lora_layers, ranks)
                + ring(4 * (found.trained - found.lora_layers), ranks)
                + ring(4 * found.lora_layers, ranks) / 2
                + chunks,
                compute,
            ),
            "every weight, replicated": (ring(4 * found.backbone, ranks) + chunks, full),
            "every weight, `--fsdp True`": (
                gathers + ring(4 * found.layers, ranks) / 2 + ring(4 * rest, ranks) + chunks,
                full,
            ),
        }
        for name, (sent, busy) in arms.items():
            seconds = sent / speed
            rows.append(
                [f"{ranks}", name, _gb(sent), f"{1e3 * seconds:,.0f}", f"{1e3 * busy:,.0f}", f"{seconds / busy:.0%}"]
            )
    exchange = []
    for ranks in (8, 64):
        exchange += [[f"{ranks}", name, f"{count / 1e6:,.2f}"] for name, count in gathered(ROWS, ranks).items()]
    return [
        "### Communication of a step, sent by each GPU",
        "",
        "- an all-reduce of n bytes over N ranks sends `2 (N - 1) / N * n` (ring); an all-gather or a reduce-scatter",
        "  half of it.",
        "- replicated: all-reduce of 4 T bytes (fp32 gradients), once a step, after the backward pass.",
        "- `--fsdp True`: the decoder layers' weights in bf16 gathered twice (forward and backward), 2 P' each; the",
        "  gradients of those that are trained by a reduce-scatter in fp32, all others as above.",
        "- arithmetic: `4 P * rows * S` FLOPs with frozen weights, `6 P * rows * S` with every weight, at",
        f"  {FLOPS / 1e12:.0f} TFLOP/s (40 percent of an A100). Links: {NVLINK / 1e9:.0f} GB/s within a machine (N =",
        f"  8), {NETWORK / 1e9:.0f} GB/s a GPU between machines (N = 64, a flat ring: its slowest link decides).",
        "  Assumed, not measured. Share: of the arithmetic's time, not hidden behind it.",
        "",
        *_table(["N", "", "GB", "ms", "arithmetic, ms", "share"], rows),
        "What the energy head exchanges for global negatives, beside what a gather of contexts would:",
        "",
        "- chunks: `(N - 1) * rows * (1 + L + 1) * H * A * 4` (expert, and every layer's); energies:",
        f"  `(N - 1) * rows * (1 + {CANDIDATES}) * 4`, centres `2 H A * 4`; contexts would be",
        "  `(N - 1) * rows * S * D * 2`.",
        "",
        *_table(["N", "", "MB"], exchange),
    ]  # fmt: skip
