"""The fuzzer guided by coverage: libFuzzer, through atheris, changes one file of a loader's good folder.

`chaos.py fuzz --guided` starts this once for each loader. Needs `pip install atheris` (Linux, Python 3.11 to 3.13).

    python benchmarks/chaos_atheris.py gates --seconds 60 --out runs/chaos/guided/gates
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LARGEST = 1 << 17  # bytes of a file that is changed: larger ones are weights, of which only the header is read
EVERY = 5.0  # seconds between two results written


class Guided:
    """What libFuzzer calls with bytes: the first says which file, the others are its content.

    Args:
        name, target: of `chaos_targets.targets`.
        out: a folder of its own; `seeds`, `work`, `found` and `result.json` come into it.
    """

    def __init__(self, name: str, target: Any, out: Path) -> None:
        self.name, self.target, self.out = name, target, out
        (out / "seeds").mkdir(parents=True)
        target.make(out / "seeds")
        files = sorted(
            path for path in (out / "seeds").rglob("*") if path.is_file() and "tensorboard" not in path.parts
        )
        self.files = [path.relative_to(out / "seeds") for path in files if path.stat().st_size <= LARGEST]
        self.folder = Path(shutil.copytree(out / "seeds", out / "work"))
        target.load(self.folder)  # the good one must pass
        self.row = {"read": 0, "refused": 0, "accepted": 0}
        self.found: dict[tuple[str, str], dict[str, Any]] = {}
        self._started = self._written = time.monotonic()

    def corpus(self, folder: Path) -> None:
        """Writes the good files, as libFuzzer is to have them."""
        folder.mkdir()
        for index, name in enumerate(self.files):
            (folder / str(index)).write_bytes(bytes([index % 256]) + (self.out / "seeds" / name).read_bytes())

    def one(self, data: bytes) -> None:
        """Reads the folder with one file changed; afterwards it is the good one again."""
        from chaos_fuzz import unclear

        changed = self.files[data[0] % len(self.files)] if data else self.files[0]
        (self.folder / changed).write_bytes(data[1:])
        (self.out / "now").write_bytes(data)
        error: BaseException | None = None
        try:
            self.target.load(self.folder)
        except Exception as raised:
            error = raised
        shutil.copyfile(self.out / "seeds" / changed, self.folder / changed)
        self.row["read"] += 1
        self.row["refused" if error is not None else "accepted"] += 1
        names = [str(self.folder), *(path.name for path in self.files)] if self.target.named else []
        if (complaint := unclear(error, self.target.errors, names)) is not None:
            self._keep(complaint, error, str(changed), data)
        if time.monotonic() - self._written > EVERY:
            self.write()

    def _keep(self, complaint: tuple[str, str], error: BaseException | None, changed: str, data: bytes) -> None:
        text, where = complaint
        entry = self.found.setdefault((text.split(":")[0], where), {"target": self.name, "count": 0})
        entry["count"] += 1
        if entry["count"] == 1:
            (self.out / "found").mkdir(exist_ok=True)
            kept = self.out / "found" / f"{len(self.found)}.bin"
            kept.write_bytes(data)
            trace = "" if error is None else "".join(traceback.format_exception(error)[-6:])[-1500:]
            entry |= {"error": text, "where": where, "done": changed, "files": str(kept), "trace": trace}

    def write(self) -> None:
        """Writes what was found so far: libFuzzer ends the process without a word to Python."""
        self._written = time.monotonic()
        result = {"seconds": self._written - self._started, **self.row, "found": list(self.found.values())}
        (self.out / "result.json.new").write_text(json.dumps(result))
        os.replace(self.out / "result.json.new", self.out / "result.json")


def guided(
    minutes: float, seed: int, out: Path, names: Sequence[str], say: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Each loader in a process of its own, for an equal part of `minutes`; a result like `chaos_fuzz.fuzz`'s.

    Raises:
        UsageError: atheris is not installed, or one of `names` is not known.
    """
    import subprocess

    from chaos_fuzz import UsageError, known_names

    if importlib.util.find_spec("atheris") is None:
        raise UsageError("--guided needs atheris: pip install -e '.[fuzz]' (Linux, Python 3.11 to 3.13)")
    wanted = known_names(names)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    result: dict[str, Any] = {"seconds": 0.0, "read": 0, "targets": {}, "found": [], "guided": True}
    for name in wanted:
        command = [sys.executable, __file__, name, "--seconds", str(60 * minutes / len(wanted)), "--seed", str(seed)]
        with (out / f"{name}.log").open("wb") as log:
            code = subprocess.run([*command, "--out", str(out / name)], stdout=log, stderr=log).returncode
        path = out / name / "result.json"
        row = json.loads(path.read_text()) if path.is_file() else {"seconds": 0.0, "read": 0, "found": []}
        result["found"] += row.pop("found")
        if code:
            text = (out / f"{name}.log").read_text(errors="replace")[-1500:]
            died = {"target": name, "count": 1, "error": f"the process died: {code}", "where": "", "trace": text}
            result["found"].append({**died, "done": "", "files": str(out / name / "now")})
        result["targets"][name] = row
        result["seconds"] += row["seconds"]
        result["read"] += row["read"]
        if say is not None:
            say(result | {"ok": not result["found"]})
    return result | {"ok": not result["found"]}


def main() -> None:
    """One loader; ends the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import atheris  # pyright: ignore[reportMissingImports]

    with atheris.instrument_imports(include=["vla_energy"]):
        from chaos_targets import targets
    import logging

    logging.disable(logging.CRITICAL)
    shutil.rmtree(args.out, ignore_errors=True)
    work = Guided(args.target, targets(args.out.with_suffix(".scratch"))[args.target], args.out)
    work.corpus(args.out / "corpus")
    limits = ["-timeout=30", "-rss_limit_mb=4096", f"-max_len={LARGEST + 1}", f"-max_total_time={round(args.seconds)}"]
    keep = [f"-artifact_prefix={args.out}/", f"-seed={args.seed + 1}", str(args.out / "corpus")]
    atheris.Setup([sys.argv[0], *limits, *keep], work.one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
