"""Images, instructions, actions and proprioception to the host's batch keys, and back to a prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vla_energy.backbones.config import CheckpointFolderError, OpenVLAConfig, read_json
from vla_energy.backbones.sequence import STOP_ID, append_actions

_EMPTY_TOKEN = "▁"
_STOP_TOKEN = "</s>"


def prompt(instruction: str) -> str:
    """The host's prompt for an instruction, which it puts in lower case."""
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


class Processor:
    """Makes batches for `OpenVLA`.

    Args:
        config: of the checkpoint.
        tokenizer: of the checkpoint, adding BOS by itself.
        means, stds: `(towers, 3)`, normalisation of each tower's channels.

    Raises:
        CheckpointFolderError: the tokenizer's stop or empty token is not the checkpoint's.
        ValueError: not 3 means and stds a tower.
    """

    def __init__(self, config: OpenVLAConfig, tokenizer: Tokenizer, means: Sequence[Any], stds: Sequence[Any]) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.image_size = config.image_sizes[0]
        self._mean = torch.tensor(means, dtype=torch.float32).reshape(-1, 1, 1)
        self._std = torch.tensor(stds, dtype=torch.float32).reshape(-1, 1, 1)
        if not len(self._mean) == len(self._std) == 3 * len(config.image_sizes):
            raise ValueError(f"{len(self._mean)} means and {len(self._std)} stds for {len(config.image_sizes)} towers")
        for token, wanted in ((_EMPTY_TOKEN, config.empty_token_id), (_STOP_TOKEN, STOP_ID)):
            if tokenizer.token_to_id(token) != wanted:
                found = tokenizer.token_to_id(token)
                raise CheckpointFolderError(
                    f"tokenizer.json's {token!r} has id {found}, config.json needs {wanted}: one of them is another's"
                )

    @classmethod
    def from_folder(cls, folder: str | Path, config: OpenVLAConfig | None = None) -> Processor:
        """Reads `tokenizer.json` and `preprocessor_config.json` of a checkpoint folder.

        Raises:
            CheckpointFolderError: a file is missing or damaged; the message names it.
        """
        folder = Path(folder)
        config = config or OpenVLAConfig.from_folder(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointFolderError(f"{path} not found; the checkpoint's tokenizer is needed for prompts")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust binding raises bare Exception
            raise CheckpointFolderError(f"{path} is not a tokenizer: {error}") from error
        tokenizer.no_padding()
        images = read_json(folder / "preprocessor_config.json")
        try:
            return cls(config, tokenizer, images["means"], images["stds"])
        except KeyError as error:
            raise CheckpointFolderError(f"{folder / 'preprocessor_config.json'}: missing key {error}") from error
        except CheckpointFolderError:
            raise
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointFolderError(
                f"{folder / 'preprocessor_config.json'}: means and stds are not 3 numbers for each tower ({error})"
            ) from error

    def prompt_ids(self, instruction: str) -> list[int]:
        """Tokens of the prompt with BOS, ending in the empty token as the policy was trained with."""
        ids = self.tokenizer.encode(prompt(instruction)).ids
        return ids if ids[-1] == self.config.empty_token_id else [*ids, self.config.empty_token_id]

    def pixel_values(self, images: np.ndarray) -> Tensor:
        """uint8 images `(B, images, h, w, 3)` to normalised `(B, channels * images, height, width)` float32.

        Raises:
            ValueError: wrong shape or dtype.
        """
        if images.dtype != np.uint8 or images.ndim != 5 or images.shape[-1] != 3:
            raise ValueError(f"images must be uint8 (B, images, h, w, 3), got {images.dtype} {images.shape}")
        batch, count = images.shape[:2]
        if images.shape[2:4] != self.image_size:
            height, width = self.image_size
            frames = [Image.fromarray(image) for image in images.reshape(-1, *images.shape[2:])]
            resized = [np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)) for frame in frames]
            images = np.stack(resized).reshape(batch, count, height, width, 3)
        pixels = torch.tensor(images).permute(0, 1, 4, 2, 3).float() / 255
        towers = len(self._mean) // 3
        normalised = (pixels.repeat(1, 1, towers, 1, 1) - self._mean) / self._std
        return normalised.flatten(1, 2)

    def action_ids(self, actions: Tensor) -> Tensor:
        """Discrete tokens of normalised actions `(B, H, A)` -> `(B, H*A)`; bin edges as in the host."""
        edges = torch.linspace(-1, 1, self.config.n_action_bins, dtype=torch.float64)
        bins = torch.bucketize(actions.double().clamp(-1, 1), edges, right=True)
        return (self.config.vocab_size - bins).flatten(1)

    def batch(
        self,
        images: np.ndarray,
        instructions: Sequence[str],
        actions: Tensor | np.ndarray | None = None,
        proprio: Tensor | np.ndarray | None = None,
    ) -> dict[str, Tensor]:
        """A batch with the host's keys, padded on the right.

        Args:
            images: uint8 `(B, images, h, w, 3)`, main camera first.
            instructions: B strings.
            actions: normalised `(B, H, A)` for training; without them the batch is for `OpenVLA.predict`.
            proprio: normalised `(B, P)` or None.
        """
        prompts = [torch.tensor(self.prompt_ids(instruction)) for instruction in instructions]
        input_ids = pad_sequence(prompts, batch_first=True, padding_value=self.config.pad_token_id)
        lengths = torch.tensor([len(ids) for ids in prompts])
        attention_mask = torch.arange(input_ids.shape[1])[None] < lengths[:, None]
        batch = {
            "pixel_values": self.pixel_values(images),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
        }
        if actions is not None:
            batch["actions"] = _float_tensor(actions)
            batch.update(append_actions(batch, self.action_ids(batch["actions"]), STOP_ID, self.config.pad_token_id))
        if proprio is not None:
            batch["proprio"] = _float_tensor(proprio)
        return batch


def _float_tensor(values: Tensor | np.ndarray) -> Tensor:
    """A float32 copy; TensorFlow's arrays are read-only, which torch does not support."""
    return values.float() if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float32)
