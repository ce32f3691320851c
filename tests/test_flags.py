"""The command line of the fine-tuning: texts stay as typed, and a run's name is one of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from vla_energy.finetune.config import FinetuneConfig, FlagError
from vla_energy.finetune.flags import parse_flags
from vla_energy.finetune.head_runs import parse_energy

TEXTS = ["off", "007", "12:30", "yes", "null", "~", "1e3", "a: b", "[x]", "'q'", '"', "x\\n", "ü😀", "#1", "a=b", "&a"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("joined", [False, True])
def test_a_text_stays_as_it_was_typed(text: str, joined: bool) -> None:
    """draccus reads every value as YAML, in which these are something else."""
    names = ("run_id_override", "wandb_project", "dataset_name", "dataset_config", "run_root_dir")
    names += ("energy.rollouts.dataset",)
    pairs = [[f"--{name}", text] for name in names]
    config = parse_flags(args=["=".join(pair) if joined else part for pair in pairs for part in pair])
    found = [getattr(config, name) for name in names[:-1]]
    assert found == [text, text, text, text, Path(text)] and config.energy.rollouts.dataset == text


def test_other_values_are_still_read() -> None:
    flags = ["--use_lora", "off", "--batch_size=0x10", "--resume_step", "null", "--wandb_project", "", "--device=cpu"]
    config = parse_flags(args=[*flags, "--energy.enabled", "false"])
    assert (config.use_lora, config.batch_size, config.resume_step) == (False, 16, None)
    assert (config.wandb_project, config.device, config.run_id_override) == ("", "cpu", None)
    config.check()


def test_texts_of_head_trainings_stay_as_they_were_typed() -> None:
    assert parse_energy({}, {"energy.rollouts.dataset": "off"}).rollouts.dataset == "off"


@pytest.mark.parametrize("name", ["", ".", "..", "/tmp/run", "a/b", "a/", "../up"])
def test_a_run_id_is_the_name_of_a_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "flags.yaml"
    path.write_text(f'run_id_override: "{name}"')
    for given in ((None, ["--run_id_override", name]), (path, [])):
        with pytest.raises(FlagError, match=r"--run_id_override '.*': expected the name of a folder"):
            parse_flags(*given)


def test_a_text_flag_without_a_value_takes_no_other_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_flags(args=["--run_id_override", "--batch_size", "8"])
    assert "--run_id_override: expected one argument" in capsys.readouterr().err


def test_a_text_that_draccus_would_take_for_an_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="--run_id_override include_wrist: .* write it in a YAML file"):
        parse_flags(args=["--run_id_override", "include_wrist"])
    (tmp_path / "flags.yaml").write_text("run_id_override: include_wrist")
    assert parse_flags(tmp_path / "flags.yaml", []).run_dir == FinetuneConfig().run_root_dir / "include_wrist"
