"""`config.json` and `preprocessor_config.json` of an OpenVLA(-OFT) checkpoint folder, read without remote code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_energy.checkpoint import run_hint
from vla_energy.results import require_regular

DEFAULT_HORIZON = 8
"""Chunk length of a checkpoint whose config does not say: the host's LIBERO constant."""
DEFAULT_DIFFUSION_STEPS = 50
"""Steps of a diffusion head of which config.json does not tell: the host's default."""
LLAMA_EMPTY_TOKEN = 29871
"""Llama-2's token for the blank after "Out:"."""

_OWN_KEY = "vla_energy"  # our section in config.json; the host ignores keys it does not know
_DIFFUSION_KEYS = ("num_diffusion_steps_train", "num_diffusion_steps_inference")


class CheckpointFolderError(ValueError):
    """A checkpoint folder lacks a file, or a file in it is damaged or does not fit the rest."""


class ComponentError(CheckpointFolderError):
    """Action head or proprio projector: there is none where one is needed, or more than one."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; CheckpointFolderError names the file if that fails."""
    try:
        require_regular(path)
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        hint = run_hint(path.parent) or f"; is {path.parent} an OpenVLA checkpoint folder?"
        raise CheckpointFolderError(f"{path} not found{hint}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointFolderError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise CheckpointFolderError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointFolderError(f"{path}: expected a JSON object")
    return data


@dataclass(frozen=True)
class OpenVLAConfig:
    """What the native backbone needs of `config.json`.

    Attributes:
        timm_model_ids: vision towers, one or (fused) two.
        image_sizes: `(height, width)` of each tower's input, pixels.
        act_layers: activation override of each tower, or None.
        text: keyword arguments of transformers' `LlamaConfig`.
        n_action_bins: bins of the discrete action tokens.
        pad_to_multiple_of: rows the embedding has beyond the tokenizer's vocabulary.
        pad_token_id: id of the padding token.
        empty_token_id: the token that stands after "Out:" (29871 in Llama-2).
        horizon: chunk length H.
        num_images: images an observation had in training.
        center_crop: whether the policy expects centre-cropped images.
        discrete_action_dim: A of a policy that was trained with discrete action tokens here; else None.
        use_film: whether the policy was trained with FiLM here.
        num_diffusion_steps_train, num_diffusion_steps_inference: of a diffusion head, see `NoiseSchedule`.
        raw: the whole JSON object, so that saving loses no key.
    """

    timm_model_ids: tuple[str, ...]
    image_sizes: tuple[tuple[int, int], ...]
    act_layers: tuple[str | None, ...]
    text: dict[str, Any]
    n_action_bins: int
    pad_to_multiple_of: int
    pad_token_id: int
    empty_token_id: int
    horizon: int
    num_images: int
    center_crop: bool
    discrete_action_dim: int | None
    use_film: bool
    num_diffusion_steps_train: int
    num_diffusion_steps_inference: int
    raw: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Tokens the tokenizer knows, without the embedding's padding rows."""
        return int(self.text["vocab_size"]) - self.pad_to_multiple_of

    @property
    def action_token_begin(self) -> int:
        """Ids above this one are action tokens (31743 for Llama-2 with 256 bins)."""
        return self.vocab_size - self.n_action_bins - 1

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> OpenVLAConfig:
        """Raises CheckpointFolderError naming a missing key, a value of a wrong type or an unsupported model type."""
        try:
            return cls._from_dict(data, where)
        except CheckpointFolderError:
            raise
        except (TypeError, ValueError, AttributeError, IndexError, KeyError, OverflowError) as error:
            raise CheckpointFolderError(f"{where}: a value has a wrong type ({error})") from error

    @classmethod
    def _from_dict(cls, data: dict[str, Any], where: str) -> OpenVLAConfig:
        if data.get("model_type") != "openvla":
            raise CheckpointFolderError(f"{where}: model_type is {data.get('model_type')!r}, expected 'openvla'")
        try:
            ids = tuple(data["timm_model_ids"])
            sizes = data["image_sizes"]
            text = dict(data["text_config"])
        except KeyError as error:
            raise CheckpointFolderError(f"{where}: missing key {error}") from error
        if text.pop("model_type", "llama") != "llama":
            raise CheckpointFolderError(f"{where}: only Llama language models are supported")
        pairs = tuple((size, size) if isinstance(size, int) else (int(size[0]), int(size[1])) for size in sizes)
        if not ids or len(pairs) < len(ids):
            raise CheckpointFolderError(f"{where}: {len(ids)} timm_model_ids but {len(pairs)} image_sizes")
        text.setdefault("vocab_size", 32064)
        own = data.get(_OWN_KEY, {})
        steps = int(own.get("num_diffusion_steps_train", DEFAULT_DIFFUSION_STEPS))
        return cls(
            timm_model_ids=ids,
            image_sizes=pairs[: len(ids)],
            act_layers=tuple(data.get("timm_override_act_layers") or [None] * len(ids)),
            text=text,
            n_action_bins=int(data.get("n_action_bins", 256)),
            pad_to_multiple_of=int(data.get("pad_to_multiple_of", 64)),
            pad_token_id=int(data.get("pad_token_id", 32000)),
            empty_token_id=int(own.get("empty_token_id", LLAMA_EMPTY_TOKEN)),
            horizon=int(own.get("horizon", DEFAULT_HORIZON)),
            num_images=int(own.get("num_images", 1)),
            center_crop=bool(own.get("center_crop", False)),
            discrete_action_dim=int(own["discrete_action_dim"]) if "discrete_action_dim" in own else None,
            use_film=bool(own.get("use_film", False)),
            num_diffusion_steps_train=steps,
            num_diffusion_steps_inference=int(own.get("num_diffusion_steps_inference", steps)),
            raw=data,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> OpenVLAConfig:
        """Reads `folder/config.json`."""
        return cls.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))

    def to_dict(
        self,
        horizon: int,
        num_images: int,
        center_crop: bool,
        *,
        discrete_action_dim: int | None = None,
        use_film: bool = False,
        diffusion: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """The JSON object to save: what was read, plus what the policy was trained with in our own section.

        Args:
            discrete_action_dim: A of a policy with discrete action tokens.
            use_film: whether the policy has FiLM.
            diffusion: steps of training and of inference, for a policy with a diffusion head.
        """
        kinds = (*_DIFFUSION_KEYS, "discrete_action_dim", "use_film")
        read = {key: value for key, value in self.raw.get(_OWN_KEY, {}).items() if key not in kinds}
        own = {"horizon": horizon, "num_images": num_images, "center_crop": center_crop}
        own |= {} if discrete_action_dim is None else {"discrete_action_dim": discrete_action_dim}
        own |= {"use_film": True} if use_film else {}
        own |= dict(zip(_DIFFUSION_KEYS, diffusion, strict=True)) if diffusion else {}
        return {**self.raw, _OWN_KEY: {**read, **own}}
