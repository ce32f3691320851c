"""What the benchmarks are to reach, where their JSON has it, and `docs/benchmarks.md` from that."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter

GIB = 1024.0
_INK = "#757575"  # 4.6 to 1 against white and against black
_AXES = {"B": "B, contexts of a batch", "N": "N, candidates of a context", "S": "S, tokens of a context"}


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        text: what is measured.
        name: of the benchmark.
        value: from its JSON; a KeyError where that run did not measure it.
        target: to be reached.
        most: the value may be at most the target; else at least.
        unit: of the value, printed behind it.
    """

    text: str
    name: str
    value: Callable[[Any], float]
    target: float
    most: bool = False
    unit: str = "x"

    def met(self, value: float) -> bool:
        """Whether `value` reaches the target."""
        return value <= self.target if self.most else value >= self.target


def _over_naive(batch: str, arm: str) -> Callable[[Any], float]:
    return lambda found: found["batches"][batch]["naive_over"]["cpu"][arm]


def _peak(batch: str) -> Callable[[Any], float]:
    return lambda found: found["mib"][batch]["row blocks"] / GIB


def _apart(ranks: str) -> Callable[[Any], float]:
    return lambda found: max(found["gradients_apart"][ranks].values())


def _spearman_lost(found: Any) -> float:
    """Mean over the seeds, of heads trained in float32 and in bfloat16."""
    means = [
        statistics.mean(row["spearman"] for row in found["rankings"][name])
        for name in ("trained in float32", "trained in bfloat16")
    ]
    return means[0] - means[1]


_HOST = "frames_of_ours_for_each_of_host"
GOALS = (
    Goal("in-batch loss against the naive twin, fp32, B=8", "loss", _over_naive("8", "ours"), 22),
    Goal("in-batch loss against the naive twin, fp32, B=16", "loss", _over_naive("16", "ours"), 55),
    Goal("the same with the context in bf16, B=8", "loss", _over_naive("8", "ours, bf16"), 50),
    Goal("the same with the context in bf16, B=16", "loss", _over_naive("16", "ours, bf16"), 110),
    Goal("Spearman that the context in bf16 costs", "context_dtype", _spearman_lost, 0.005, most=True, unit=""),
    Goal(
        "against the fp32 matmul limit, B=8",
        "loss",
        lambda found: found["batches"]["8"]["ours_over"]["projection"],
        1.5,
        most=True,
    ),
    Goal("peak memory above the inputs, B=8", "peak_memory", _peak("8"), 0.5, most=True, unit=" GiB"),
    Goal("peak memory above the inputs, B=16", "peak_memory", _peak("16"), 0.7, most=True, unit=" GiB"),
    Goal("peak memory above the inputs, B=64", "peak_memory", _peak("64"), 1.2, most=True, unit=" GiB"),
    Goal(
        "64 candidates against 1, context encoded",
        "rerank",
        lambda found: found["wide_many_over_one"]["encoded"],
        1.3,
        most=True,
    ),
    Goal(
        "reranking 64 against 32 decoder layers of 7B",
        "rerank",
        lambda found: 100 * found["rerank_of_backbone"],
        0.5,
        most=True,
        unit=" %",
    ),
    Goal(
        "energy's share of a tiny VLA's step",
        "finetune_step",
        lambda found: 100 * found["energy_adds"],
        10,
        most=True,
        unit=" %",
    ),
    Goal(
        "head training from the cache against online, real width",
        "cache",
        lambda found: found["real_width"]["ratio"]["cpu"],
        50,
    ),
    Goal("head training from the cache against online, tiny VLA", "cache", lambda found: found["ratio"]["cpu"], 50),
    Goal(
        "RLDS frames/s against the host's pipeline (wall; it reads goals, too)",
        "data",
        lambda found: found[_HOST]["wall"],
        2,
    ),
    Goal("RLDS frames per CPU second against the host's pipeline", "data", lambda found: found[_HOST]["cpu"], 2),
    Goal(
        "`import vla_energy` beyond `import torch`",
        "import_time",
        lambda found: found["beyond_torch"]["vla_energy"],
        0.3,
        most=True,
        unit=" s",
    ),
    Goal("gradients of 2 ranks from one process'", "scaling", _apart("2 ranks"), 1e-6, most=True, unit=""),
    Goal("gradients of 4 ranks from one process'", "scaling", _apart("4 ranks"), 1e-6, most=True, unit=""),
)


def read(folder: Path) -> dict[str, Any]:
    """The results there are, by benchmark."""
    names = sorted({goal.name for goal in GOALS} | {"shapes"})
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names if _there(folder, name)}


def _there(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").is_file()


def table(found: dict[str, Any]) -> list[str]:
    """The goals as Markdown; what no run has measured is said to be open."""
    lines = ["| | goal | measured | measured / goal | | command |", "|---|---|---|---|---|---|"]
    for goal in GOALS:
        bound = f"{'<=' if goal.most else '>='} {goal.target:g}{goal.unit}"
        command = f"`benchmarks/{goal.name}.py`"
        try:
            value = goal.value(found[goal.name])
        except KeyError:
            lines.append(f"| {goal.text} | {bound} | | | not measured | {command} |")
            continue
        verdict = "met" if goal.met(value) else "**missed**"
        shown = f"{value:,.0f}{goal.unit}" if value >= 100 else f"{value:.3g}{goal.unit}"
        lines.append(f"| {goal.text} | {bound} | {shown} | {value / goal.target:.2g} | {verdict} | {command} |")
    return lines


def plot(axis: str, curves: dict[str, dict[str, float]], path: Path) -> None:
    """Milliseconds against one axis, both logarithmic, as SVG."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    colours = ("#3b82f6", "#ef7d1a", "#22a06b")
    for colour, (name, points) in zip(colours, curves.items(), strict=False):
        sizes = [int(size) for size in points]
        axes.plot(sizes, [1e3 * value for value in points.values()], "o-", color=colour, label=name, lw=1.6, ms=4)
    axes.set(xscale="log", yscale="log")
    ticks = sorted({int(size) for points in curves.values() for size in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_xlabel(_AXES[axis], color=_INK)
    axes.set_ylabel("CPU ms", color=_INK)
    axes.tick_params(colors=_INK)
    axes.grid(color=_INK, alpha=0.25, lw=0.6)
    axes.legend(frameon=False, labelcolor=_INK)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def machine() -> str:
    """This machine in words."""
    import torch

    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next(
        (line.partition(":")[2].strip() for line in names if line.startswith("model name")), platform.machine()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, no GPU used; Python {platform.python_version()}, "
        f"torch {torch.__version__}; load {os.getloadavg()[0]:.1f} when this page was written"
    )


def write_page(folder: Path, page: Path, *, quick: bool) -> None:
    """The page with table and plots from the results in `folder`."""
    found = read(folder)
    page.parent.mkdir(parents=True, exist_ok=True)
    lines = ["# Benchmarks", ""]
    if quick:
        lines += ["**Of `--quick` runs, with small shapes: they say that the programs run, not how fast.**", ""]
    lines += [
        "Written by `make bench` (`python benchmarks/all.py`) from the JSON in `benchmarks/results/`; `python",
        "benchmarks/all.py --report` writes it again without measuring. Every benchmark runs its arms in turns in one",
        "process, one thread (memory: fresh processes; ranks and readers: as their pages say). Figures are of CPU",
        "time, ratios of medians; on a busy machine a share by wall time is higher (of a step: 13 %, see speed.md).",
        "S=600, D=4096, H=8, A=7, hidden 512. The comparison with the host's reader is of the last run that had",
        "`--host`.",
        "",
        f"Machine: {machine()}.",
        "",
        *table(found),
        "",
        "Why what is missed is missed: [speed.md](speed.md) for the head, [cache.md](cache.md), [data.md](data.md) and",
        "[scaling.md](scaling.md) for the rest.",
        "",
    ]
    if "shapes" in found:
        lines += ["## Cost against B, N and S", "", "`benchmarks/shapes.py`.", ""]
        figures = page.parent / "figures"
        figures.mkdir(exist_ok=True)
        for axis, curves in found["shapes"].items():
            plot(axis, curves, figures / f"bench-{axis}.svg")
            lines += [f"![CPU milliseconds against {axis}](figures/bench-{axis}.svg)", ""]
    page.write_text("\n".join(lines), encoding="utf-8")
