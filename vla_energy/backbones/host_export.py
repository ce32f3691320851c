"""A folder of our tiny model as openvla-oft's own code can load it: `python -m vla_energy.backbones.host_export`.

openvla-oft has three of Llama-2's token ids in its code: 29871 behind every prompt, 2 at the end, actions above 31743.
The tiny model's vocabulary has 832 rows and ids of its own. The export gives it Llama's 32,064 rows and puts those that
the host asks for where it looks; the text's tokens, every other weight and every answer stay the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vla_energy.backbones.config import LLAMA_EMPTY_TOKEN, CheckpointFolderError, OpenVLAConfig, read_json
from vla_energy.backbones.weights import open_to_readers, read_weights

LLAMA_VOCAB, LLAMA_PADDING = 32000, 64
"""Tokens of Llama-2, and the rows that openvla adds to its embedding."""

_BY_TOKEN = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_REPLACED = ("config.json", "preprocessor_config.json", "tokenizer.json")


def has_llama_ids(config: OpenVLAConfig) -> bool:
    """Whether openvla-oft finds its token ids in a checkpoint as it is."""
    return config.empty_token_id == LLAMA_EMPTY_TOKEN or config.vocab_size > LLAMA_EMPTY_TOKEN


def export_for_host(folder: str | Path, target: str | Path) -> Path:
    """Writes the checkpoint with Llama's token ids; `load_openvla` reads it as before.

    Action head, projector, statistics, energy head, memory and gates are copied. The host must also know the vision
    towers' names (`timm_models.register`), and its chunk length for LIBERO is 8.

    Args:
        folder: of a merged checkpoint with a vocabulary of its own.
        target: is created.

    Raises:
        CheckpointFolderError: the folder is damaged, unmerged, or has Llama's ids already.
        FileExistsError: `target` is there.
    """
    folder, target = Path(folder), Path(target)
    config = OpenVLAConfig.from_folder(folder)
    if has_llama_ids(config):
        raise CheckpointFolderError(f"{folder} has Llama's token ids already: openvla-oft loads it as it is")
    if (folder / "lora_adapter").is_dir():
        raise CheckpointFolderError(f"{folder} has LoRA adapters beside its weights; export a merged checkpoint")
    images, tokenizer = (read_json(folder / name) for name in _REPLACED[1:])
    state = read_weights(folder)
    for name in _BY_TOKEN:
        if name not in state:
            raise CheckpointFolderError(f"{folder}: the weights lack {name}")
        state[name] = _with_llama_ids(state[name], config)
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and path.name not in _REPLACED and not path.name.startswith("model"):
            shutil.copyfile(path, target / path.name)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    text = {**config.raw["text_config"], "vocab_size": LLAMA_VOCAB + LLAMA_PADDING}
    written = {**config.raw, "text_config": text, "pad_to_multiple_of": LLAMA_PADDING}
    (target / "config.json").write_text(json.dumps(written, indent=2))
    open_to_readers(target)
    # Without the processor's class the host's AutoProcessor answers with the image processor alone.
    images["processor_class"] = "PrismaticProcessor"
    (target / "preprocessor_config.json").write_text(json.dumps(images, indent=2))
    (target / "tokenizer.json").write_text(json.dumps(_with_old_merges(tokenizer), ensure_ascii=False))
    return target


def _with_old_merges(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Merges as text "a b": tokenizers 0.19, which the host pins, cannot read the pairs that later ones write."""
    model = dict(tokenizer["model"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {**tokenizer, "model": {**model, "merges": merges}}


def _with_llama_ids(rows: Tensor, config: OpenVLAConfig) -> Tensor:
    """`(32064, D)`: our rows where they were, the action bins and the empty token where the host looks for them."""
    new = rows.new_zeros(LLAMA_VOCAB + LLAMA_PADDING, rows.shape[1])
    new[: len(rows)] = rows
    bins = rows[config.vocab_size - config.n_action_bins : config.vocab_size]
    new[LLAMA_VOCAB - len(bins) : LLAMA_VOCAB] = bins
    new[LLAMA_EMPTY_TOKEN] = rows[config.empty_token_id]
    assert torch.isfinite(new).all()
    return new.contiguous()


def main() -> int:
    """Exit code 2 after an error of ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of the tiny model, fine-tuned or not")
    parser.add_argument("target", type=Path, help="folder to make")
    args = parser.parse_args()
    try:
        print(export_for_host(args.checkpoint, args.target))
    except (CheckpointFolderError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
