"""The doctor: every check on a healthy policy and on a broken one, and how findings are printed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden_towers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vla_energy import cli
from vla_energy.actions import DatasetStatistics, FieldStatistics
from vla_energy.backbones import load_openvla, save_openvla
from vla_energy.backbones.lora import add_lora
from vla_energy.backbones.vision import VisionBackbone
from vla_energy.checkpoint import save_head
from vla_energy.config import EnergyConfig
from vla_energy.doctor import (
    actions,
    attention,
    environment,
    files,
    host,
    inputs,
    lora,
    old_torch,
    policy,
    statistics,
    towers,
)
from vla_energy.doctor.command import diagnose
from vla_energy.doctor.environment import HOST, NATIVE, Known, fits
from vla_energy.doctor.findings import Check, Finding, NotCheckedError, Subject, examine, to_dict, to_text
from vla_energy.doctor.native_model import NativePolicy
from vla_energy.head import EnergyHead

DATASET = "metaworld_test"
GOLDEN = Path(os.environ.get("VLA_ENERGY_GOLDEN", Path(__file__).parents[2] / "shared" / "golden" / "openvla_oft"))


def _load(folder: Path, num_images: int = 1) -> Subject:
    loaded = NativePolicy.load(folder, num_images, torch.float32, "cpu")
    return Subject(checkpoint=folder, policy=loaded)


@pytest.fixture
def subject(tiny_folder: Path) -> Subject:
    return _load(tiny_folder)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "vla"))


def _vla(subject: Subject) -> Any:
    assert isinstance(subject.policy, NativePolicy)
    return subject.policy.vla


def _status(findings: Iterable[Finding]) -> dict[str, str]:
    return {finding.check: finding.status for finding in findings}


def _only(findings: Iterable[Finding], status: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.status == status]
    return finding


# Attention


def test_attention_of_a_healthy_policy(subject: Subject) -> None:
    wanted = {"attention": "ok", "attention, padded batch": "ok", "padding": "ok"}
    assert _status(attention.attention(subject)) == wanted


def test_causal_attention_is_a_problem(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(valid: Tensor, dtype: torch.dtype) -> Tensor:
        length = valid.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, :]
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]

    monkeypatch.setattr("vla_energy.backbones.backbone.bidirectional_mask", causal)
    wanted = {"attention": "problem", "attention, padded batch": "problem", "padding": "ok"}
    assert _status(attention.attention(subject)) == wanted


def test_visible_padding_is_a_problem(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_visible(valid: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros(len(valid), 1, valid.shape[1], valid.shape[1], dtype=dtype)

    monkeypatch.setattr("vla_energy.backbones.backbone.bidirectional_mask", all_visible)
    wanted = {"attention": "ok", "attention, padded batch": "ok", "padding": "problem"}
    assert _status(attention.attention(subject)) == wanted


def test_a_policy_that_differs_between_runs_is_not_called_bidirectional(subject: Subject) -> None:
    """The control: what two equal runs differ by is no influence."""
    layer = _vla(subject).backbone.language_model.model.layers[0]
    layer.register_forward_hook(lambda _module, _args, out: out + torch.randn_like(out))
    assert _status(attention.attention(subject))["attention"] == "problem"


# Inputs


def test_inputs_of_a_healthy_policy(tiny_folder: Path) -> None:
    wanted = dict.fromkeys(("camera 1", "camera 2", "proprioception", "instruction"), "ok")
    assert _status(inputs.inputs(_load(tiny_folder, num_images=2))) == wanted


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("camera 1", ["backbone.projector.fc3.weight"]),
        ("proprioception", ["proprio_projector.fc2.weight"]),
        ("instruction", ["backbone.language_model.model.embed_tokens.weight"]),
    ],
)
def test_an_input_whose_weights_are_zero_is_a_problem(subject: Subject, name: str, parameters: list[str]) -> None:
    for parameter in parameters:
        _vla(subject).get_parameter(parameter).data.zero_()
    found = _status(inputs.inputs(subject))
    assert found.pop(name) == "problem"
    assert set(found.values()) == {"ok"}


def test_a_camera_that_is_dropped_is_named(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = VisionBackbone.forward

    def first_twice(self: VisionBackbone, pixel_values: Tensor) -> Tensor:
        return forward(self, pixel_values[:, : self.channels].repeat(1, 2, 1, 1))

    monkeypatch.setattr(VisionBackbone, "forward", first_twice)
    found = _status(inputs.inputs(_load(tiny_folder, num_images=2)))
    assert (found["camera 1"], found["camera 2"]) == ("ok", "problem")


# Statistics


def _write(folder: Path, **changes: dict[str, Any]) -> None:
    """Changes `action` or `proprio` in dataset_statistics.json."""
    path = folder / "dataset_statistics.json"
    data = json.loads(path.read_text())
    for field, values in changes.items():
        data[DATASET][field].update(values)
    path.write_text(json.dumps(data))


def _entry(folder: Path) -> DatasetStatistics:
    return DatasetStatistics.from_dict(json.loads((folder / "dataset_statistics.json").read_text())[DATASET])


def test_statistics_of_a_healthy_checkpoint(subject: Subject) -> None:
    assert _status(statistics.statistics(subject)) == {f"statistics: {DATASET}": "ok"}
    assert _status(statistics.config_statistics(subject)) == {"config.json": "ok"}


def test_several_datasets_are_said(folder: Path) -> None:
    path = folder / "dataset_statistics.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "other": data[DATASET]}))
    found = list(statistics.statistics(Subject(folder)))
    assert [finding.status for finding in found] == ["ok"] * 3 and "2 datasets" in found[-1].text


def test_broken_statistics_are_problems(folder: Path) -> None:
    entry = _entry(folder)
    low, high = entry.action.q01.tolist(), entry.action.q99.tolist()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"action": {"q01": high, "q99": low}}, "q01 > q99 at dimension 0"),
        ({"action": {"q99": [low[0], *high[1:]]}}, "q01 = q99 at dimensions [0], though min < max"),
        ({"action": FieldStatistics.of(np.random.default_rng(0).normal(size=(9, 5))).to_dict()}, "5 dimensions, the"),
        ({"proprio": FieldStatistics.of(np.random.default_rng(0).normal(size=(9, 5))).to_dict()}, "projector reads 4"),
    ]
    whole = (folder / "dataset_statistics.json").read_text()
    for changes, message in cases:
        (folder / "dataset_statistics.json").write_text(whole)
        _write(folder, **changes)
        assert message in _only(statistics.statistics(Subject(folder)), "problem").text
    (folder / "dataset_statistics.json").unlink()
    assert "not found" in _only(statistics.statistics(Subject(folder)), "problem").text


def test_missing_proprio_and_a_constant_dimension(folder: Path) -> None:
    entry = _entry(folder)
    low = entry.action.q01[0]
    for key in ("min", "max", "q01", "q99"):
        getattr(entry.action, key)[0] = low
    data = {DATASET: replace(entry, proprio=None).to_dict()}
    (folder / "dataset_statistics.json").write_text(json.dumps(data))
    found = list(statistics.statistics(Subject(folder)))
    assert "no proprio" in _only(found, "problem").text
    assert "dimensions [0] are constant" in _only(found, "warning").text


def test_config_json_that_says_otherwise_is_a_warning(folder: Path) -> None:
    _write(folder, action={"q99": (_entry(folder).action.q99 + 1).tolist()})
    assert "q99 differs" in _only(statistics.config_statistics(Subject(folder)), "warning").text


# Files


def _save_head(folder: Path, trained: DatasetStatistics, horizon: int = 8, step: int = 5) -> Path:
    return save_head(folder, EnergyHead(128, 4, horizon, EnergyConfig()), step, trained)


def _swapped(entry: DatasetStatistics) -> DatasetStatistics:
    return replace(entry, action=replace(entry.action, q99=entry.action.q99 + 1))


def test_components_once_and_twice(folder: Path) -> None:
    assert _status(files.components(Subject(folder))) == {"components": "ok"}
    (old,) = folder.glob("action_head--*")
    shutil.copy(old, folder / f"{old.name}.bak")  # the host's rule finds it too
    assert "action_head: 2 files match" in _only(files.components(Subject(folder)), "problem").text
    shutil.move(folder / f"{old.name}.bak", folder / "action_head--77_checkpoint.pt")
    with pytest.raises(NotCheckedError, match="there are 2 action heads, see 'components'"):
        list(policy.load(Subject(folder)))
    for path in folder.glob("action_head--*"):
        path.unlink()
    assert "base model" in _only(files.components(Subject(folder)), "warning").cost


def test_energy_head_that_fits_and_ones_that_do_not(folder: Path) -> None:
    subject = _load(folder)
    (missing,) = examine([Check("energy head", files.energy_head, "x")], subject)
    assert missing.status == "not checked" and "--energy.enabled True" in missing.remedy
    path = _save_head(folder, _entry(folder))
    assert _status(files.energy_head(subject)) == {"energy head": "ok", "energy head's statistics": "ok"}
    _save_head(folder, _swapped(_entry(folder)))
    assert f"{DATASET}: the energy head was trained" in _only(files.energy_head(subject), "problem").text
    _save_head(folder, _entry(folder), horizon=4)
    assert "(128, 4, 4), the policy has (128, 4, 8)" in _only(files.energy_head(subject), "problem").text
    path.write_bytes(path.read_bytes()[:-9])
    (found,) = examine([Check("energy head", files.energy_head, "no reranking")], subject)
    assert found.status == "problem" and found.text.startswith("could not be checked: CheckpointError")
    _save_head(folder, _entry(folder), step=6)
    assert "energy_head: 2 files match" in _only(files.components(subject), "problem").text
    (told_once,) = examine([Check("energy head", files.energy_head, "no reranking")], subject)
    assert told_once.status == "not checked" and "there are 2, see 'components'" in told_once.text


def test_memory_that_fits_and_one_that_does_not(folder: Path) -> None:
    pytest.importorskip("faiss")
    from vla_energy.memory import ChunkMemory, MemoryBatch

    generator = torch.Generator().manual_seed(0)
    chunks = torch.randn(8, 8, 4, generator=generator)
    context = torch.randn(8, 6, 128, generator=generator)
    episodes = torch.arange(8) // 4
    batch = MemoryBatch(context, torch.ones(8, 6, dtype=torch.bool), chunks, chunks, episodes)
    subject = _load(folder)
    for trained, wanted in ((_entry(folder), "ok"), (_swapped(_entry(folder)), "problem")):
        ChunkMemory.build([batch], trained).save(folder, 0)
        assert _status(files.memory(subject)) == {"memory": "ok", "memory's statistics": wanted}


# Action space


def test_round_trip_of_a_healthy_checkpoint(subject: Subject) -> None:
    assert _status(actions.round_trip(subject)) == {f"action space: {DATASET}": "ok"}


def test_broken_round_trips_are_problems(folder: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(NativePolicy):
        def unnormalize(self, actions: Tensor, dataset: str) -> Tensor:
            return actions

    other = replace(subject, policy=Other(_vla(subject)))
    assert "the host un-normalises otherwise" in _only(actions.round_trip(other), "problem").text

    entry = _entry(folder)
    _write(folder, action={"max": [entry.action.min[0], *entry.action.max[1:]]})
    assert "round trip off by" in _only(actions.round_trip(Subject(folder)), "problem").text

    monkeypatch.setattr(FieldStatistics, "normalize", lambda self, values: 2 * values)
    text = _only(actions.round_trip(subject), "problem").text
    assert "[3] are outside the mask, but change" in text and "not clipped to -1" in text


# LoRA


@pytest.fixture(scope="module")
def fine_tuned(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: merged in fp32 and bf16, with their adapter beside them, and unmerged, with the base."""
    vla = load_openvla(tiny_folder, use_proprio=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_lora(vla, 4, 0.0)
        for name, parameter in vla.backbone.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    root = tmp_path_factory.mktemp("lora")
    common: dict[str, Any] = {"processor_files": tiny_folder, "statistics": vla.statistics}
    made = {}
    for name, dtype, merge in (
        ("float32", torch.float32, True),
        ("bfloat16", torch.bfloat16, True),
        ("unmerged", torch.float32, False),
    ):
        made[name] = save_openvla(vla, root / name, 1, merge=merge, dtype=dtype, **common)
        if merge:
            vla.backbone.save_pretrained(str(made[name] / lora.ADAPTER))
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_equals_base_and_adapter(fine_tuned: dict[str, Path], tiny_folder: Path, dtype: str) -> None:
    subject = replace(_load(fine_tuned[dtype]), base=tiny_folder)
    found = list(lora.merge(subject))
    assert [finding.status for finding in found] == ["ok"] and f"saved in {dtype}" in found[0].text


def test_one_changed_weight_and_another_base_are_problems(
    fine_tuned: dict[str, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    subject = replace(_load(fine_tuned["float32"]), base=tiny_folder)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    _vla(subject).backbone.get_parameter(name).data[0, 0] += 0.05
    found = _only(lora.merge(subject), "problem")
    assert f"1 of {len(_vla(subject).backbone.state_dict())} weights do, first: {name}" in found.text
    # The base was never merged into: every adapted weight differs, and the chunks do.
    assert "weights do" in _only(lora.merge(replace(_load(tiny_folder), base=None, checkpoint=_with_adapter(
        tiny_folder, fine_tuned["float32"], tmp_path, tiny_folder))), "problem").text  # fmt: skip


def _with_adapter(source: Path, adapted: Path, tmp_path: Path, base: Path | str) -> Path:
    """A copy of `source` with the adapter of `adapted`, which names its base."""
    target = Path(shutil.copytree(source, tmp_path / "copy"))
    shutil.copytree(adapted / lora.ADAPTER, target / lora.ADAPTER, dirs_exist_ok=True)
    path = target / lora.ADAPTER / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    return target


def test_an_adapter_that_nobody_applies_is_a_warning(fine_tuned: dict[str, Path]) -> None:
    found = list(lora.merge(_load(fine_tuned["unmerged"])))
    assert [finding.status for finding in found] == ["warning", "ok"]


def test_no_adapter_and_an_absent_base_are_not_checked(
    fine_tuned: dict[str, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(NotCheckedError, match="no lora_adapter/"):
        list(lora.merge(_load(tiny_folder)))
    target = _with_adapter(fine_tuned["bfloat16"], fine_tuned["bfloat16"], tmp_path, "openvla/openvla-7b")
    with pytest.raises(NotCheckedError, match="openvla/openvla-7b, is no folder"):
        list(lora.merge(_load(target)))


# Environment


def _versions(monkeypatch: pytest.MonkeyPatch, **found: str) -> list[Finding]:
    monkeypatch.setattr(environment, "installed", lambda name: found.get(name.replace("-", "_")))
    return list(environment.versions(Subject()))


def _good(stack: dict[str, Known], low: str) -> dict[str, str]:
    return {name.replace("-", "_"): known.low or low for name, known in stack.items()} | {"torch": "2.2.0+cu121"}


@pytest.mark.parametrize("stack", [HOST, NATIVE], ids=["host", "native"])
def test_known_versions_are_ok(monkeypatch: pytest.MonkeyPatch, stack: dict[str, Known]) -> None:
    assert _status(_versions(monkeypatch, **_good(stack, "0.1"))) == {"versions": "ok"}


@pytest.mark.parametrize(
    "name, version, status, cost",
    [
        ("timm", "1.0.3", "problem", "refuses to be built"),
        ("tokenizers", "0.20", "warning", "regressions"),
        ("protobuf", "4.25.1", "warning", "break its imports"),
        ("huggingface_hub", "0.26.0", "warning", "break its imports"),
        ("numpy", "2.0.1", "problem", "numpy 1"),
        ("torch", "2.1.2", "problem", "torch 2.2"),
        ("transformers", "4.41.0", "warning", "97 to about 55"),
    ],
)
def test_known_bad_versions(monkeypatch: pytest.MonkeyPatch, name: str, version: str, status: str, cost: str) -> None:
    found = _versions(monkeypatch, **{**_good(HOST, "0.1"), name: version})
    bad = _only(found, status)
    assert cost in bad.cost and version in bad.text and "pip install" in bad.remedy


def test_stock_transformers_that_may_drop_images(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _versions(monkeypatch, **{**_good(HOST, "0.1"), "transformers": "4.51.0"})
    assert ["blind" in finding.cost for finding in found if finding.status == "warning"] == [False, True]


def test_missing_extras_are_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _only(_versions(monkeypatch, torch="2.4"), "not checked")
    assert "transformers, tokenizers, timm" in found.text and "vla-energy[native]" in found.remedy


@pytest.mark.parametrize(
    "found, takes, wanted",
    [
        ({"torch": "2.2.0", "numpy": "1.26.4", "transformers": "4.40.1"}, True, {}),
        ({"torch": "2.2.0", "numpy": "2.1.0", "transformers": "4.40.1"}, True, {}),  # `versions` says it
        ({"torch": "2.2.0", "numpy": "2.1.0"}, True, {"torch and numpy": "numpy<2"}),
        ({"torch": "2.3.0", "numpy": "2.1.0"}, True, {}),
        ({"torch": "2.2.0", "numpy": "1.26.4", "transformers": "5.23.0"}, False, {"torch and transformers": "4.40.1"}),
    ],
)
def test_what_torch_2_2_does_not_go_with(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str], takes: bool, wanted: dict[str, str]
) -> None:
    monkeypatch.setattr(old_torch, "installed", found.get)
    monkeypatch.setattr(old_torch, "takes_torch", lambda: takes)
    problems = list(old_torch.old_torch(Subject()))
    assert {finding.check: finding.status for finding in problems} == dict.fromkeys(wanted, "problem")
    for finding in problems:
        assert wanted[finding.check] in finding.remedy and found["torch"] in finding.text


def test_the_installed_transformers_takes_the_installed_torch() -> None:
    assert _status(old_torch.old_torch(Subject())) == {"torch and transformers": "ok"}


def test_bounds() -> None:
    known = Known("0.9.10", "0.9.17", "x")
    assert [fits(version, known) for version in ("0.9.9", "0.9.10", "0.9.16.post1", "0.9.17", "1.0")] == [
        False, True, True, False, False,
    ]  # fmt: skip
    assert fits("2.2.0+cu121", Known("2.2", "", "x")) and fits("2", Known("2.0.0", "", "x"))


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _status(environment.device(Subject())) == {"device": "ok"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _status(environment.device(Subject(device="cuda:0"))) == {"device": "problem"}


def test_kernels_of_this_machine() -> None:
    assert "problem" not in _status(environment.kernels(Subject())).values()
    assert environment.differentiate("math", "cpu", torch.float32) == environment.TWICE


class _Once(torch.autograd.Function):
    """Identity whose gradient is scaled, and cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * ctx.scale, None


@pytest.mark.parametrize("scale, text", [(1.0, "no double backward"), (float("nan"), "gradient not finite")])
def test_kernels_without_gradient_are_problems(monkeypatch: pytest.MonkeyPatch, scale: float, text: str) -> None:
    monkeypatch.setattr(environment, "scaled_dot_product_attention", lambda q, k, v: _Once.apply(q, scale))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert text in _only(environment.kernels(Subject()), "problem").text


def test_head_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    assert set(_status(environment.head_gradients(Subject())).values()) == {"ok"}
    assert torch.equal(torch.get_rng_state(), before)

    class Kinked(EnergyHead):
        def forward(self, context: Any, actions: Tensor, **_: Any) -> Tensor:
            return (actions - actions).abs().pow(1.5).sqrt().sum((2, 3))

    monkeypatch.setattr(environment, "EnergyHead", Kinked)
    assert "problem" in _status(environment.head_gradients(Subject())).values()


# Host


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git repository with the files that tell an openvla-oft checkout."""
    root = tmp_path / "oft"
    for name in host._FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    return root


def test_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    subject = Subject(host=checkout)
    assert "measured was 213c5ff8" in _only(host.checkout(subject), "warning").text
    assert str(checkout) in sys.path
    head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    monkeypatch.setattr(host, "PINNED", head.stdout[:8])
    assert _status(host.checkout(subject)) == {"host": "ok"}
    shutil.rmtree(checkout / ".git")
    assert _status(host.checkout(subject)) == {"host": "not checked"}
    (checkout / host._FILES[0]).unlink()
    assert "it lacks vla-scripts/finetune.py" in _only(host.checkout(subject), "problem").text


@pytest.mark.parametrize(
    "ok, applied, status, text",
    [(True, True, "ok", "applied: a.py: known"), (True, False, "ok", "not applied"), (False, False, "problem", "a.py")],
)
def test_patch(monkeypatch: pytest.MonkeyPatch, ok: bool, applied: bool, status: str, text: str) -> None:
    file = types.SimpleNamespace(path="a.py", state="known")
    report = types.SimpleNamespace(ok=ok, applied=applied, files=(file,), problem="")
    tool = types.SimpleNamespace(check=lambda root, patch: report)
    monkeypatch.setitem(sys.modules, "vla_energy.hosts", types.ModuleType("vla_energy.hosts"))
    monkeypatch.setitem(sys.modules, "vla_energy.hosts.patching", tool)  # type: ignore[arg-type]
    patch_file = types.SimpleNamespace(load_patch=lambda: None)
    monkeypatch.setitem(sys.modules, "vla_energy.hosts.patch_file", patch_file)  # type: ignore[arg-type]
    assert _only(host.patch(Subject(host=Path("."))), status).text.startswith(text)


def test_patch_without_the_tool_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vla_energy.hosts.patching", None)
    with pytest.raises(NotCheckedError, match="no patch tool"):
        list(host.patch(Subject(host=Path("."))))


def test_stock_transformers_are_causal_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock transformers, as the host would call it; one that is handed a full mask, as the fork makes it."""
    import transformers

    subject = Subject(host=Path("."))
    assert "97 to about 55" in _only(host.transformers_attention(subject), "problem").cost
    with pytest.raises(NotCheckedError, match="our backbone passes its own mask"):
        list(host.transformers_attention(Subject()))

    class Model:
        @staticmethod
        def from_config(config: Any) -> nn.Module:
            class Full(transformers.LlamaForCausalLM):
                def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:  # type: ignore
                    full = torch.zeros(2, 1, 8, 8).masked_fill(~attention_mask[:, None, None], -1e9)
                    return super().forward(inputs_embeds=inputs_embeds, attention_mask=full, **kwargs)

            return Full(config)

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", Model)
    assert _status(host.transformers_attention(subject)) == {"installed transformers": "ok"}


# Policy, runner, command line


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden checkpoint in {GOLDEN}; VLA_ENERGY_GOLDEN names its folder")
def test_the_hosts_checkpoint_in_our_backbone() -> None:
    golden_towers.register()
    subject = Subject(GOLDEN / "tiny_ckpt", num_images=2)
    assert "2 image(s), proprioception of 8, chunks of 8 x 7" in _only(policy.load(subject), "ok").text
    checks = (attention.attention, inputs.inputs, statistics.statistics, actions.round_trip)
    assert {status for check in checks for status in _status(check(subject)).values()} == {"ok"}


def test_a_damaged_checkpoint_and_a_base_model(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 20)
    subject = Subject(folder)
    assert "model.safetensors is damaged" in _only(policy.load(subject), "problem").text
    with pytest.raises(NotCheckedError, match="not loaded"):
        list(attention.attention(subject))
    for path in folder.glob("action_head--*"):
        path.unlink()
    with pytest.raises(NotCheckedError, match="base model"):
        list(policy.load(subject))


def test_without_the_native_extra(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vla_energy.doctor.native_model", None)
    (found,) = examine([Check("policy", policy.load, "x")], Subject(tiny_folder))
    assert found.status == "not checked" and "pip install 'vla-energy[native]'" in found.remedy


def test_a_check_that_raises_is_a_problem_and_the_next_one_runs() -> None:
    def fails(_: Subject) -> Iterable[Finding]:
        raise ZeroDivisionError("by\nzero")

    checks = [Check("first", fails, "dear"), Check("second", lambda _: [Finding("second", "ok", "fine")], "x")]
    first, second = examine(checks, Subject())
    assert first.status == "problem" and second.status == "ok"
    assert first.text == "could not be checked: ZeroDivisionError: by zero" and first.cost == "dear"


@pytest.mark.parametrize("status", ["warning", "problem"])
def test_findings_that_hurt_need_cost_and_remedy(status: Any) -> None:
    with pytest.raises(ValueError, match="what it costs"):
        Finding("x", status, "text", cost="dear")


def test_text_has_everything_within_the_width() -> None:
    long = " ".join(f"word{i}" for i in range(60))
    findings = [Finding("a " * 30, "problem", long, f"cost {long}", "/path" * 60), Finding("b", "ok", "fine")]
    text = to_text(findings)
    assert max(map(len, text.splitlines())) <= 100
    packed = "".join(text.split())
    for part in (long, f"costs: cost {long}", "mend: " + "/path" * 60, "1 problem, 0 warning, 0 not checked, 1 ok"):
        assert "".join(part.split()) in packed or all(word in text for word in part.split())
    assert not to_dict(findings)["ok"] and to_dict(findings)["counts"]["problem"] == 1


def test_command_prints_each_finding_with_cost_and_remedy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save_head(folder, _swapped(_entry(folder)))
    _write(folder, action={"q99": [_entry(folder).action.q01[0], *_entry(folder).action.q99[1:]]})
    assert cli.main(["doctor", "--checkpoint", str(folder), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert cli.main(["doctor", "--checkpoint", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    words = set(printed.split())
    assert {finding["status"] for finding in findings} >= {"ok", "warning", "problem", "not checked"}
    for finding in findings:
        if finding["status"] in ("warning", "problem"):
            assert finding["cost"] and finding["remedy"]
            assert {*finding["cost"].split(), *finding["remedy"].split()} <= words
    assert printed.count("costs:") == sum(bool(finding["cost"]) for finding in findings)
    assert printed.count("mend:") == sum(finding["status"] in ("warning", "problem") for finding in findings)


def _documented() -> list[str]:
    """Names of findings in docs/doctor.md, as regular expressions."""
    page = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.split("## Findings")[1].splitlines() if line.startswith("| `")]
    names = [name for row in [*rows, "`checkpoint`"] for name in re.findall("`([^`]+)`", row)]
    return [re.sub(r"\b(NAME|N)\b", ".+", re.escape(name)) for name in names]


def test_the_page_names_each_finding(folder: Path) -> None:
    names = _documented()
    for subject in (Subject(), Subject(folder)):
        for finding in diagnose(subject):
            assert any(re.fullmatch(name, finding.check) for name in names), finding.check


def test_command_on_the_environment_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "versions" in printed and "none was given: the environment alone" in printed and "attention," not in printed


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "nowhere"], "--checkpoint nowhere is not a folder"),
        (["--host", "nowhere"], "--host nowhere is not a folder"),
        (["--num-images", "0"], "--num-images 0: must be 1 or more"),
        (["--towers", "math:nothing"], "--towers math:nothing: expected MODULE:FUNCTION"),
    ],
)
def test_bad_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *flags]) == 2
    assert message in capsys.readouterr().err


# Vision towers, and what the host's model cannot hold


def test_unknown_towers_are_named_with_the_flag_that_registers_them(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["timm_model_ids"] = ["doctors_own_tower", config["timm_model_ids"][1]]
    (folder / "config.json").write_text(json.dumps(config))
    found = _only(policy.load(Subject(folder)), "problem")
    assert "no vision tower named doctors_own_tower" in found.text and "siglip" not in found.text
    assert "--towers FILE.py:FUNCTION" in found.remedy
    script = tmp_path / "mine.py"
    script.write_text(
        "from timm.models import register_model\n"
        "def doctors_own_tower(pretrained=False, **_): raise RuntimeError('built')\n"
        "def register(): register_model(doctors_own_tower)\n"
    )
    towers.call(f"{script}:register")
    assert not towers.unknown(config) and "built" in _only(policy.load(Subject(folder)), "problem").text


def test_towers_that_cannot_be_called_are_refused(tmp_path: Path) -> None:
    for name in ("no_such_module:register", "json:no_such_function", f"{tmp_path / 'missing.py'}:register", "json"):
        with pytest.raises(ValueError, match="expected MODULE:FUNCTION or FILE.py:FUNCTION"):
            towers.call(name)


def test_a_vocabulary_of_our_own_is_exported_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "_kind", lambda subject: "host")
    found = _only(policy.load(Subject(folder)), "problem")
    assert "768 token ids of its own" in found.text and "host_export" in found.remedy and str(folder) in found.remedy
