"""The temperature's three modes; the adaptive one on two ranks; the learnable one at its bounds."""

from __future__ import annotations

import math
import statistics
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from vla_energy import losses
from vla_energy.config import TemperatureConfig
from vla_energy.temperature import Temperature

ADAPTIVE = TemperatureConfig(mode="adaptive", value=0.5, factor=2.0)
LEARNABLE = TemperatureConfig(mode="learnable", value=1.0, minimum=0.2, maximum=4.0)


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """Energies of a rank, each its own number of rows, with entries that must not count."""
    generator = torch.Generator().manual_seed(rank)
    energies = 3 * torch.randn(2 + rank, 5, generator=generator) + 10 * rank
    valid = torch.rand(2 + rank, 5, generator=generator) < 0.7
    valid[0, :3] = torch.tensor([True, True, False])
    energies[0, :3] = torch.tensor([math.nan, math.inf, 1e6])
    return energies, valid


def naive(batches: list[tuple[Tensor, Tensor]]) -> float:
    used = [float(e) for energies, valid in batches for e in energies[valid] if math.isfinite(e)]
    return max(ADAPTIVE.value, ADAPTIVE.factor * statistics.pstdev(used))


def test_fixed_is_a_float_without_parameters() -> None:
    temperature = Temperature(TemperatureConfig(mode="fixed", value=3.0))
    value = temperature(torch.randn(2, 3))
    assert isinstance(value, float) and value == 3
    assert not list(temperature.parameters()) and not temperature.state_dict()


def test_adaptive_equals_its_naive_twin_and_has_no_gradient() -> None:
    temperature = Temperature(ADAPTIVE)
    energies, valid = batch(0)
    value = temperature(energies.requires_grad_(), valid)
    assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad
    assert value.item() == pytest.approx(naive([batch(0)]))
    everything = naive([(energies.detach(), torch.ones_like(valid))])
    assert temperature(energies).item() == pytest.approx(everything) and everything > 1e5
    assert not list(temperature.parameters())


def test_adaptive_falls_back_to_its_value_and_stands_large_energies() -> None:
    temperature = Temperature(ADAPTIVE)
    for energies in (torch.full((2, 3), math.nan), torch.full((2, 3), 7.7), torch.randn(1, 1), torch.zeros(0, 3)):
        assert temperature(energies) == ADAPTIVE.value
    assert temperature(torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.bool)) == ADAPTIVE.value
    assert temperature(torch.tensor([[1e30, -1e30]])).item() == pytest.approx(2e30)
    assert temperature(torch.tensor([[1e5, 1e5 + 1]])).item() == pytest.approx(1.0)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/init"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    alone = [dist.new_group([other]) for other in range(2)][rank]
    energies, valid = batch(rank)
    empty = valid if rank else torch.zeros_like(valid)
    values = [
        Temperature(ADAPTIVE)(energies, valid),
        Temperature(ADAPTIVE)(energies, empty),
        Temperature(ADAPTIVE, group=alone)(energies, valid),
    ]
    torch.save(torch.stack([torch.as_tensor(value) for value in values]), f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that leaves while the other still talks can abort
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_have_the_temperature_of_one_with_all_energies(tmp_path: Path) -> None:
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
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=0, atol=0)
    assert found[0][0].item() == pytest.approx(naive([batch(0), batch(1)]))
    assert found[0][1].item() == pytest.approx(naive([batch(1)]))  # rank 0 had nothing, and still took part
    assert [f[2].item() for f in found] == pytest.approx([naive([batch(rank)]) for rank in range(2)])


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_learnable_stays_within_its_bounds_and_comes_back(direction: float) -> None:
    temperature = Temperature(LEARNABLE)
    bound = LEARNABLE.maximum if direction > 0 else LEARNABLE.minimum
    optimizer = torch.optim.SGD(temperature.parameters(), lr=0.1)

    def step(sign: float) -> float:
        value = temperature(torch.zeros(1, 2))
        optimizer.zero_grad()
        (sign * value).backward()
        optimizer.step()
        return value.item()

    outward = [step(-direction) for _ in range(200)]
    assert all(0.2 * (1 - 1e-6) <= value <= 4.0 * (1 + 1e-6) for value in outward)
    assert outward[0] == pytest.approx(1.0) and outward[-1] == pytest.approx(bound)
    inward = [step(direction) for _ in range(3)]
    assert inward[0] == pytest.approx(bound)
    assert direction * (inward[2] - inward[1]) < 0 and direction * (inward[1] - bound) < 0


def test_learnable_has_one_parameter_with_the_gradient_of_exp() -> None:
    temperature = Temperature(LEARNABLE)
    assert list(temperature.state_dict()) == ["log_value"]
    energies = torch.tensor([[0.2, 0.9, -0.4]])
    losses.info_nce(energies, temperature(energies)).backward()
    found = temperature.log_value.grad
    by_hand = [losses.info_nce(energies.double(), math.exp(log)).item() for log in (1e-4, -1e-4)]
    assert found is not None and found.item() == pytest.approx((by_hand[0] - by_hand[1]) / 2e-4, rel=1e-4)


def test_a_mask_of_another_shape_is_named() -> None:
    for config in (ADAPTIVE, LEARNABLE, TemperatureConfig()):
        with pytest.raises(ValueError, match=r"valid \(2, 2\)"):
            Temperature(config)(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool))
