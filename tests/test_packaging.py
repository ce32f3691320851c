"""What users install and paste: light imports, no moved pins, configs and README that work."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import draccus
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from make_dist import normalise

from vla_energy.config import PRESETS, EnergyConfig
from vla_energy.extras import NATIVE
from vla_energy.finetune.config import FinetuneConfig

ROOT = Path(__file__).parents[1]
RATES = {"original": (5e-4, 0), "stage1": (5e-4, 0), "stage2": (5e-5, 10_000), "stage3": (5e-5, 10_000)}
"""Learning rate and warm-up of the head by stage (report, remedy 6)."""


def _array(name: str) -> list[str]:
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(rf"^{name} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return re.findall(r'"((?:[^"\\]|\\.)*)"', block[1])


def _pins(name: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def test_base_dependencies_move_no_pin_of_the_host() -> None:
    pins = _pins("constraints-host.txt")  # that nothing moves when they are installed: tests/test_host_pins.py
    requirements = [Requirement(text) for text in _array("dependencies")]
    assert {requirement.name for requirement in requirements} == {"torch", "draccus", "numpy", "tqdm", "safetensors"}
    for requirement in requirements:
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_the_native_extra_is_what_the_backbone_asks_for() -> None:
    extra = {requirement.name: str(requirement.specifier) for requirement in map(Requirement, _array("native"))}
    assert {name: f">={version}" for name, version in NATIVE.items()}.items() <= extra.items()


def test_constraints_satisfy_the_extras() -> None:
    pins = _pins("constraints.txt")
    groups = ("dependencies", "native", "data", "sim", "retrieval", "libero", "completion", "docs", "dev")
    for group in groups:
        for requirement in map(Requirement, _array(group)):
            name = canonicalize_name(requirement.name)
            if name in pins:
                assert requirement.specifier.contains(pins[name]), requirement
            else:
                assert requirement.name == "tensorflow", f"{requirement} has no pin"  # not on Linux x86-64


def test_the_data_card_counts_what_ships() -> None:
    card = (ROOT / "vla_energy/data/bundled/README.md").read_text(encoding="utf-8")
    (info,) = (ROOT / "vla_energy/data/bundled").glob("*/*/dataset_info.json")
    episodes = {split["name"]: split["shardLengths"] for split in json.loads(info.read_text())["splits"]}
    rows = re.findall(r"^\| episodes \| (\d+) \| (\d+) \|$", card, re.MULTILINE)
    assert [(sum(map(int, episodes["train"])), sum(map(int, episodes["val"])))] == [tuple(map(int, *rows))]


@pytest.mark.parametrize("path", ["vla_energy/data/bundled", "vla_energy/backbones/tiny_openvla"])
def test_what_ships_has_a_card(path: str) -> None:
    card = (ROOT / path / "README.md").read_text(encoding="utf-8")
    for part in ("**For**", "**Not for**", "**Licence**"):
        assert part in card, f"{path}/README.md has no {part}"


def test_the_citation_names_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for field in ("version", "license"):
        (stated,) = re.findall(rf'^{field} = "(.+)"$', project, re.MULTILINE)
        assert re.search(rf"^{field}: {re.escape(stated)}$", citation, re.MULTILINE), field


def test_an_sdist_is_the_same_whenever_it_is_packed(tmp_path: Path) -> None:
    packed = []
    for number, (mode, when) in enumerate([(0o600, 1_000_000), (0o664, 2_000_000)]):
        path = tmp_path / f"{number}.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            names = ("a/one.py", "a/two.py") if number else ("a/two.py", "a/one.py")
            for name in names:
                member = tarfile.TarInfo(name)
                member.size, member.mode, member.mtime, member.uid, member.uname = 4, mode, when, number, str(number)
                tar.addfile(member, io.BytesIO(name[2:6].encode()))
        assert normalise(path, 1_700_000_000) is None
        packed.append(path.read_bytes())
    assert packed[0] == packed[1]
    with tarfile.open(tmp_path / "0.tar.gz") as tar:
        assert [(entry.name, entry.mtime) for entry in tar] == [("a/one.py", 1.7e9), ("a/two.py", 1.7e9)]
        assert (read := tar.extractfile("a/two.py")) is not None and read.read() == b"two."


def test_import_is_light() -> None:
    heavy = {"tensorflow", "transformers", "tokenizers", "timm", "peft", "matplotlib", "mujoco"}
    code = f"import sys, vla_energy; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("stage", PRESETS)
def test_stage_files_are_the_presets(stage: str) -> None:
    config = draccus.parse(FinetuneConfig, config_path=ROOT / "configs" / f"{stage}.yaml", args=[])
    assert config.energy == EnergyConfig.preset(stage)
    rate, warm_steps = RATES.get(stage, (5e-4, 0))
    learning_rate = config.energy_learning_rate * config.energy.guard.lr_factor
    assert (learning_rate, config.energy_warm_steps) == (pytest.approx(rate), warm_steps)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_config_files_parse_and_pass_the_checks(path: Path) -> None:
    draccus.parse(FinetuneConfig, config_path=path, args=[]).check()


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_readme_python_runs(name: str) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, name, "exec"), {})


def test_both_readmes_have_the_same_commands_and_links() -> None:
    """A translation that falls behind is worse than none."""
    first, second = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    # Words are translated, commands are not.
    commands = [re.findall(r"^(?:python|vla-energy|make|git) [^#\n]*", text, re.MULTILINE) for text in (first, second)]
    assert [line.strip() for line in commands[0]] == [line.strip() for line in commands[1]]
    links = [set(re.findall(r"\]\((docs/[^)]*)\)", text)) for text in (first, second)]
    assert links[0] <= links[1]


def test_the_first_page_of_the_readme_fits_a_screen() -> None:
    """Above the first section, in rows as GitHub sets them: 35.5 here were 885 pixels in Chromium, 1280 wide."""
    page = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    page = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", page).replace("*", "").replace("`", "")
    rows = 0.0
    for line in page.splitlines():
        if line.startswith("|") and "---" not in line:
            rows += 0.5 + max(-(-len(cell) // 62) for cell in line.strip("|").split("|"))
        elif line.strip() and "---" not in line:
            rows += -(-len(line) // 125)
    assert rows <= 38, f"{rows} rows: a screen of 1080 pixels has 38 to spare"


def test_documented_flags_of_training_exist() -> None:
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/fine-tune.md"))
    commands = re.findall(r"^python scripts/finetune_energy\.py((?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert commands
    flags = {flag for command in commands for flag in re.findall(r"--([\w.]+)", command)}
    known = set(vars(FinetuneConfig())) | {"config_path"}
    assert {flag.split(".")[0] for flag in flags} <= known
    for name in re.findall(r"configs/[\w.]+\.yaml", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize(
    ("part", "never"),
    [
        ("backbones", ("data", "finetune", "rollout", "preflight", "report", "hosts", "doctor")),
        ("data", ("backbones", "finetune", "rollout", "preflight", "report", "hosts", "doctor")),
        ("finetune", ("rollout", "preflight", "report", "hosts", "doctor")),
        ("rollout", ("finetune", "preflight", "report", "hosts", "doctor")),
        ("report", ("backbones", "data", "finetune", "rollout", "preflight", "hosts", "doctor")),
        ("hosts", ("backbones", "data", "finetune", "rollout", "preflight", "report", "doctor")),
    ],
)
def test_a_part_imports_none_that_stands_on_it(part: str, never: tuple[str, ...]) -> None:
    """As docs/design.md draws it; lazy imports count."""
    pattern = re.compile(rf"^\s*(?:from|import) vla_energy\.({'|'.join(never)})\b", re.MULTILINE)
    found = {
        path.name: pattern.findall(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "vla_energy" / part).glob("*.py"))
    }
    assert not {name: parts for name, parts in found.items() if parts}
