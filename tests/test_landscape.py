from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vla_energy.config import EnergyConfig
from vla_energy.head import EnergyHead
from vla_energy.landscape import Slice, descent_alignment, plane_slice, plot_slice

B, N, H, A = 3, 5, 4, 2


def _chunks(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, H, A, generator=generator), torch.randn(B, H, A, generator=generator)


def _bowl(centre: Tensor, sign: float = 1.0):
    return lambda actions: sign * (actions - centre[:, None]).square().sum((2, 3))


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, -1.0), (1e25, 1.0), (1e-25, 1.0)])
def test_alignment_of_a_bowl_around_the_expert_is_one_and_of_a_hill_minus_one(sign: float, expected: float) -> None:
    actions, expert = _chunks()
    out = descent_alignment(_bowl(expert, sign), actions, expert)
    torch.testing.assert_close(out, torch.full((B, N), expected))


def test_alignment_is_zero_across_and_where_there_is_no_slope_or_no_way_to_go() -> None:
    actions, expert = torch.zeros(1, 3, 1, 2), torch.tensor([[[1.0, 0.0]]])
    actions[0, 2] = expert[0]
    torch.testing.assert_close(descent_alignment(lambda a: a[..., 1].sum(2), actions, expert), torch.zeros(1, 3))
    torch.testing.assert_close(descent_alignment(lambda a: 0 * a.sum((2, 3)), actions, expert), torch.zeros(1, 3))
    diagonal = descent_alignment(lambda a: -a.sum((2, 3)), actions, expert)
    torch.testing.assert_close(diagonal, torch.tensor([[0.5**0.5, 0.5**0.5, 0.0]]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, (0,), (-1,), (1, 0)]))
def test_alignment_equals_finite_differences(seed: int, dims: tuple[int, ...] | None) -> None:
    actions, expert = _chunks(seed)
    weights = torch.randn(H, A, generator=torch.Generator().manual_seed(seed))

    def energy_fn(chunks: Tensor) -> Tensor:
        return (torch.sin(chunks) * weights.to(chunks)).sum((2, 3)) + chunks.square().sum((2, 3))

    out = descent_alignment(energy_fn, actions, expert, dims)
    picked = range(A) if dims is None else [dim % A for dim in dims]
    for b in range(B):
        for n in range(N):
            descent, way = [], []
            for h in range(H):
                for a in picked:
                    bump = torch.zeros(B, N, H, A, dtype=torch.float64)
                    bump[b, n, h, a] = 1e-5
                    change = energy_fn(actions.double() + bump) - energy_fn(actions.double() - bump)
                    descent.append(float(-change[b, n] / 2e-5))
                    way.append(float(expert[b, h, a] - actions[b, n, h, a]))
            dot = sum(x * y for x, y in zip(descent, way, strict=True))
            assert float(out[b, n]) == pytest.approx(dot / math.hypot(*descent) / math.hypot(*way), abs=1e-4)


def test_alignment_is_nan_where_something_is_not_finite_and_only_there() -> None:
    actions, expert = _chunks()
    actions[0, 1, 0, 0] = math.nan
    actions[1, 2, 0, 0] = math.inf
    out = descent_alignment(_bowl(expert), actions, expert)
    expected = torch.zeros(B, N, dtype=torch.bool)
    expected[0, 1] = expected[1, 2] = True
    assert torch.equal(out.isnan(), expected)
    energies = torch.zeros(B, N)
    energies[2, 3] = math.inf
    actions, expert = _chunks()
    out = descent_alignment(lambda a: _bowl(expert)(a) + energies, actions, expert)
    assert out.isnan().nonzero().tolist() == [[2, 3]], "an infinite energy with a finite gradient"
    actions[0, 0, 0, 0] = 0
    out = descent_alignment(lambda a: a.abs().sqrt().sum((2, 3)) + _bowl(expert)(a), actions, expert)
    assert out.isnan().nonzero().tolist() == [[0, 0]], "a finite energy with an infinite gradient"


def _head() -> tuple[EnergyHead, Tensor, Tensor]:
    torch.manual_seed(0)
    head = EnergyHead(6, A, H, EnergyConfig()).eval()
    return head, torch.randn(B, 7, 6), torch.ones(B, 7, dtype=torch.bool)


def test_alignment_leaves_no_gradient_and_works_without_grad() -> None:
    head, context, mask = _head()
    actions, expert = _chunks()
    expected = descent_alignment(lambda a: head((context, mask), a), actions, expert)
    assert float(expected.abs().min()) > 0 and float(expected.abs().max()) <= 1 and not expected.requires_grad
    actions.requires_grad_()
    with torch.no_grad():
        encoded = head.encode(context, mask)
        out = descent_alignment(lambda a: head(encoded, a), actions, expert)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(out, expected)
    assert actions.grad is None and all(parameter.grad is None for parameter in head.parameters())
    head.requires_grad_(False)
    torch.testing.assert_close(descent_alignment(lambda a: head(encoded, a), actions, expert), expected)


def test_alignment_works_in_inference_mode_unless_the_energy_holds_its_tensors() -> None:
    head, context, mask = _head()
    actions, expert = _chunks()
    expected = descent_alignment(lambda a: head((context, mask), a), actions, expert)
    with torch.inference_mode():
        moved, target = actions + 0, expert + 0
        assert moved.is_inference() and target.is_inference()
        out = descent_alignment(lambda a: head((context, mask), a), moved, target)
        encoded = head.encode(context, mask)
        with pytest.raises(RuntimeError, match="(?i)inference tensors"):
            descent_alignment(lambda a: head(encoded, a), moved, target)
        assert torch.is_inference_mode_enabled()
    assert not out.is_inference()
    torch.testing.assert_close(out, expected)


def test_alignment_refuses_what_does_not_fit() -> None:
    actions, expert = _chunks()
    with pytest.raises(ValueError, match=r"expert \(2, 4, 2\)"):
        descent_alignment(_bowl(expert), actions, expert[:2])
    for dims in ([], [2], [0, 0], [0, -2]):
        with pytest.raises(ValueError, match="dims="):
            descent_alignment(_bowl(expert), actions, expert, dims)
    with pytest.raises(ValueError, match=r"energy_fn gave \(3,\)"):
        descent_alignment(lambda a: a.sum((1, 2, 3)), actions, expert)
    weight = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="no gradient"):
        descent_alignment(lambda a: a.detach().sum((2, 3)), actions, expert)
    with pytest.raises(ValueError, match="no gradient"):
        descent_alignment(lambda a: weight * a.detach().sum((2, 3)), actions, expert)


def _plane(energy_fn, policy: Tensor, expert: Tensor, **settings) -> Slice:
    return plane_slice(energy_fn, policy, expert, generator=torch.Generator().manual_seed(3), **settings)


@pytest.mark.parametrize("block_size", [1, 7, 10_000])
def test_slice_equals_direct_evaluation_point_by_point(block_size: int) -> None:
    actions, expert = _chunks()
    policy, sizes, seen = actions[:, 0], [], []

    def plain(chunks: Tensor) -> Tensor:
        return (chunks.cos() * torch.arange(float(H * A)).view(H, A)).sum((2, 3))

    def energy_fn(chunks: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        sizes.append(chunks.shape[1])
        seen.append(chunks)
        return plain(chunks)

    out = _plane(energy_fn, policy, expert, extent=0.5, resolution=6, block_size=block_size)
    torch.testing.assert_close(out.xs, torch.linspace(-0.5, 1.5, 6))
    torch.testing.assert_close(out.ys, torch.linspace(-1.0, 1.0, 6))
    assert out.energies.shape == (B, 6, 6)
    assert max(sizes) == min(block_size, 36) and sum(sizes) == 36
    points = torch.cat(seen, 1).unflatten(1, (6, 6))
    for b in range(B):
        across = expert[b] - policy[b]
        up = (points[b, 5, 0] - points[b, 0, 0]) / 2
        assert abs(float((across * up).sum())) < 1e-5
        assert float(up.norm()) == pytest.approx(float(across.norm()), rel=1e-5)
        for j, y in enumerate(out.ys.tolist()):
            for i, x in enumerate(out.xs.tolist()):
                direct = plain((policy[b] + x * across + y * up).expand(1, 1, H, A))
                torch.testing.assert_close(out.energies[b, j, i], direct[0, 0], rtol=1e-5, atol=1e-4)


def test_lowest_point_of_bowls_is_where_they_were_put() -> None:
    actions, expert = _chunks()
    policy = actions[:, 0]
    # Resolution 31 with extent 1: steps of 0.1, so that both chunks lie on the grid.
    for centre, x in ((policy, 0.0), (expert, 1.0), (policy + 0.3 * (expert - policy), 0.3)):
        out = _plane(_bowl(centre), policy, expert, resolution=31)
        for row in range(B):
            assert out.lowest(row) == pytest.approx((x, 0.0), abs=1e-5)
            unit = (expert[row] - policy[row]).square().sum()
            expected = unit * ((out.xs - x).square() + out.ys[:, None].square())  # y is a row of the picture
            torch.testing.assert_close(out.energies[row], expected, rtol=1e-4, atol=1e-4)


def test_lowest_leaves_out_nan() -> None:
    energies = torch.tensor([[[math.nan, math.inf], [2.0, 1.0]], [[math.nan, math.nan], [math.nan, math.nan]]])
    plane = Slice(torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 2.0]), energies)
    assert plane.lowest(0) == (1.0, 2.0)
    with pytest.raises(ValueError, match="row 1"):
        plane.lowest(1)


def test_slice_depends_on_the_generator_alone() -> None:
    actions, expert = _chunks()
    skewed = lambda chunks: (chunks * torch.arange(float(H * A)).view(H, A)).sum((2, 3))  # noqa: E731
    first, second = (_plane(skewed, actions[:, 0], expert, resolution=4).energies for _ in range(2))
    assert torch.equal(first, second)
    other = plane_slice(skewed, actions[:, 0], expert, resolution=4, generator=torch.Generator().manual_seed(4))
    assert not torch.allclose(first, other.energies)


def test_slice_refuses_what_does_not_fit() -> None:
    actions, expert = _chunks()
    policy = actions[:, 0].clone()
    for bad in (math.inf, math.nan):
        broken = policy.clone()
        broken[1, 0, 0] = bad
        with pytest.raises(ValueError, match="row 1: policy and expert"):
            _plane(_bowl(expert), broken, expert)
    policy[0], policy[2] = expert[0], expert[2]
    with pytest.raises(ValueError, match="row 0, 2: policy and expert"):
        _plane(_bowl(expert), policy, expert)
    policy = actions[:, 0]
    for changed in ({"extent": -0.1}, {"extent": math.inf}, {"resolution": 1}, {"block_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(changed))}="):
            _plane(_bowl(expert), policy, expert, **changed)
    with pytest.raises(ValueError, match=r"policy \(2, 4, 2\)"):
        _plane(_bowl(expert), policy[:2], expert)
    with pytest.raises(ValueError, match=r"H\*A > 1"):
        _plane(_bowl(expert), policy[:, :1, :1], expert[:, :1, :1])


def test_plot_shows_contours_and_three_marks() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib.figure import Figure

    actions, expert = _chunks()
    plane = _plane(_bowl(expert), actions[:, 0], expert, resolution=31)
    partly = plane.energies.clone()
    partly[0, 0, :3] = math.nan
    flat = torch.zeros_like(partly)
    for energies, lowest in ((plane.energies, (1.0, 0.0)), (partly, (1.0, 0.0)), (flat, (-1.0, -1.5))):
        figure = Figure()
        axis = figure.add_subplot()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plot_slice(Slice(plane.xs, plane.ys, energies), 0, axis, "bowl")
            figure.canvas.draw()
        marks = {line.get_label(): (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axis.lines}  # type: ignore[index]
        assert marks["policy"] == (0, 0) and marks["expert"] == (1, 0)
        assert marks["lowest"] == pytest.approx(lowest, abs=1e-5)
        assert axis.get_title() == "bowl" and axis.collections
    with pytest.raises(ValueError, match="row 0"):
        plot_slice(Slice(plane.xs, plane.ys, flat * math.nan), 0, axis, "nothing")
