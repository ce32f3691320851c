"""`--energy.mode recommended` in a host: the instruction, read back from the prompt's tokens, chooses the mode."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_hosts
import torch
from test_hosts import evaluation
from torch import Tensor

from vla_energy.gates import save_gates
from vla_energy.hosts.inference import recommended_modes
from vla_energy.hosts.openvla_oft import HostError, rerank_action_head
from vla_energy.hosts.prompts import PROMPT, Instructions

tokenizers = pytest.importorskip("tokenizers")
BOWL, STOVE, OTHER = "pick up the bowl", "turn on the stove", "close the drawer"


def write_tokenizer(folder: Path) -> Any:
    """Byte-level, with Llama's special tokens, BOS in front."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    specials = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROMPT.format(BOWL)], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


class Asked:
    """A host's evaluation with `recommended`, asked by instruction."""

    def __init__(self, tmp_path: Path, tasks: dict[str, str], margin: float = 0.0, strict: bool = False) -> None:
        self.vla, self.head, self.settings = evaluation(tmp_path, None, mode="recommended", strict=strict)
        folder = Path(self.settings.pretrained_checkpoint)
        save_gates(folder, {"rerank": margin, "refine": margin}, tasks)
        self.tokenizer = write_tokenizer(folder)

    def rerank(self) -> Any:
        return rerank_action_head(self.head, self.settings, self.vla)

    def ids(self, instruction: str) -> Tensor:
        """As the host builds them: the instruction in lower case, then the blank's id, known to Llama's files only."""
        return torch.tensor([[*self.tokenizer.encode(PROMPT.format(instruction.lower())).ids, 29871]])


def test_each_instruction_has_its_mode(tmp_path: Path) -> None:
    asked = Asked(tmp_path, {BOWL.upper(): "rerank", STOVE: "policy@8"})
    plain = {text: asked.vla.predict_action(asked.ids(text), asked.head) for text in (BOWL, STOVE, OTHER)}
    asked.settings.energy.mode = "rerank"
    wanted = asked.vla.predict_action(asked.ids(BOWL), asked.rerank())
    asked.settings.energy.mode = "recommended"
    reranked = asked.rerank()
    with torch.inference_mode():
        given = {text: asked.vla.predict_action(asked.ids(text), reranked) for text in (STOVE, BOWL, OTHER)}
    assert torch.equal(given[STOVE], plain[STOVE]) and torch.equal(given[OTHER], plain[OTHER])
    assert torch.equal(given[BOWL], wanted) and not torch.equal(wanted, plain[BOWL]), "the mode of this instruction"
    assert reranked.counts == {"chunks": 3, "accepted": 1}


def test_a_shut_gate_of_a_recommended_mode_changes_no_bit(tmp_path: Path) -> None:
    asked = Asked(tmp_path, {BOWL: "refine"}, margin=float("inf"))
    plain = asked.vla.predict_action(asked.ids(BOWL), asked.head)
    assert torch.equal(asked.vla.predict_action(asked.ids(BOWL), asked.rerank()), plain)


def test_what_the_host_cannot_do_is_refused_at_the_start() -> None:
    modes = ("rerank", "refine")
    assert recommended_modes({BOWL: "rerank@8", STOVE: "policy"}, modes, 8) == {BOWL: "rerank"}
    for arm in ("rerank@4", "policy@2", "replan", "retrieve"):
        with pytest.raises(ValueError, match=rf"recommended: {arm} for 'turn on the stove' .*executes all 8 steps"):
            recommended_modes({BOWL: "rerank", STOVE: arm}, modes, 8)
    with pytest.raises(ValueError, match="recommends nothing; vla-energy preflight"):
        recommended_modes({}, modes, 8)
    with pytest.raises(ValueError, match="two arms for 'pick up the bowl'"):
        recommended_modes({BOWL: "rerank", BOWL.upper(): "refine"}, modes, 8)


def test_a_tokenizer_that_cannot_be_used_stops_the_run(tmp_path: Path) -> None:
    asked = Asked(tmp_path, {BOWL: "rerank"})
    path = Path(asked.settings.pretrained_checkpoint) / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": None}))
    with pytest.raises(HostError, match="does not give back the text|no instruction in the prompt"):
        asked.rerank()
    path.write_text("{}")
    with pytest.raises(HostError, match="no tokenizer that this environment can read"):
        asked.rerank()
    path.unlink()
    with pytest.raises(HostError, match=r"tokenizer\.json not found"):
        asked.rerank()


def test_another_prompt_or_none_is_an_error(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    model = test_hosts.Vla(test_hosts.statistics())
    instructions = Instructions(model, tmp_path)
    with pytest.raises(HostError, match="embedded no prompt"):
        instructions.take()
    two = [f"go to {place}\nand stop" for place in ("a", "b")]
    rows = [tokenizer.encode(PROMPT.format(text)).ids for text in two]
    model.embed(torch.tensor(rows[:1]))
    model.embed(torch.tensor(rows))
    assert instructions.take() == two, "the last call's, not an earlier one's"
    model.embed(torch.tensor([tokenizer.encode("USER: what now? ASSISTANT:").ids]))
    with pytest.raises(HostError, match="no instruction in the prompt 'USER: what now"):
        instructions.take()
    model.embed(input=torch.tensor(rows))
    with pytest.raises(HostError, match="embedded no prompt"):
        instructions.take()


BAD_PROMPTS = {
    "rows": "--energy.mode recommended takes one observation at a time",
    "text": "no instruction in the prompt",
    "none": "the model embedded no prompt",
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("what", BAD_PROMPTS)
def test_a_prompt_that_cannot_be_used_is_no_failed_episode(tmp_path: Path, what: str, strict: bool) -> None:
    """A program that ends where strict, else the host's own chunks: its episodes would count an exception."""
    asked = Asked(tmp_path, {BOWL: "rerank"}, strict=strict)
    reranked, ids, text = asked.rerank(), asked.ids(BOWL), BAD_PROMPTS[what]
    if what == "rows":
        ids = torch.cat([ids, ids.roll(1, 1)])  # the fake takes rows of one length
        reranked._instructions = SimpleNamespace(take=lambda: [BOWL, OTHER])
    elif what == "text":
        ids = ids[:, :9]
    else:
        asked.vla.embed._forward_pre_hooks.clear()
    plain = asked.vla.predict_action(ids, asked.head)
    if strict:
        with pytest.raises(SystemExit, match=f"error: --energy.mode recommended failed: HostError: {text}"):
            asked.vla.predict_action(ids, reranked)
        return
    assert torch.equal(asked.vla.predict_action(ids, reranked), plain)
    assert reranked.fallback.counts == {"HostError": 1} and reranked.counts == {"chunks": len(ids), "accepted": 0}
