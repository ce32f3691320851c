"""Sources of negatives: what a config draws, in which columns, and what is refused or told at the start."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_energy import negatives
from vla_energy.actions import DatasetStatistics, FieldStatistics
from vla_energy.config import SOURCES, EnergyConfig, NegativesConfig
from vla_energy.noise import noise_scale
from vla_energy.sources import ActionTraits, NegativeSet, build_negatives, check_sources

B, L, H, A = 5, 5, 4, 3
TRAITS = ActionTraits(
    torch.tensor([0.5, 1.5, 0.0]), (2,), torch.tensor([-1.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(rows: int = B, layers: int = L, horizon: int = H) -> tuple[torch.Tensor, torch.Tensor]:
    expert = torch.randn(rows, horizon, A, generator=generator(1))
    return expert, torch.randn(rows, layers, horizon, A, generator=generator(2))


def only(*names: str) -> NegativesConfig:
    """The defaults with `names` switched on, at 2 where they are off by default, and all others off."""
    config = NegativesConfig()
    for name in SOURCES:
        source = getattr(config, name)
        source.count = 0 if name not in names else 1 if name in ("amplitude", "gripper_flip") else source.count or 2
    return config


def build(
    config: NegativesConfig, expert: torch.Tensor, layer_actions: torch.Tensor, seed: int = 0, **more: object
) -> NegativeSet:
    return build_negatives(config, expert, layer_actions[:, -1], layer_actions, generator(seed), **more)  # type: ignore[arg-type]


def lent(expert: torch.Tensor, count: int = 3) -> torch.Tensor:
    """As a memory would lend them."""
    return torch.randn(len(expert), count, *expert.shape[1:], generator=generator(4))


def size(chunks: torch.Tensor) -> torch.Tensor:
    """An energy that needs no context."""
    return chunks.square().mean((2, 3))


def first_release(expert: torch.Tensor, layer_actions: torch.Tensor, seed: int) -> torch.Tensor:
    """The chunks that the first release drew with the default settings, in its order and by its own formulas."""
    source, (rows, horizon, dims), policy = generator(seed), expert.shape, layer_actions[:, -1]
    parts = [layer_actions[:, [1, 2, 3]]]
    for centre, stds in ((expert, (0.1, 0.3, 0.5)), (policy, (0.02, 0.05, 0.1))):
        if centre is policy:
            parts.append(policy[:, None])
        noise = torch.randn((rows, 3, 2, horizon, dims), generator=source)
        parts.append(centre[:, None] + (noise * torch.tensor(stds)[:, None, None, None]).flatten(1, 2))
    order = torch.rand((rows, rows - 1), generator=source).argsort(1)[:, :7] + 1
    parts.append(expert[(torch.arange(rows)[:, None] + order) % rows])
    return torch.cat(parts, 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(0, 99))
def test_the_first_sources_draw_what_they_always_drew_whatever_is_added(rows: int, seed: int) -> None:
    expert, layer_actions = batch(rows)
    expected = first_release(expert, layer_actions, seed)
    config = NegativesConfig()
    config.policy_noise.correlation = 0.0
    assert torch.equal(build(config, expert, layer_actions, seed).chunks, expected)
    config = only(*SOURCES)
    config.policy_noise.correlation = 0.0
    more = build(
        config, expert, layer_actions, seed, traits=TRAITS, energy_fn=size, retrieved=lent(expert), samples=lent(expert)
    )
    assert torch.equal(more.chunks[:, : expected.shape[1]], expected)


def test_build_stacks_every_source_with_its_weight() -> None:
    expert, layer_actions = batch()
    config = NegativesConfig()
    config.in_batch.weight = 0.5
    built = build(config, expert, layer_actions)
    exits = ["layer_exits", "layer_exit_1", "layer_exit_2", "layer_exit_3"]
    assert list(built.sources) == [*exits, "expert_noise", "policy", "policy_noise", "in_batch"]
    assert [built.chunks[:, s].shape[1] for s in built.sources.values()] == [3, 1, 1, 1, 6, 1, 6, 4]
    assert torch.equal(built.chunks[:, built.sources["policy"]][:, 0], layer_actions[:, -1])
    assert built.weight.tolist() == [1.0] * 16 + [0.5] * 4
    assert built.valid.shape == built.distances.shape == (5, 20)
    assert built.empty == ()
    assert torch.equal(built.valid, ~negatives.near_positive_mask(built.chunks, expert, 0.02))


def test_all_sources_fill_columns_of_their_own_in_order() -> None:
    expert, layer_actions = batch()
    config = only(*SOURCES)
    for i, name in enumerate(SOURCES, 1):
        getattr(config, name).weight = float(i)
    built = build(
        config, expert, layer_actions, traits=TRAITS, energy_fn=size, retrieved=lent(expert), samples=lent(expert)
    )
    tops = {name: columns for name, columns in built.sources.items() if not name.startswith("layer_exit_")}
    order = ["layer_exits", "expert_noise", "policy", "policy_noise", "in_batch", "shuffle", "shift", "amplitude"]
    assert list(tops) == [*order, "gripper_flip", "hard", "retrieved", "samples"]
    stop = 0
    for name, columns in tops.items():
        assert columns.start == stop and columns.stop > stop
        stop = columns.stop
        weight = getattr(config, "policy_noise" if name == "policy" else name).weight
        assert built.weight[columns].tolist() == [weight] * (columns.stop - columns.start)
    assert built.chunks.shape == (B, stop, H, A) and not built.chunks.requires_grad
    slow = torch.stack([(built.chunks[:, n] - expert).abs().mean((1, 2)) for n in range(stop)], 1)
    torch.testing.assert_close(built.distances, slow)
    amplitude = built.chunks[:, built.sources["amplitude"]]
    assert torch.equal(amplitude, negatives.amplitude(expert, (0.5, 1.5), (2,)))
    flipped = built.chunks[:, built.sources["gripper_flip"]]
    assert torch.equal(flipped[:, 0, :, 2], 1 - expert[..., 2])
    assert torch.equal(built.chunks[:, built.sources["retrieved"]], lent(expert)[:, :2])
    assert torch.equal(built.chunks[:, built.sources["samples"]], lent(expert)[:, :2])
    shuffled = built.chunks[:, built.sources["shuffle"]]
    assert torch.equal(shuffled.sort(2).values, expert.sort(1).values[:, None].expand_as(shuffled))


def test_layers_are_named_by_their_numbers() -> None:
    expert, layer_actions = batch(layers=7)
    config = only("layer_exits", "in_batch")
    config.layer_exits.layers = (5, 2)
    built = build(config, expert, layer_actions)
    assert built.sources["layer_exits"] == slice(0, 2)
    for layer in (5, 2):
        assert torch.equal(built.chunks[:, built.sources[f"layer_exit_{layer}"]][:, 0], layer_actions[:, layer])
    config.layer_exits.layers, config.layer_exits.count = (), 2
    built = build(config, expert, layer_actions)
    spread = [name for name in built.sources if name.startswith("layer_exit_")]
    assert spread == [f"layer_exit_{layer}" for layer in negatives.exit_layers(7, 2)]
    assert torch.equal(built.chunks[:, built.sources[spread[0]]][:, 0], layer_actions[:, int(spread[0][-1])])


def test_sources_without_rows_or_layers_or_steps_are_named() -> None:
    expert, layer_actions = batch(rows=1, layers=2)
    built = build(NegativesConfig(), expert, layer_actions)
    assert built.empty == ("layer_exits", "in_batch")
    assert not [name for name in built.sources if name.startswith("layer_exit_")]
    built = build(EnergyConfig.preset("original").negatives, expert, layer_actions)
    assert built.chunks.shape == (1, 0, H, A)
    assert built.valid.shape == (1, 0)
    expert, layer_actions = batch(horizon=1)
    assert build(only("shuffle", "shift", "in_batch"), expert, layer_actions).empty == ("shuffle", "shift")


def test_a_duplicate_of_the_expert_is_no_negative() -> None:
    expert = torch.full((3, H, A), 0.3)  # all rows alike, and no row moves
    config = only("in_batch", "shuffle", "shift")
    built = build(config, expert, expert[:, None])
    assert built.chunks.shape[1] == 6
    assert not built.valid.any()


def test_noise_per_dimension_spares_what_does_not_move() -> None:
    expert, layer_actions = batch()
    config = only("expert_noise", "policy_noise")
    plain = build(config, expert, layer_actions)
    config.expert_noise.per_dimension = config.policy_noise.per_dimension = True
    scaled = build(config, expert, layer_actions, traits=TRAITS)
    for name, centre in (("expert_noise", expert), ("policy_noise", layer_actions[:, -1])):
        columns, centre = plain.sources[name], centre[:, None]
        noise, plain_noise = scaled.chunks[:, columns] - centre, plain.chunks[:, columns] - centre
        torch.testing.assert_close(noise, plain_noise * TRAITS.scale, rtol=0, atol=1e-6)


def test_correlation_smooths_the_noise_around_the_policy_alone() -> None:
    expert, layer_actions = batch(rows=400)
    config = only("expert_noise", "policy_noise")
    config.policy_noise.correlation = 0.9
    built = build(config, expert, layer_actions)
    for name, centre, expected in (("expert_noise", expert, 0.0), ("policy_noise", layer_actions[:, -1], 0.9)):
        noise = built.chunks[:, built.sources[name]] - centre[:, None]
        noise = noise / noise.std((0, 2, 3), keepdim=True)
        assert (noise[:, :, 1:] * noise[:, :, :-1]).mean() == pytest.approx(expected, abs=0.03)


def test_shapes_that_do_not_fit_are_refused() -> None:
    expert, layer_actions = batch()
    with pytest.raises(ValueError, match="layer_actions"):
        build(NegativesConfig(), expert[:, :2], layer_actions)
    with pytest.raises(ValueError, match=r"layer_actions \(5, 4, 3\)"):
        build_negatives(NegativesConfig(), expert, expert, expert, generator())


def mine(
    rows: int, pool: int, count: int, expert_std: float = 0.3, policy_std: float = 0.05
) -> tuple[NegativeSet, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The set, the pool its energies were asked of, expert and policy; the policy is far from every expert chunk."""
    config = only("hard")
    config.hard.pool, config.hard.count = pool, count
    config.expert_noise.stds, config.policy_noise.stds = (expert_std,), (policy_std, 2 * policy_std)
    expert, layer_actions = batch(rows)
    layer_actions = layer_actions + 20
    asked = []

    def energy_fn(chunks: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        asked.append(chunks)
        return size(chunks)

    built = build(config, expert, layer_actions, energy_fn=energy_fn)
    assert len(asked) == 1 and asked[0].shape == (rows, pool, H, A)
    return built, asked[0], expert, layer_actions[:, -1]


@pytest.mark.parametrize(
    ("rows", "pool", "expected"),
    [
        (9, 12, (4, 4, 4)),
        (9, 11, (3, 3, 5)),
        (3, 12, (5, 5, 2)),
        (1, 7, (3, 4, 0)),
        (1, 1, (0, 1, 0)),
        (2, 2, (0, 1, 1)),
    ],
)
def test_the_pool_is_of_three_kinds_and_filled_with_noise(rows: int, pool: int, expected: tuple[int, ...]) -> None:
    _, chunks, expert, policy = mine(rows, pool, 1)
    for row in range(rows):
        swapped = [[bool((chunk == other).all()) for other in expert] for chunk in chunks[row]]
        assert not any(same[row] for same in swapped)
        others = sum(map(any, swapped))
        near = (chunks[row] - policy[row]).abs().mean((1, 2)) < 1
        assert (pool - others - int(near.sum()), int(near.sum()), others) == expected


def test_the_pools_noise_takes_turns_with_all_stds() -> None:
    _, chunks, expert, policy = mine(400, 15, 1)
    spread = torch.cat([chunks[:, :5] - expert[:, None], chunks[:, 5:10] - policy[:, None]], 1).std((0, 2, 3))
    torch.testing.assert_close(spread, torch.tensor([0.3] * 5 + [0.05, 0.1, 0.05, 0.1, 0.05]), rtol=0.1, atol=0)


def test_hard_takes_the_lowest_energies_of_the_pool_and_no_near_positive() -> None:
    built, chunks, expert, _ = mine(6, 30, 4, expert_std=0.025)  # around half of this noise is nearer than 0.02
    near = negatives.near_positive_mask(chunks, expert, 0.02)
    assert near.any() and not near.all(1).any()
    assert list(built.sources) == ["hard"] and built.valid.all()
    for row in range(6):
        usable = chunks[row][~near[row]]
        best = usable[size(usable[None])[0].argsort()[:4]]
        assert torch.equal(built.chunks[row], best)


def test_columns_of_hard_that_cannot_be_filled_are_not_valid() -> None:
    config = only("hard", "in_batch")
    config.hard.pool, config.hard.count = 9, 6
    config.expert_noise.stds = config.policy_noise.stds = (1e-4,)
    expert, _ = batch()
    built = build(config, expert, expert[:, None], energy_fn=size)
    # Expert and policy are the same, so but the 3 chunks of other rows are near-positives.
    assert built.valid[:, built.sources["hard"]].tolist() == [[True] * 3 + [False] * 3] * B
    assert built.valid[:, built.sources["in_batch"]].all()
    assert built.chunks.isfinite().all()
    built = build(config, expert, expert[:, None], energy_fn=lambda chunks: size(chunks) * float("nan"))
    assert built.valid[:, built.sources["hard"]].sum(1).tolist() == [3] * B


def test_what_mining_could_not_fill_is_not_valid_however_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = torch.tensor([[True, False]] * B)
    monkeypatch.setattr(negatives, "hard", lambda energies, chunks, valid, count: (chunks[:, :2] + 9, filled))
    expert, layer_actions = batch()
    built = build(only("in_batch", "hard"), expert, layer_actions, energy_fn=size)
    assert torch.equal(built.valid[:, built.sources["hard"]], filled)


def test_hard_needs_energies_and_noise() -> None:
    expert, layer_actions = batch()
    with pytest.raises(ValueError, match=r"negatives\.hard.*energy_fn"):
        build(only("hard"), expert, layer_actions)
    with pytest.raises(ValueError, match=r"energy_fn gave \(5,\)"):
        build(only("hard"), expert, layer_actions, energy_fn=lambda chunks: size(chunks)[:, 0])
    config = only("hard")
    config.policy_noise.stds = ()
    with pytest.raises(ValueError, match=r"negatives\.policy_noise\.stds is empty"):
        build(config, expert, layer_actions, energy_fn=size)


def test_traits_of_statistics() -> None:
    values = np.random.default_rng(0).normal(size=(500, A)) * (1, 10, 1)
    values[:, 2] = values[:, 2] > 0
    statistics = DatasetStatistics(FieldStatistics.of(values, np.array([True, True, False])), None, 0, 0)
    traits = ActionTraits.of(statistics)
    assert traits.gripper_dims == (2,) and all(type(dim) is int for dim in traits.gripper_dims)
    assert torch.equal(traits.scale, noise_scale(statistics))
    assert traits.low.tolist() == [-1, -1, 0] and traits.high.tolist() == [1, 1, 1]
    assert {part.dtype for part in (traits.scale, traits.low, traits.high)} == {torch.float32}


def per_dimension(name: str, *names: str) -> NegativesConfig:
    config = only(*names)
    getattr(config, name).per_dimension = True
    return config


def with_layers(*layers: int) -> NegativesConfig:
    config = only("layer_exits", "in_batch")
    config.layer_exits.layers = layers
    return config


NO_GRIPPER = replace(TRAITS, gripper_dims=())
IMPOSSIBLE = [
    (with_layers(1, 4), TRAITS, r"layer 4 of layer_exits\.layers.*1 to L - 2 = 3"),
    (per_dimension("expert_noise", "expert_noise"), None, r"negatives\.expert_noise\.per_dimension=True"),
    (per_dimension("policy_noise", "policy_noise"), None, r"negatives\.policy_noise\.per_dimension=True"),
    (per_dimension("policy_noise", "hard"), None, r"negatives\.policy_noise\.per_dimension=True"),
    (only("amplitude"), None, r"negatives\.amplitude is on.*traits"),
    (only("gripper_flip"), None, r"negatives\.gripper_flip is on.*traits"),
    (only("gripper_flip", "in_batch"), NO_GRIPPER, r"negatives\.gripper_flip is on.*no gripper"),
    (only("in_batch"), replace(TRAITS, scale=torch.ones(4)), r"\(4,\), \(3,\), \(3,\).*3 dimensions"),
]


@pytest.mark.parametrize(("config", "traits", "message"), IMPOSSIBLE)
def test_what_is_impossible_is_refused_at_the_start_and_at_every_draw(
    config: NegativesConfig, traits: ActionTraits | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_sources(config, B, L, H, A, traits)
    with pytest.raises(ValueError, match=message):
        build(config, *batch(), traits=traits, energy_fn=size)


def test_settings_of_sources_that_are_off_ask_for_nothing() -> None:
    assert check_sources(per_dimension("expert_noise", "in_batch"), B, L, H, A) == []
    config = with_layers(9)
    config.layer_exits.count = 0
    assert check_sources(config, B, L, H, A) == []


STILL, ALL_GRIPPERS = replace(TRAITS, low=TRAITS.high), replace(TRAITS, gripper_dims=(0, 1, 2))
IDLE = [
    ("in_batch", {"batch_size": 1}, "negatives.in_batch is on but batch_size is 1: it needs 2 or more"),
    ("layer_exits", {"num_layers": 2}, "negatives.layer_exits is on but the policy has 2 layers: it needs 3 or more"),
    ("shuffle", {"horizon": 1}, "negatives.shuffle is on but the horizon is 1: it needs 2 or more"),
    ("shift", {"horizon": 1}, "negatives.shift is on but the horizon is 1: it needs 2 or more"),
    ("gripper_flip", {"traits": STILL}, "negatives.gripper_flip is on but the gripper never moves in the statistics"),
    ("amplitude", {"traits": ALL_GRIPPERS}, "negatives.amplitude is on but every action dimension is a gripper's"),
]


@pytest.mark.parametrize(("name", "change", "warning"), IDLE)
def test_sources_that_cannot_give_a_chunk_are_told(name: str, change: dict[str, object], warning: str) -> None:
    sizes = {"batch_size": B, "num_layers": L, "horizon": H, "action_dim": A, "traits": TRAITS}
    assert check_sources(only(name), **sizes) == []  # type: ignore[arg-type]
    sizes |= change
    assert check_sources(only(name, "expert_noise"), **sizes) == [warning]  # type: ignore[arg-type]
    assert check_sources(only("expert_noise"), **sizes) == []  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no source of negatives can give a chunk") as error:
        check_sources(only(name), **sizes)  # type: ignore[arg-type]
    assert warning in str(error.value)


def test_the_margin_asks_only_for_what_is_drawn() -> None:
    sizes = (B, L, H, A, TRAITS)
    names = ("layer_exits", "layer_exit_1", "policy", "policy_noise")
    assert check_sources(only("layer_exits", "policy_noise"), *sizes, names) == []
    for name in ("in_batch", f"layer_exit_{L - 1}"):
        with pytest.raises(ValueError, match=rf"margin_sources=\['{name}'\]: not drawn.*layer_exit_1"):
            check_sources(only("layer_exits", "policy_noise"), *sizes, (name, "policy"))
    with pytest.raises(ValueError, match="margin_sources"):
        check_sources(only("in_batch"), *sizes, ("policy",))


def test_every_idle_source_is_told_and_sizes_are_checked() -> None:
    warnings = check_sources(only(*SOURCES), 1, 2, 1, A, TRAITS)
    assert [warning.split()[0] for warning in warnings] == [
        f"negatives.{name}" for name in ("layer_exits", "shuffle", "shift", "in_batch")
    ]
    with pytest.raises(ValueError, match="horizon=0"):
        check_sources(NegativesConfig(), B, L, 0, A)


def test_chunks_of_others_are_needed_and_enough_of_them() -> None:
    expert, layer_actions = batch()
    config = only("retrieved")
    with pytest.raises(ValueError, match="vla-energy memory"):
        build(config, expert, layer_actions)
    with pytest.raises(ValueError, match="K >= 2"):
        build(config, expert, layer_actions, retrieved=lent(expert, 1))
    config = only("samples")
    with pytest.raises(ValueError, match="negatives.samples is on.*--use_diffusion True or --use_l1_regression False"):
        build(config, expert, layer_actions)
    with pytest.raises(ValueError, match="samples .*K >= 2"):
        build(config, expert, layer_actions, samples=lent(expert, 1))


def test_a_policy_without_layer_exits_is_told_what_to_take_instead() -> None:
    (warning,) = check_sources(NegativesConfig(), B, 1, H, A)
    assert "layer_exits.count 0" in warning and "samples.count 2" in warning
    config = NegativesConfig()
    config.samples.count = 2
    (warning,) = check_sources(config, B, 1, H, A)
    assert "layer_exits.count 0" in warning and "samples.count" not in warning
    config = NegativesConfig()
    config.layer_exits.layers = (1,)
    with pytest.raises(ValueError, match="L=1 has no inner layer"):
        check_sources(config, B, 1, H, A)
    expert, layer_actions = batch(layers=1)
    built = build(NegativesConfig(), expert, layer_actions)
    assert built.empty == ("layer_exits",) and list(built.sources)[1:] == [
        "expert_noise", "policy", "policy_noise", "in_batch",
    ]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.sets(st.sampled_from(SOURCES), min_size=1, max_size=3)
)
def test_what_is_told_at_the_start_is_what_gives_no_column(rows: int, layers: int, horizon: int, on: set[str]) -> None:
    config = only(*on)
    try:
        warnings = check_sources(config, rows, layers, horizon, A, TRAITS)
    except ValueError:
        warnings = None
    expert, layer_actions = batch(rows, layers, horizon)
    built = build(
        config, expert, layer_actions, traits=TRAITS, energy_fn=size, retrieved=lent(expert), samples=lent(expert)
    )
    if warnings is None:
        assert not built.chunks.shape[1] and set(built.empty) == on
    else:
        assert {warning.split()[0] for warning in warnings} == {f"negatives.{name}" for name in built.empty}
