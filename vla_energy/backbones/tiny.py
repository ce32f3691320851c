"""The tiny OpenVLA that ships with the project: its architecture, tokenizer and random start.

Same code, same folder format as `openvla/openvla-7b`; only the numbers in `config.json` differ. The
trained weights are made from this start by `scripts/pretrain_tiny.py` (see their model card).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vla_energy.actions import DatasetStatistics
from vla_energy.backbones.config import OpenVLAConfig
from vla_energy.backbones.folder import save_openvla
from vla_energy.backbones.openvla import OpenVLA
from vla_energy.backbones.processor import prompt

EMBEDDED = Path(__file__).parent / "tiny_openvla"
"""Folder of the trained tiny checkpoint."""

IMAGE_SIZE = 96
VOCAB_SIZE = 768
"""Ids below it: 512 for text (most unused), 256 for action bins at the top, as in the host."""
_BINS = 256
_PADDING_ROWS = 64
_BOS, _EOS, _UNK, _PAD, _EMPTY = "<s>", "</s>", "<unk>", "<PAD>", "▁"


def make_tokenizer(instructions: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the prompts of `instructions`; it can spell any text.

    Llama's special ids are kept: `<unk>` 0, `<s>` 1, `</s>` 2.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=_UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - _BINS,
        special_tokens=[_UNK, _BOS, _EOS, _PAD, AddedToken(_EMPTY, normalized=False)],  # type: ignore[list-item]
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prompt(text) for text in instructions], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{_BOS} $A", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))]
    )
    return tokenizer


def make_config(tokenizer: Tokenizer, horizon: int) -> dict[str, Any]:
    """`config.json` of the tiny model: about 2.2 million parameters."""
    text = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "pad_token_id": tokenizer.token_to_id(_PAD),
        "vocab_size": VOCAB_SIZE + _PADDING_ROWS,
        "max_position_embeddings": 512,
        "initializer_range": 0.08,  # about 1 / sqrt(width); the 0.02 of wide models starts this one very slowly
    }
    return {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": "no-align+fused-gelu-mlp",
        "use_fused_vision_backbone": True,
        "timm_model_ids": ["vla_energy_tiny_dino", "vla_energy_tiny_siglip"],
        "timm_override_act_layers": [None, None],
        "image_sizes": [IMAGE_SIZE, IMAGE_SIZE],
        "image_resize_strategy": "resize-naive",
        "n_action_bins": _BINS,
        "pad_to_multiple_of": _PADDING_ROWS,
        "pad_token_id": tokenizer.token_to_id(_PAD),
        "text_config": text,
        "vla_energy": {"horizon": horizon, "empty_token_id": tokenizer.token_to_id(_EMPTY)},
    }


def write_random_start(
    folder: str | Path,
    instructions: Sequence[str],
    statistics: dict[str, DatasetStatistics],
    *,
    horizon: int,
    seed: int,
) -> Path:
    """Writes the untrained tiny checkpoint; action and proprio dimensions come from the statistics.

    Args:
        folder: is created.
        instructions: the tokenizer is trained on their prompts.
        statistics: one entry; its proprio statistics decide whether there is a proprio projector.
        horizon: H.
        seed: of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(instructions)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": _BOS, "eos_token": _EOS, "unk_token": _UNK, "pad_token": _PAD}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}, indent=2)
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    images = {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, IMAGE_SIZE, IMAGE_SIZE]] * 2,
        "interpolations": ["bicubic", "bicubic"],
        "means": [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]],
        "stds": [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2))
    (entry,) = statistics.values()
    config = OpenVLAConfig.from_dict(make_config(tokenizer, horizon))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vla = OpenVLA(
            config,
            action_dim=entry.action.dim,
            proprio_dim=None if entry.proprio is None else entry.proprio.dim,
        )
    return save_openvla(vla, folder, 0, processor_files=folder, statistics=statistics, dtype=torch.float32)
