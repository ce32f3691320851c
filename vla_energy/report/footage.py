"""Frames of one episode with the energy of the executed chunk below them: a slider, a few lines of inline script."""

from __future__ import annotations

import html
import json
from typing import Any

from vla_energy.report.curves import COLOURS
from vla_energy.report.runs import Run
from vla_energy.results import finite

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 360, 174, 60, 54
_KEYS = {
    "": ("arm", "decisions", "instruction", "seed", "steps", "success", "task"),
    "decisions": ("accepted", "energy", "energy_policy", "image", "step"),
}

_SCRIPT = """<script>(() => { const box = document.getElementById('BOX'), all = DATA;
const image = box.querySelector('img'), text = box.querySelector('output'), line = box.querySelector('.now');
const show = i => { image.src = all[i][0]; text.textContent = all[i][1];
line.setAttribute('x1', all[i][2]); line.setAttribute('x2', all[i][2]); };
box.querySelector('input').addEventListener('input', event => show(+event.target.value)); })();</script>"""


def footage_figure(run: Run, number: int, several: bool = False) -> str:
    """The footage of a run as a section; empty text without one, see `lack`. Without script its first frame shows.

    Args:
        run: see `Run.footage`.
        number: different for each one on the page.
        several: whether the title names the run.
    """
    if run.footage is None or lack(run.footage):
        return ""
    decisions = run.footage["decisions"]
    shown = [decision for decision in decisions if decision["image"]]
    shot, box = run.footage, f"footage-{number}"
    plot, at = _plot(decisions, box)
    data = [
        (f"data:image/jpeg;base64,{decision['image']}", _text(decision), at[decision["step"]]) for decision in shown
    ]
    title = f"An episode and its energy{f', {run.label}' if several else ''}"
    about = (
        f"{shot['instruction'] or shot['task']}: arm {shot['arm']}, seed {shot['seed']}, "
        f"{'solved' if shot['success'] else 'not solved'} after {shot['steps']} steps. "
        f"{len(shown)} of {len(decisions)} decisions have a frame."
    )
    script = _SCRIPT.replace("BOX", box).replace("DATA", json.dumps(data).replace("</", "<\\/"))
    return (
        f"<h2>{html.escape(title)}</h2><p>{html.escape(about)}</p><figure class='footage' id='{box}'>"
        f"<img src='{data[0][0]}' alt='what the camera sees'>"
        f"<input type='range' min='0' max='{len(data) - 1}' value='0' step='1' aria-label='decision of the episode'>"
        f"<output>{html.escape(data[0][1])}</output>{plot}</figure>{script}"
    )


def lack(footage: dict[str, Any] | None) -> str:
    """Why the content of a file of footage cannot be shown; empty text where it can."""
    if footage is None:
        return ""
    if absent := [key for key in _KEYS[""] if key not in footage]:
        return f"it has no {', '.join(absent)}"
    decisions = footage["decisions"]
    if not isinstance(decisions, list) or not decisions:
        return "it has no decisions"
    for number, decision in enumerate(decisions):
        held = decision if isinstance(decision, dict) else {}
        if absent := [key for key in _KEYS["decisions"] if key not in held]:
            return f"its decision {number} has no {', '.join(absent)}"
        if not finite(held["step"]):
            return f"the step of its decision {number} is no number"
    return "" if any(decision["image"] for decision in decisions) else "none of its decisions has a frame"


def _text(decision: dict[str, Any]) -> str:
    energy, own = (
        f"{decision[key]:.3f}" if finite(decision.get(key)) else "n/a" for key in ("energy", "energy_policy")
    )
    which = "another chunk than the policy's" if decision["accepted"] else "the policy's own chunk"
    return f"step {decision['step']}: energy {energy} of what is executed ({which}); the policy's own {own}"


def _plot(decisions: list[dict[str, Any]], box: str) -> tuple[str, dict[int, float]]:
    """Energies over the steps as SVG, drawn here so that the slider's line knows the place of each step."""
    steps = [decision["step"] for decision in decisions]
    keys = {"energy": "executed", "energy_policy": "the policy's own"}
    values = [d[key] for d in decisions for key in keys if finite(d.get(key))]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    high = high if high > low else low + 1.0
    last = max(steps[-1], 1)
    at = {step: round(_LEFT + (_WIDTH - _LEFT - 8) * step / last, 1) for step in steps}
    height = lambda value: round(8 + (_HEIGHT - _BOTTOM - 8) * (high - value) / (high - low), 1)  # noqa: E731
    lines, legend = [], []
    for index, (key, name) in enumerate(keys.items()):
        points = " ".join(f"{at[d['step']]},{height(d[key])}" for d in decisions if finite(d.get(key)))
        dash = " stroke-dasharray='4 3'" if index else ""
        colour = COLOURS[index]
        lines.append(f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='1.6'{dash}/>")
        x, y = _LEFT + 150 * index, _HEIGHT - 18
        legend.append(
            f"<line x1='{x}' x2='{x + 18}' y1='{y - 3}' y2='{y - 3}' stroke='{colour}' stroke-width='1.6'{dash}/>"
            f"<text x='{x + 22}' y='{y}'>{name}</text>"
        )
    marks = "".join(
        f"<circle cx='{at[d['step']]}' cy='{height(d['energy'])}' r='2.6' fill='{COLOURS[3]}'/>"
        for d in decisions
        if d["accepted"] and finite(d.get("energy"))
    )
    if marks:
        legend.append(
            f"<circle cx='{_LEFT + 9}' cy='{_HEIGHT - 7}' r='2.6' fill='{COLOURS[3]}'/>"
            f"<text x='{_LEFT + 22}' y='{_HEIGHT - 4}'>another chunk than the policy's is executed</text>"
        )
    first, middle = at[steps[0]], (_HEIGHT - _BOTTOM + 8) / 2
    return (
        f"<svg role='img' aria-label='energy over the episode, {box}' viewBox='0 0 {_WIDTH} {_HEIGHT}' "
        f"font-size='10' font-family='system-ui, sans-serif' style='fill: var(--soft)'>"
        f"<text x='{_LEFT - 4}' y='14' text-anchor='end'>{high:.3g}</text>"
        f"<text x='{_LEFT - 4}' y='{_HEIGHT - _BOTTOM}' text-anchor='end'>{low:.3g}</text>"
        f"<text transform='rotate(-90)' x='{-middle}' y='10' text-anchor='middle'>energy, lower is better</text>"
        f"<text x='{_LEFT}' y='{_HEIGHT - _BOTTOM + 14}'>0</text>"
        f"<text x='{(_LEFT + _WIDTH - 8) / 2}' y='{_HEIGHT - _BOTTOM + 14}' text-anchor='middle'>"
        "step of the episode</text>"
        f"<text x='{_WIDTH - 8}' y='{_HEIGHT - _BOTTOM + 14}' text-anchor='end'>{last}</text>"
        f"{''.join(lines)}{marks}{''.join(legend)}"
        f"<line class='now' x1='{first}' x2='{first}' y1='4' y2='{_HEIGHT - _BOTTOM}' style='stroke: var(--soft)'/>"
        "</svg>",
        at,
    )
