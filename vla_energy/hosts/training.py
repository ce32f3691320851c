"""The energy head inside a host's fine-tuning: three calls beside its own loop.

The host's optimiser, scheduler, losses and checkpoints stay as they are: the head has an optimiser of its own behind
the guard, which steps when the host's does, and files of its own beside the host's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_energy.actions import DatasetStatistics
from vla_energy.checkpoint import CheckpointError, atomic_write, load_head, save_head
from vla_energy.compatibility import check_statistics
from vla_energy.distributed import current
from vla_energy.durable import read_torch
from vla_energy.guard import GuardedOptimizer
from vla_energy.head import EnergyHead
from vla_energy.hosts.config import HostEnergyConfig
from vla_energy.hosts.hidden_states import (
    HiddenStates,
    HostError,
    infer_horizon,
    layer_actions,
    trained_positions,
    visible_context,
)
from vla_energy.objective import EnergyObjective
from vla_energy.results import to_json
from vla_energy.sources import ActionTraits, check_sources

logger = logging.getLogger(__name__)

ACTION_TOKEN_BEGIN = 31743
"""Token ids above it are actions (openvla-oft's constants)."""
_STATE = "energy_state--{}_checkpoint.pt"
_HEAD = "energy_head--{}_checkpoint.safetensors"


class EnergyPlugin:
    """The head, its optimiser and its files during one run of the host. Make it with `attach`.

    Attributes:
        head: as trained, wrapped in DDP on several ranks; None where the energy is off.
    """

    def __init__(self, host: Any, energy: HostEnergyConfig, run_dir: Path) -> None:
        self.host, self.energy, self.run_dir = host, energy, run_dir
        self.head: nn.Module | None = None
        self.step = 0
        self._micro = 0  # batches since the host's last step, under gradient accumulation
        self._metrics: Mapping[str, Tensor | float] = {}

    @classmethod
    def attach(
        cls, host: Any, *, vla: Any, action_head: Any, optimizer: torch.optim.Optimizer,
        statistics: Mapping[str, Any], run_dir: str | Path,
    ) -> EnergyPlugin:  # fmt: skip
        """Validates everything and, where `host.energy.enabled`, starts the head; else nothing is touched.

        Args:
            host: the host's config, with a field `energy`.
            vla: the model as it is called, wrapped or not.
            action_head: the host's L1 action head, wrapped or not; None with discrete tokens.
            optimizer: the host's; the head steps after it.
            statistics: the host's dataset statistics, one entry a dataset.
            run_dir: of the run.

        Raises:
            HostError: a mode that this plugin cannot train beside, or objects it does not know.
            CheckpointError: `host.resume` without a fitting head beside the checkpoint.
        """
        plugin = cls(host, host.energy, Path(run_dir))
        if host.energy.enabled:
            plugin._start(vla, action_head, optimizer, statistics)
        return plugin

    @classmethod
    def attach_here(cls, host: Any, names: Mapping[str, Any]) -> EnergyPlugin:
        """`attach` from the local variables of the host's training function, where some modes lack an action head.

        Args:
            host: the host's config.
            names: `vars()` there, once `optimizer`, `train_dataset` and `run_dir` are made.

        Raises:
            HostError: a variable is missing, as in another version of the host; and what `attach` raises.
        """
        if missing := [name for name in ("vla", "optimizer", "train_dataset", "run_dir") if name not in names]:
            raise HostError(f"no variable {', '.join(missing)} here: was the line put into another function?")
        return cls.attach(
            host, vla=names["vla"], action_head=names.get("action_head"), optimizer=names["optimizer"],
            statistics=names["train_dataset"].dataset_statistics, run_dir=names["run_dir"],
        )  # fmt: skip

    def _start(
        self, vla: Any, action_head: Any, optimizer: torch.optim.Optimizer, statistics: Mapping[str, Any]
    ) -> None:
        energy = self.energy
        _check_host(self.host, action_head)
        self.action_head = getattr(action_head, "module", action_head)
        self.statistics = host_statistics(statistics, self.host.dataset_name)
        action_dim = self.statistics.action.dim
        self.hidden = HiddenStates(vla, only_with_grad=True)
        traits = ActionTraits.of(self.statistics)
        device = next(vla.parameters()).device
        language_model = getattr(vla, "module", vla).config.text_config
        context_dim, layers = int(language_model.hidden_size), int(language_model.num_hidden_layers)
        horizon = infer_horizon(self.action_head, action_dim, context_dim)
        ranks = current()
        shape = (ranks.world * self.host.batch_size, layers + 1, horizon, action_dim)
        for warning in check_sources(energy.negatives, *shape, traits):
            logger.warning("%s", warning)
        with torch.random.fork_rng():
            torch.manual_seed(energy.seed)
            head = EnergyHead(context_dim, action_dim, horizon, energy.head_config()).to(device)
        self.horizon = horizon
        self.guard = GuardedOptimizer.adamw(
            head.parameter_groups(),
            energy.learning_rate * energy.guard.lr_factor,
            energy.guard,
            energy.warm_steps,
        )
        self._bare = head
        if self.host.resume:
            self._resume()
        if ranks.world > 1:
            devices = [device] if device.type == "cuda" else None
            self.head = nn.parallel.DistributedDataParallel(head, device_ids=devices)
        else:
            self.head = head
        self.objective = EnergyObjective(self.head, energy.head_config(), traits, ranks)
        self.generator = torch.Generator(device)
        optimizer.register_step_post_hook(self._after_host_step)

    def add_loss(self, loss: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The host's loss plus the head's, to be differentiated together; the same tensor where the energy is off.

        The context carries no gradient, so the policy's gradient is that of the host's loss alone.

        Args:
            loss: 0-d.
            batch: the host's, with `labels (B,T)` and `actions (B,H,A)` normalised.

        Raises:
            HostError: the language model was not called with gradients since the last call.
        """
        if self.head is None:
            return loss
        layers = self.hidden.take()
        length = layers[-1].shape[1]
        labels = batch["labels"].to(layers[-1].device)
        positions = trained_positions(labels, length, ACTION_TOKEN_BEGIN, self.statistics.action.dim)
        chunks = layer_actions(layers, positions, self.action_head, self.horizon)
        expert = batch["actions"].to(chunks)
        # By step, so that a resumed run draws what the uninterrupted one does; alike on all ranks, see the objective.
        self.generator.manual_seed(hash((self.energy.seed, self.step, self._micro)) % 2**63)
        self._micro += 1
        energy, self._metrics = self.objective(
            layers[-1], visible_context(positions, length), expert, chunks, self.generator, self.step
        )
        return loss + energy.to(loss)

    def _after_host_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        metrics = {**self._metrics, **self.guard.step().metrics()}
        if current().is_main and self.step % self.host.wandb_log_freq == 0:
            self._log({name: float(value) for name, value in metrics.items()})
        self.step += 1
        self._micro = 0

    def _log(self, row: dict[str, float]) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with open(self.run_dir / "energy_metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(to_json({"step": self.step, **row})) + "\n")  # JSON has no NaN: null, as in our log
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            return
        if wandb.run is not None:
            wandb.log(row, step=self.step)

    def save(self, step: int) -> None:
        """Writes the head and its training state beside the host's checkpoint of this step; main process only.

        Raises:
            CheckpointError: a file cannot be written, or a weight is not finite; older files are intact.
        """
        if self.head is None or not current().is_main:
            return
        folder, suffix = self.run_dir, "latest"
        if not self.host.save_latest_checkpoint_only:
            folder, suffix = Path(f"{self.run_dir}--{step}_chkpt"), str(step)
        save_head(folder / _HEAD.format(suffix), self._bare, self.step, self.statistics)
        state = {"step": self.step, "guard": self.guard.state_dict()}
        atomic_write(folder / _STATE.format(suffix), lambda file: torch.save(state, file))

    def _resume(self) -> None:
        folder = Path(self.host.vla_path)
        if self.energy.new_head:
            if there := sorted(folder.glob("energy_head--*")):
                raise CheckpointError(
                    f"--energy.new_head True: {there[0]} is there; leave the flag out to go on with it"
                )
            return
        if not any(folder.glob("energy_head--*")):
            raise CheckpointError(
                f"--resume True with --energy.enabled True: {folder} has no energy head; --energy.new_head True starts "
                "one"
            )
        found = load_head(folder)
        if changed := _differences(found.config.to_dict(), self.energy.head_config().to_dict(), "--energy"):
            raise CheckpointError(f"{folder}: the head there was trained with other values of {', '.join(changed)}")
        if found.statistics is not None:
            check_statistics(found.statistics, self.statistics, "the head")
        self._bare.load_state_dict(found.head.state_dict())
        paths = sorted(path for path in folder.glob(_STATE.format("*")) if path.is_file())
        if len(paths) != 1:
            raise CheckpointError(f"{folder}: {len(paths)} files {_STATE.format('*')}, expected one to resume from")
        state = read_torch(paths[0])
        try:
            self.guard.load_state_dict(state["guard"])
            self.step = int(state["step"])
        except Exception as error:  # torch raises what it likes on another optimiser's state
            raise CheckpointError(f"{paths[0]} is damaged ({type(error).__name__}: {error})") from error


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> list[str]:
    """Flags whose values differ."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{name}.{key}")
        elif one != other:
            found.append(f"{name}.{key} ({one}, now {other})")
    return found


def host_statistics(statistics: Mapping[str, Any], name: str) -> DatasetStatistics:
    """The entry of one dataset, from the host's nested dict of arrays or lists.

    Raises:
        HostError, StatisticsError: there is none of this name, or it is malformed.
    """
    if name not in statistics:
        raise HostError(f"no statistics of {name!r}; there are: {', '.join(sorted(statistics))}")
    return DatasetStatistics.from_dict(json.loads(json.dumps(statistics[name], default=_plain)), name)


def _plain(value: Any) -> Any:
    return value.tolist()  # the host keeps arrays


def _check_host(host: Any, action_head: Any) -> None:
    if getattr(host, "use_diffusion", False):
        raise HostError(
            "--energy.enabled True with --use_diffusion True: the noised expert chunk is in the sequence and would "
            "tell the head the answer; fine-tune with --use_l1_regression True"
        )
    if action_head is None or not getattr(host, "use_l1_regression", True):
        raise HostError(
            "--energy.enabled True needs --use_l1_regression True: layer exits come from the action head; beside "
            "discrete tokens scripts/finetune_energy.py trains the energy head"
        )
    negatives = host.energy.negatives
    if negatives.retrieved.count or negatives.samples.count or host.energy.rollouts.dataset:
        raise HostError(
            "--energy.negatives.retrieved, --energy.negatives.samples and --energy.rollouts work in "
            "scripts/finetune_energy.py only"
        )
