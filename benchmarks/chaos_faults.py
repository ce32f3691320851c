"""Head steps on broken numbers: what each kind of fault meets, and whether the head still learns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from features import Features
from stability_arms import preset
from stability_faults import Injector
from synthetic import wide_features
from training import Batch, Run, evaluate

from vla_energy.config import EnergyConfig
from vla_energy.guard import GuardedOptimizer
from vla_energy.head import EnergyHead
from vla_energy.objective import EnergyObjective

VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "1e38": 1e38, "denormal": 1e-40}
PLACES = ("context", "expert", "layers", "gradient")
SHAPES = ("batch_of_one", "one_token", "duplicate_chunks", "constant_actions")
KINDS = (*(f"{place}:{name}" for place in PLACES for name in (*VALUES, "bf16_overflow")), *SHAPES)
EVERY = 7  # steps between two faults
_WIDTH, _TOKENS = 32, 8
MEASURES = ("spearman", "win_rate/in_batch")
EACH = 5_000  # steps of a training, unless asked otherwise
# Learning is judged by both measures' sum: the Spearman correlation alone moves by a fifth of its gain from run to run.
LEARNS = 100  # steps after which every run looked at had gained more than twice what `GAIN` asks for
GAIN = 0.1  # over the untrained head: two standard deviations between untrained heads
SHARE = 0.5  # of what its twin without faults gained
RANKED_PAIRS, RANKED_STEPS = 3, 2_000  # from here on, losing the skipped steps costs less than `WORSE`
WORSE = 0.01
STRAY_SKIPS = 0.01  # of the steps without a fault
_STUDENT = (4.303, 3.182, 2.776, 2.571, 2.447)  # two-sided 95 %, from 2 degrees of freedom; the last is wide for more


class ChaosInjector(Injector):
    """A fault of every kind in turn, one every `EVERY` steps.

    Args:
        seed: of rows and places.

    Attributes:
        kind: of this step's fault, None without one.
        answers: by kind, how often the guard took the step, or why it did not.
        without_fault: the same of the steps without one.
    """

    kinds = KINDS

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.kind: str | None = None
        self.answers: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
        self.without_fault: dict[str, int] = {}

    def spoil(self, step: int, batch: Batch, head: EnergyHead) -> Batch:
        """The step's batch, with a fault every `EVERY` steps."""
        self.kind = self.poison = None
        if step % EVERY:
            return batch
        self.kind = KINDS[step // EVERY % len(KINDS)]
        self.counts[self.kind] += 1
        context, mask, expert, layers = batch
        place, _, name = self.kind.partition(":")
        if name:
            # The largest fp32 number is above bf16's: a value that is finite until it is cast.
            value = VALUES[name] if name in VALUES else float(torch.tensor(3.4e38).bfloat16())
            if place == "gradient":
                self.poison = value
            elif place == "context":
                context = self._broken(context * mask[..., None], value, first_columns=True)
            elif place == "expert":
                expert = self._broken(expert, value)
            else:
                layers = self._broken(layers, value, layer=True)
            return context, mask, expert, layers
        if self.kind == "batch_of_one":
            return context[:1], mask[:1], expert[:1], layers[:1]
        if self.kind == "one_token":
            return context[:, :1], mask[:, :1], expert, layers
        if self.kind == "duplicate_chunks":  # every row, every layer and the policy: one chunk
            return context, mask, expert[:1].expand_as(expert), expert[:1, None].expand_as(layers)
        return context, mask, torch.full_like(expert, 0.5), torch.full_like(layers, 0.5)

    def answered(self, skipped: str | None) -> None:
        """Counts what the guard said that it did with this step."""
        _add(self.without_fault if self.kind is None else self.answers[self.kind], {skipped or "step": 1})


def small_config() -> EnergyConfig:
    """The recommended head, small enough for many steps; with a reference it would rank these chunks untrained."""
    return preset("recommended", {"head": {"hidden_dim": 32, "reference": False}})


def train(run: Run, features: Features, injector: ChaosInjector | None) -> tuple[EnergyHead, dict[str, Any]]:
    """A training that looks at every parameter after every step, and at the optimiser's state at the end.

    Returns:
        The head, and `bad_steps` after which a parameter or the reported learning rate was not finite, `counters` of
        the guard, `nonfinite_state`, and `seconds`.
    """
    torch.manual_seed(run.seed)
    context, _, expert, _ = features.batch(torch.zeros(1, dtype=torch.long))
    head = EnergyHead(context.shape[2], expert.shape[2], expert.shape[1], run.config)
    objective = EnergyObjective(head, run.config, features.traits)
    guard = GuardedOptimizer.adamw(head.parameter_groups(), run.learning_rate, run.config.guard, run.warm_steps)
    # Of the rows alone: what a fault makes the negatives draw must not change which frames are seen.
    rows, negatives = (torch.Generator().manual_seed(run.seed + offset) for offset in (0, 1))
    parameters, bad_steps, started = list(head.parameters()), 0, time.process_time()
    for step in range(run.steps):
        batch = features.batch(torch.randint(len(features), (run.batch_size,), generator=rows))
        batch = batch if injector is None else injector.spoil(step, batch, head)
        loss, _ = objective(*batch, negatives, step)
        loss.backward()
        if injector is not None:
            injector.after_backward(step, head)
        report = guard.step()
        if injector is not None:
            injector.answered(report.skipped)
        finite = all(bool(parameter.isfinite().all()) for parameter in parameters)
        bad_steps += not (finite and math.isfinite(report.learning_rate))
    state = [value for entry in guard.optimizer.state.values() for value in entry.values()]
    broken = sum(not bool(value.isfinite().all()) for value in state)
    seconds = time.process_time() - started
    facts = {"bad_steps": bad_steps, "counters": guard.counters, "nonfinite_state": broken, "seconds": seconds}
    return head, facts


def measures(head: EnergyHead, features: Features, config: EnergyConfig) -> dict[str, float]:
    """`MEASURES` on held-out frames."""
    energy = evaluate(head, features, config)["energy"]
    return {"spearman": energy["spearman"], "win_rate/in_batch": energy["win_rate"]["in_batch"]}


def faults(steps: int, each: int = EACH, pairs: int = 4, say: Callable[[dict[str, Any]], None] | None = None) -> dict:
    """Trainings of `each` steps with faults, `steps` in all; the first `pairs` beside one without, on the same frames.

    Args:
        say: called with the result so far after each training.

    Returns:
        `steps`, `each`, `bad_steps`, `nonfinite_state`, `injected` and `answers` by kind, `without_fault` (answers to
        other steps), `ranking` (by measure, the values of each arm by seed); `judged`, see `judge`; `ok`.
    """
    torch.set_num_threads(1)
    train_set, held_out = (wide_features(count, seed, _WIDTH, _TOKENS) for count, seed in ((2_000, 0), (400, 1)))
    config, each = small_config(), min(each, steps)
    rows: dict[str, list[dict[str, float]]] = {"untrained": [], "clean": [], "faulty": []}
    result: dict[str, Any] = {"steps": 0, "each": each, "bad_steps": 0, "nonfinite_state": 0, "seconds": 0.0}
    result["counters"] = {}
    without_fault: dict[str, int] = {}
    injected, answers = dict.fromkeys(KINDS, 0), {kind: dict[str, int]() for kind in KINDS}
    for seed in range(-(-steps // each)):
        runs = {arm: Run(arm, config, each, seed, learning_rate=2e-3) for arm in ("clean", "faulty")}
        injector = ChaosInjector(seed)
        faulty, facts = train(runs["faulty"], train_set, injector)
        if seed < pairs:
            untrained, _ = train(replace(runs["clean"], steps=0), train_set, None)
            clean, _ = train(runs["clean"], train_set, None)
            for name, head in (("untrained", untrained), ("clean", clean), ("faulty", faulty)):
                rows[name].append(measures(head, held_out, config))
        for name in ("bad_steps", "nonfinite_state", "seconds"):
            result[name] += facts[name]
        _add(result["counters"], facts["counters"])
        _add(injected, injector.counts)
        for kind in KINDS:
            _add(answers[kind], injector.answers[kind])
        _add(without_fault, injector.without_fault)
        result |= {"steps": (seed + 1) * each, "injected": injected, "answers": answers}
        result["without_fault"] = without_fault
        result["ranking"] = {name: {arm: [row[name] for row in rows[arm]] for arm in rows} for name in MEASURES}
        result["judged"] = judge(result)
        result["ok"] = result["judged"]["ok"]
        if say is not None:
            say(result)
    return result


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """What a result of `faults` says; of old results too, whose trainings were of `EACH` steps.

    Always: every parameter and the optimiser's state stay finite, the guard's counters are what it answered, and at
    most `STRAY_SKIPS` of the steps without a fault are skipped. From `LEARNS` steps a training: each clean run gained
    at least `GAIN` on its untrained head, all measures together, and its twin with faults at least `SHARE` of that.
    From `RANKED_PAIRS` pairs of `RANKED_STEPS`: in no measure is the mean difference of faulty to clean below
    -`WORSE` and beyond its error by Student's t. With fewer pairs, their spread is not known well enough to tell.

    Returns:
        `skips`, see there; `miscounted`, see there; `gains` of the clean runs and `shares` of them that the faulty
        ones gained, by pair; `told`: whether these are judged; `differences`: by measure, the mean `difference` and
        what is `allowed` (None where it is not judged); `against`: in words, what fails; `ok`.
    """
    each = result.get("each", min(EACH, result["steps"]))
    found: dict[str, Any] = {"skips": skips(result), "miscounted": miscounted(result), "told": each >= LEARNS}
    stray = found["skips"]["without_fault"]
    against = {
        "parameters that are not finite": result["bad_steps"],
        "an optimiser's state that is not finite": result["nonfinite_state"],
        "steps miscounted": found["miscounted"],
        "skips without a fault": stray["skipped"] > STRAY_SKIPS * stray["steps"],
    }
    untrained, clean, faulty = (
        torch.tensor([result["ranking"][name][arm] for name in MEASURES]) for arm in ("untrained", "clean", "faulty")
    )
    gains = (clean - untrained).sum(0)
    # Of `GAIN` at least: a share of nothing would be had for nothing.
    shares = (faulty - untrained).sum(0) / gains.clamp(min=GAIN)
    found |= {"gains": gains.tolist(), "shares": shares.tolist(), "differences": {}}
    # Written so that NaN fails too.
    against["hardly learned without faults"] = found["told"] and not bool((gains >= GAIN).all())
    against["hardly learned with faults"] = found["told"] and not bool((shares >= SHARE).all())
    for name, differences in zip(MEASURES, faulty - clean, strict=True):
        difference, allowed = float(differences.mean()), None
        if len(differences) >= RANKED_PAIRS and each >= RANKED_STEPS:
            student = _STUDENT[min(len(differences) - RANKED_PAIRS, len(_STUDENT) - 1)]
            allowed = max(WORSE, student * float(differences.std()) / len(differences) ** 0.5)
            against[f"{name} worse with faults"] = not difference >= -allowed
        found["differences"][name] = {"difference": difference, "allowed": allowed}
    found["against"] = [words for words, wrong in against.items() if wrong]
    return found | {"ok": not found["against"]}


def skips(result: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Of the steps `with_fault` and `without_fault`: how many `steps` there were and how many were `skipped`.

    In old results, which lack the answers to steps without a fault, the guard's other skips are those.
    """
    answers: dict[str, int] = {}
    for part in result["answers"].values():
        _add(answers, part)
    steps = sum(answers.values())
    skipped = steps - answers.get("step", 0)
    if (others := result.get("without_fault")) is not None:
        stray = sum(others.values()) - others.get("step", 0)
    else:
        counters = result["counters"]
        stray = sum(counters.values()) - counters["steps"] - counters["clipped"] - skipped
    return {
        "with_fault": {"steps": steps, "skipped": skipped},
        "without_fault": {"steps": result["steps"] - steps, "skipped": stray},
    }


def miscounted(result: dict[str, Any]) -> int:
    """By how many steps the guard's counters differ from what it answered step by step, and from all steps.

    Of old results too, which lack `without_fault`: no step without a fault was skipped in them.
    """
    seen: dict[str, int] = {}
    for answers in (*result["answers"].values(), result.get("without_fault", {})):
        _add(seen, answers)
    counted = {name: count for name, count in result["counters"].items() if name != "clipped"}
    skips = (seen.keys() | counted.keys()) - {"step", "steps"}
    wrong = sum(abs(seen.get(name, 0) - counted.get(name, 0)) for name in skips)
    return wrong + abs(result["steps"] - sum(counted.values()))


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        total[name] = total.get(name, 0) + count
