"""A page looked at in headless Chromium: every plot drawn, text readable, nothing too wide, in both schemes.

The page is put into frames as wide as a phone and a desktop (a window of Chromium cannot be as narrow as a phone), in a
page whose script measures them and leaves its verdict in the document, which `--dump-dom` prints.

    python tests/browser.py runs/demo/report.html                        # prints the verdict
    python tests/browser.py runs/demo/report.html --shot phone.png --width 390 --height 2400 --scheme dark
"""

from __future__ import annotations

import argparse
import html
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WIDTHS = (390, 1280)
SCHEMES = {"light": 1, "dark": 0}
NAMES = ("chromium", "chromium-browser", "google-chrome")
HELP = "no Chromium: `make browser` installs it (Debian's package chromium)"

_SCRIPT = """
const box = (el) => el.getBoundingClientRect();
function measure(frame) {
  const doc = frame.contentDocument, root = doc.documentElement, width = root.clientWidth, wrong = [];
  if (root.scrollWidth > width) wrong.push(`the page is ${root.scrollWidth} wide in a window of ${width}`);
  for (const el of doc.body.querySelectorAll('*')) {
    if (el.closest('.scroll, pre, svg, details:not([open])')) continue;
    if (box(el).right > width + 1) wrong.push(`${el.tagName} ${el.className} ends at ${Math.round(box(el).right)}`);
  }
  const svgs = [...doc.querySelectorAll('figure svg')];
  if (svgs.length !== doc.querySelectorAll('figure').length) wrong.push('a figure has no plot');
  for (const svg of svgs) {
    const name = svg.getAttribute('aria-label'), outer = box(svg);
    if (outer.width < 100 || outer.height < 50) wrong.push(`${name} is ${outer.width} x ${outer.height}`);
    const marks = [...svg.querySelectorAll('path, polyline, line, use, circle')].filter(
      (el) => !el.closest('defs') && (box(el).width > 0 || box(el).height > 0));
    if (marks.length < 3) wrong.push(`${name} has ${marks.length} marks`);
    for (const text of svg.querySelectorAll('text'))
      if (box(text).left < outer.left - 1 || box(text).right > outer.right + 1)
        wrong.push(`${name}: "${text.textContent}" is cut off`);
  }
  for (const figure of doc.querySelectorAll('.footage')) {
    const image = figure.querySelector('img'), slider = figure.querySelector('input');
    const before = [image.src, figure.querySelector('output').textContent, box(figure.querySelector('.now')).left];
    if (!(image.complete && image.naturalWidth > 0)) wrong.push('the first frame is not shown');
    slider.value = slider.max;
    slider.dispatchEvent(new frame.contentWindow.Event('input'));
    const after = [image.src, figure.querySelector('output').textContent, box(figure.querySelector('.now')).left];
    before.forEach((value, n) => { if (value === after[n]) wrong.push(`the slider moves not: ${value}`); });
  }
  const rgb = (colour) => (colour.match(/[0-9.]+/g) || []).map(Number);
  const light = (colour) => rgb(colour).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const ground = (el) => {
    for (; el; el = el.parentElement) {
      const parts = rgb(frame.contentWindow.getComputedStyle(el).backgroundColor);
      if (parts.length && parts[3] !== 0) return frame.contentWindow.getComputedStyle(el).backgroundColor;
    }
    return 'rgb(255, 255, 255)';
  };
  const contrasts = {text: Infinity, plots: Infinity};
  for (const el of doc.body.querySelectorAll('*')) {
    if (el.closest('svg') ? !el.closest('text') : ['SCRIPT', 'STYLE'].includes(el.tagName)) continue;
    if (![...el.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) continue;
    const style = frame.contentWindow.getComputedStyle(el), inside = el.closest('svg') !== null;
    const ink = inside ? style.fill : style.color, two = [light(ink), light(ground(el))];
    const found = rgb(ink).length < 3 ? 0 : (Math.max(...two) + 0.05) / (Math.min(...two) + 0.05);
    const kind = inside ? 'plots' : 'text';
    contrasts[kind] = Math.min(contrasts[kind], found);
    if (!(found >= 4.5))
      wrong.push(`${el.tagName} "${el.textContent.trim().slice(0, 30)}" has a contrast of ${found.toFixed(1)}`);
  }
  const style = frame.contentWindow.getComputedStyle(doc.body);
  return {asked: +frame.width, width, plots: svgs.length, wrong, contrasts,
    ground: style.backgroundColor, ink: style.color};
}
addEventListener('load', () => setTimeout(() => {
  const found = [...document.querySelectorAll('iframe')].map(measure);
  document.body.textContent = 'VERDICT' + JSON.stringify(found) + 'END';
}, 500));
"""


def find() -> str | None:
    """Chromium's path, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def look(page: str, scheme: str, widths: tuple[int, ...] = WIDTHS) -> list[dict[str, Any]]:
    """What a page looks like, a width at a time: `width`, `plots` (number), `ground` and `ink` as CSS colours, `wrong`.

    `contrasts` are the lowest of `text` and of `plots` (text in a plot against the ground of its figure), by WCAG 2.1;
    below 4.5, its level AA, the text is in `wrong`.

    Raises:
        RuntimeError: no Chromium, or it gave no verdict.
    """
    found = _chromium(_wrap(page, widths, _SCRIPT), scheme, ["--virtual-time-budget=20000", "--dump-dom"])
    _, mark, verdict = found.rpartition("VERDICT[")  # the script itself is in the document, too
    if not mark:
        raise RuntimeError(f"Chromium gave no verdict: {found[-2000:]}")
    return json.loads("[" + html.unescape(verdict.split("END")[0]))


def shoot(page: str, scheme: str, width: int, top: int, height: int, out: Path) -> None:
    """A picture of the page's `height` pixels from `top` on."""
    from PIL import Image

    size = f"{max(width, 500)},{top + height}"
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.png"
        flags = [f"--window-size={size}", f"--screenshot={raw}", "--virtual-time-budget=20000"]
        _chromium(_wrap(page, (width,), "", top + height), scheme, flags)
        picture = Image.open(raw).convert("RGB").crop((0, top, width, top + height))
        picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(out, optimize=True)


def _wrap(page: str, widths: tuple[int, ...], script: str, height: int = 900) -> str:
    text = html.escape(page, quote=True)
    frames = "".join(
        f"<iframe width='{width}' height='{height}' style='border:0;display:block' srcdoc=\"{text}\"></iframe>"
        for width in widths
    )
    style = ":root { color-scheme: light dark; } body { margin: 0; }"
    head = f"<meta charset='utf-8'><style>{style}</style><script>{script}</script>"
    return f"<!doctype html><html><head>{head}</head><body>{frames}</body></html>"


def _chromium(wrapper: str, scheme: str, flags: list[str]) -> str:
    path = find()
    if path is None:
        raise RuntimeError(HELP)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "page.html"
        file.write_text(wrapper, encoding="utf-8")
        command = [path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--hide-scrollbars"]  # a phone's take no room
        # Nothing may be loaded: a page that needs the network must look broken here.
        command += [f"--user-data-dir={folder}/profile", "--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run"]
        command += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", *flags, file.as_uri()]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, "LANG": "C.UTF-8"}
        )
    if done.returncode:
        raise RuntimeError(f"Chromium ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def main() -> int:
    """Prints the verdict, or takes a picture; returns 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--shot", type=Path, metavar="PNG")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--top", type=int, default=0)
    parser.add_argument("--height", type=int, default=2000)
    parser.add_argument("--scheme", choices=SCHEMES, default="light")
    args = parser.parse_args()
    page = args.page.read_text(encoding="utf-8")
    if args.shot:
        shoot(page, args.scheme, args.width, args.top, args.height, args.shot)
        return 0
    found = {scheme: look(page, scheme) for scheme in SCHEMES}
    print(json.dumps(found, indent=1))
    return int(any(view["wrong"] for views in found.values() for view in views))


if __name__ == "__main__":
    sys.exit(main())
