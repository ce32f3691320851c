"""The core on openvla-oft's versions: `make test-host-pins` runs this file in an environment that has them.

vla-energy is installed by pip, from a wheel of this checkout, into a layer over that environment, which itself is not
changed. The core's tests then run on the installed package. Anywhere else those tests of this file are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"

NOT_CORE = {
    "test_backbones.py": "the native backbone: the `native` extra",
    "test_benchmark_page.py": "figures: the `native` extra",
    "test_cache.py": "the native backbone, RLDS",
    "test_chaos.py": "the native backbone, RLDS",
    "test_closed_loop.py": "the native backbone, RLDS",
    "test_completion.py": "shtab: the `completion` extra",
    "test_crops.py": "the native backbone",
    "test_data.py": "RLDS: the `data` extra",
    "test_demo.py": "the native backbone, RLDS",
    "test_diffusion.py": "the native backbone, RLDS",
    "test_diffusion_host.py": "the native backbone beside the host's",
    "test_distributed.py": "the native backbone, RLDS",
    "test_docs.py": "the native backbone, RLDS",
    "test_doctor.py": "the native backbone beside the host's",
    "test_doctor_host.py": "openvla-oft itself, which is no part of the repository",
    "test_durable.py": "the native backbone, RLDS",
    "test_examples.py": "the native backbone, RLDS",
    "test_fallback.py": "the native backbone",
    "test_film.py": "the native backbone, RLDS",
    "test_finetune.py": "the native backbone, RLDS",
    "test_finetune_rollouts.py": "the native backbone, RLDS",
    "test_flags.py": "the native backbone, RLDS",
    "test_footage.py": "the native backbone, RLDS",
    "test_frames.py": "the native backbone, RLDS",
    "test_goldens.py": "the native backbone against openvla-oft's stored outputs",
    "test_host_export.py": "the native backbone",
    "test_host_libero_benchmark.py": "the native backbone",
    "test_hostile.py": "the native backbone, RLDS",
    "test_lerobot_example.py": "RLDS, pyarrow",
    "test_libero_data.py": "RLDS, the simulator: the `libero` extra",
    "test_libero_env.py": "the simulator",
    "test_libero_shard.py": "the native backbone, RLDS",
    "test_metaworld.py": "RLDS, the simulator: the `sim` extra",
    "test_preflight.py": "the native backbone, RLDS",
    "test_report_browser.py": "Chromium",
    "test_rollout.py": "the simulator",
    "test_rollout_libero.py": "the simulator",
    "test_rollout_record.py": "RLDS, the simulator",
    "test_save_order.py": "the native backbone, RLDS",
    "test_signals.py": "the native backbone, RLDS",
    "test_stability_benchmark.py": "features of the native backbone, RLDS",
    "test_tokens.py": "the native backbone, RLDS",
    "test_trackers.py": "TensorBoard: the `native` extra",
    Path(__file__).name: "runs the others",
}
"""Test files that need more than openvla-oft's environment, and what. All others are the core's: a new file is, until
it is named here."""
LEAST = 780
"""Tests that ran and passed, at least: raise it when there are many more."""
MAY_SKIP = {
    "test_original": "stored outputs of openvla-oft's code, which are no part of the repository",
    "test_patching": "a checkout of openvla-oft, which is no part of the repository",
}
"""Modules of core tests that may skip some here, for want of what; whether CI lets them is theirs to say."""
NOT_CORE_MODULES = ("backbones", "demo")
"""Modules and packages of vla_energy whose import needs an extra; all others have to import on the host's versions."""
SETTING = "VLA_ENERGY_HOST_PINS"
"""`make test-host-pins` sets it: these tests then run, and take the interpreter they run on for the host's."""
on_pins = pytest.mark.skipif(not os.environ.get(SETTING), reason="openvla-oft's versions: make test-host-pins")


@dataclass(frozen=True)
class Layer:
    """An environment over the host's, with vla-energy and its `retrieval` extra, and `pip freeze` at each stage."""

    folder: Path
    host: list[str]
    installed: list[str]
    retrieval: list[str]

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return _run(self.folder, *arguments, check=check)


def _run(
    folder: Path, *arguments: str, check: bool = True, python: str | None = None
) -> subprocess.CompletedProcess[str]:
    """The layer's interpreter, or another, in the layer's folder, where no checkout is found on the path."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", SETTING)}
    command = [python or str(folder / "bin/python"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env | {"OMP_NUM_THREADS": "1"})
    assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-20_000:]}{done.stderr[-5_000:]}"
    return done


def _freeze(folder: Path) -> list[str]:
    return sorted(_run(folder, "-m", "pip", "freeze", "--all").stdout.splitlines())


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("layer")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "vla_energy", source / "vla_energy", ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(folder, symlinks=True)
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    major, minor = sys.version_info[:2]
    text = "".join(f"import site; site.addsitedir({path!r})\n" for path in packages)  # runs their .pth files too
    (folder / f"lib/python{major}.{minor}/site-packages/host.pth").write_text(text)
    host = _freeze(folder)
    assert not [line for line in host if "vla-energy" in line], "the host's environment has vla-energy already"
    pip = ("-m", "pip", "--disable-pip-version-check")
    # The host's own pip builds: in the layer the host's setuptools would get into the isolated build.
    _run(folder, *pip, "wheel", "-q", "--no-deps", "-w", str(source / "dist"), str(source), python=sys.executable)
    (wheel,) = (source / "dist").glob("vla_energy-*.whl")
    _run(folder, *pip, "install", "-q", str(wheel))
    installed = _freeze(folder)
    _run(folder, *pip, "install", "-q", f"{wheel}[retrieval]")
    return Layer(folder, host, installed, _freeze(folder))


def changed(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Lines of `pip freeze` that an installation took away or brought, vla-energy's own apart."""
    ours = {line for line in after if line.startswith("vla-energy")}
    return sorted(set(before) ^ (set(after) - ours))


def _modules() -> set[str]:
    """Modules and packages directly below vla_energy."""
    return {
        path.stem
        for path in (ROOT / "vla_energy").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }


def core_files() -> list[Path]:
    """The core's test files."""
    return [path for path in sorted(TESTS.rglob("test_*.py")) if path.name not in NOT_CORE]


def test_changed_sees_moved_new_and_lost_packages() -> None:
    before = ["numpy==1.26.4", "torch==2.2.0"]
    assert changed(before, [*before, "vla-energy @ file:///x.whl"]) == []
    assert changed(before, ["numpy==2.0.0", "torch==2.2.0"]) == ["numpy==1.26.4", "numpy==2.0.0"]
    assert changed(before, ["numpy==1.26.4", "torch==2.2.0", "new==1"]) == ["new==1"]
    assert changed(before, ["torch==2.2.0"]) == ["numpy==1.26.4"]


def test_lists_name_what_exists() -> None:
    gone = [name for name in NOT_CORE if not (TESTS / name).is_file()]
    assert not gone, f"NOT_CORE names files that are gone: {gone}"
    assert {"test_losses.py", "test_head.py", "test_rerank.py"} <= {path.name for path in core_files()}
    assert set(NOT_CORE_MODULES) <= _modules()


@on_pins
def test_installing_changes_no_version(layer: Layer) -> None:
    versions = dict(line.split("==") for line in layer.host if "==" in line)
    assert sys.version_info[:2] == (3, 10) and versions["torch"].startswith("2.2.0"), versions
    assert versions["draccus"] == "0.8.0" and versions["numpy"].startswith("1."), versions
    assert changed(layer.host, layer.installed) == []
    assert [line for line in layer.installed if line.startswith("vla-energy")]
    assert [line.partition("=")[0] for line in changed(layer.host, layer.retrieval)] == ["faiss-cpu"]


@on_pins
def test_core_imports_and_the_rest_names_its_extra(layer: Layer) -> None:
    core = sorted(_modules() - {"__init__", *NOT_CORE_MODULES})
    code = (
        "import sys, importlib as i, vla_energy; print(vla_energy.__file__); list(map(i.import_module, sys.argv[1:]))"
    )
    done = layer.run("-c", code, *(f"vla_energy.{name}" for name in core))
    assert Path(done.stdout.strip()).is_relative_to(layer.folder), "not the installed package"
    for module in ("backbones", "finetune.trainer", "demo"):
        done = layer.run("-c", f"import vla_energy.{module}", check=False)
        assert "MissingExtraError" in done.stderr and "pip install 'vla-energy[native]'" in done.stderr, done.stderr
    done = layer.run(str(layer.folder / "bin/vla-energy"), "--help")
    assert "preflight" in done.stdout


@on_pins
def test_core_tests_pass(layer: Layer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.xml"
    options = ("-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), f"--junitxml={results}")
    done = layer.run("-m", "pytest", *options, *map(str, core_files()), check=False)
    with capsys.disabled():
        print(f"\ncore on Python {sys.version.split()[0]}:", done.stdout.strip().rpartition("\n")[2].strip("= "))
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    skipped = [(case.get("classname", ""), case.get("name")) for case in cases if case.find("skipped") is not None]
    assert len(cases) - len(skipped) >= LEAST, f"{len(cases) - len(skipped)} tests ran, expected at least {LEAST}"
    unexpected = [f"{module}.{name}" for module, name in skipped if module.rpartition(".")[2] not in MAY_SKIP]
    assert not unexpected, f"skipped on the host's versions: {unexpected}"
