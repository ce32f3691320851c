from __future__ import annotations

import copy
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from vla_energy.config import GuardConfig
from vla_energy.guard import GuardedOptimizer, total_norm


def _guarded(warm_steps: int = 0, rate: float = 0.1) -> tuple[nn.Linear, GuardedOptimizer]:
    torch.manual_seed(0)
    head = nn.Linear(3, 1)
    return head, GuardedOptimizer.adamw(head.parameters(), rate, GuardConfig(skip_grad_norm=10.0), warm_steps)


def _set_gradient(head: nn.Module, norm: float) -> None:
    count = sum(parameter.numel() for parameter in head.parameters())
    for parameter in head.parameters():
        parameter.grad = torch.full_like(parameter, norm / math.sqrt(count))


def test_total_norm_equals_that_of_all_elements() -> None:
    gradients = [torch.randn(3, 2), torch.randn(5), torch.randn(())]
    torch.testing.assert_close(total_norm(gradients), torch.cat([g.flatten() for g in gradients]).norm())
    assert total_norm([]) == 0
    assert total_norm([torch.full((4,), 1e38)]) == math.inf


@pytest.mark.parametrize(
    ("norm", "kind"), [(math.nan, "nonfinite"), (math.inf, "nonfinite"), (10.1, "too_large"), (None, "no_gradient")]
)
def test_skip_leaves_weights_and_optimiser_alone_and_counts(norm: float | None, kind: str) -> None:
    head, guarded = _guarded()
    _set_gradient(head, 0.1)
    guarded.step()
    before, state = copy.deepcopy(head.state_dict()), copy.deepcopy(guarded.optimizer.state_dict())
    if norm is not None:
        _set_gradient(head, norm)
    report = guarded.step()
    assert report.skipped == kind and not report.clipped
    assert guarded.counters == {"steps": 1, "clipped": 0, "no_gradient": 0, "too_large": 0, "nonfinite": 0, kind: 1}
    torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(guarded.optimizer.state_dict(), state, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize("norm", [0.3, 4.0])
def test_step_equals_plain_clip_and_step(norm: float) -> None:
    head, guarded = _guarded()
    twin = copy.deepcopy(head)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=1e-4)
    for module in (head, twin):
        _set_gradient(module, norm)
    report = guarded.step()
    nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    optimizer.step()
    torch.testing.assert_close(head.state_dict(), twin.state_dict())
    assert report.clipped == (norm > 0.5) and report.grad_norm == pytest.approx(norm)


def test_warm_up_counts_steps_taken_and_touches_its_own_groups_only() -> None:
    head, guarded = _guarded(warm_steps=4, rate=0.2)
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=7.0)
    rates = []
    for norm in (0.1, 0.1, math.nan, 0.1, 0.1, 0.1):
        _set_gradient(head, norm)
        rates.append(guarded.step().learning_rate)
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.15, 0.2, 0.2])
    assert other.param_groups[0]["lr"] == 7.0


def test_two_steps_then_resume_equals_four() -> None:
    def train(head: nn.Module, guarded: GuardedOptimizer, norms: tuple[float, ...]) -> None:
        for norm in norms:
            _set_gradient(head, norm)
            guarded.step()

    head, guarded = _guarded(warm_steps=6)
    train(head, guarded, (0.2, 3.0))
    resumed, continued = _guarded(warm_steps=6, rate=99.0)
    resumed.load_state_dict(head.state_dict())
    continued.load_state_dict(copy.deepcopy(guarded.state_dict()))
    for module, optimizer in ((head, guarded), (resumed, continued)):
        train(module, optimizer, (math.inf, 0.4))
    torch.testing.assert_close(resumed.state_dict(), head.state_dict(), rtol=0, atol=0)
    assert continued.counters == guarded.counters
    with pytest.raises(ValueError, match="guarded optimiser"):
        continued.load_state_dict({"optimizer": {}})


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/init"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    head, guarded = _guarded()
    reports: list[str | None] = []
    for norm in (0.1, math.nan if rank == 1 else 0.1, 20.0 if rank == 0 else 0.1, 0.1):
        _set_gradient(head, norm)
        reports.append(guarded.step().skipped)
    weights: dict[str, Tensor] = head.state_dict()
    torch.save({"reports": reports, "weights": weights}, f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that leaves while the other still talks can abort
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_ranks_skip_together(tmp_path: Path) -> None:
    context = spawn(_rank, args=(str(tmp_path),), nprocs=2, join=False)
    assert context is not None
    try:
        for _ in range(240):
            if context.join(timeout=1):
                break
        else:
            pytest.fail("the ranks hang")
    finally:
        for process in context.processes:
            if process is not None and process.is_alive():
                process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["reports"] == second["reports"] == [None, "nonfinite", "too_large", None]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
