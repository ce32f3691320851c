"""Which instruction a host's model is being asked to follow: read back from the tokens that it embeds.

openvla-oft hands its action head hidden states alone. The prompt's tokens pass through the model's input embedding, so
a hook there sees them, and no line of the host has to tell.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vla_energy.hosts.hidden_states import HostError

PROMPT = "In: What action should the robot take to {}?\nOut:"
"""openvla-oft's prompt; the instruction is in lower case."""
_INSTRUCTION = re.compile(r"What action should the robot take to (.*)\?\s*Out:", re.DOTALL)


class Instructions:
    """Keeps the tokens of the last call of a model's input embedding, and reads the instructions in them.

    Args:
        model: the host's VLA, with `get_input_embeddings()`.
        folder: of its checkpoint, with `tokenizer.json`.

    Raises:
        HostError: no such file, no tokenizers package, or a tokenizer that does not give its text back.
    """

    def __init__(self, model: Any, folder: str | Path) -> None:
        self._tokenizer = _load_tokenizer(Path(folder) / "tokenizer.json")
        sample = "put the black bowl on the plate"
        # Found here, where it stops the run: the host's episodes swallow every exception.
        if self._read(self._tokenizer.encode(PROMPT.format(sample)).ids) != sample:
            raise HostError(f"{folder}: the tokenizer does not give back the text that it was given")
        self._ids: Tensor | None = None
        model.get_input_embeddings().register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Nothing may be raised in here, where no fallback is: `take` tells that there was no prompt.
        self._ids = args[0].detach() if args else None

    def take(self) -> list[str]:
        """The instruction of each of B prompts, in lower case; they are forgotten here.

        Raises:
            HostError: nothing was embedded since the last call, or not openvla-oft's prompt.
        """
        ids, self._ids = self._ids, None
        if ids is None:
            raise HostError("the model embedded no prompt since the last one was taken")
        return [self._read(row) for row in ids.tolist()]

    def _read(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        found = _INSTRUCTION.search(text)
        if found is None:
            raise HostError(f"no instruction in the prompt {text!r}: expected {PROMPT.format('...')!r}")
        return found[1].lower()


def _load_tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise HostError("--energy.mode recommended reads instructions: pip install tokenizers") from error
    if not path.is_file():
        raise HostError(f"{path} not found; --energy.mode recommended reads instructions with it")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust binding raises bare Exception
        raise HostError(f"{path} is no tokenizer that this environment can read: {error}") from error
