"""Damaged and hostile files before every loader: only clear errors of our own may come out, and no code may run."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOM = 3 << 30  # bytes that loading may take beyond what the process has
GREEDY = 200 << 10  # KiB that reading a small file may take at its highest
PATIENCE = 30  # seconds
_PLAIN = (ValueError, OSError)
_HERE = (str(Path(__file__).parents[1] / "vla_energy"), str(Path(__file__).parent))


class UsageError(ValueError):
    """What was asked for is not there."""


class Hangs(BaseException):
    """A loader takes too long."""


def fuzz(
    minutes: float,
    seed: int,
    out: Path,
    names: Sequence[str] = (),
    say: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Feeds the loaders for `minutes`, each for the same time; in a child, so that a crash is a finding too.

    Args:
        seed: of the damage.
        out: a folder of its own, deleted first; files that were found stay in its `found`.
        names: of `chaos_targets.targets`; none is all.

    Returns:
        By target how many files were `read`, `refused` and `accepted`; `found`, one entry a kind of unclear error:
        target, error, where it was raised, what was done to which file, and where the files are; `seconds`; `ok`.
    """
    if names:
        known_names(names)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            _silence(out / "child.log")
            _child(minutes * 60, seed, out, names)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    path, status = out / "result.json", 0
    while not os.waitpid(pid, os.WNOHANG)[0]:
        time.sleep(1)
        if say is not None and path.is_file():
            say(json.loads(path.read_text()))
    del status
    result = json.loads(path.read_text()) if path.is_file() else {}
    result = {"seconds": 0.0, "read": 0, "targets": {}, "found": []} | result
    if not result.get("complete"):
        log = (out / "child.log").read_text()[-2000:]
        now = (out / "now").read_text() if (out / "now").is_file() else "the start"
        died = {"target": now, "count": 1, "error": "the process died", "where": "", "trace": log}
        result["found"].append({**died, "files": str(out / "work")})
    return result | {"ok": not result["found"]}


def known_names(names: Sequence[str] = ()) -> list[str]:
    """Of all loaders, or `names` where they are known.

    Raises:
        UsageError: one of `names` is not known.
    """
    from chaos_targets import targets

    known = list(targets(Path()))
    if unknown := sorted(set(names) - set(known)):
        raise UsageError(f"--targets: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return list(dict.fromkeys(names)) or known


def _silence(log: Path) -> None:
    """TensorFlow, torch and tfds say a lot about damaged files."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    logging.disable(logging.CRITICAL)


def _child(seconds: float, seed: int, out: Path, names: Sequence[str]) -> None:
    from chaos_targets import targets

    known = targets(out / "scratch")
    wanted = {name: target for name, target in known.items() if not names or name in names}
    signal.signal(signal.SIGALRM, _hangs)
    for name, target in wanted.items():
        (out / "seeds" / name).mkdir(parents=True)
        target.make(out / "seeds" / name)
        target.load(_copy(out, name))  # the good one must pass
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    rows: dict[str, dict[str, Any]] = {
        name: {"read": 0, "refused": 0, "accepted": 0, "seconds": 0.0} for name in wanted
    }
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    started = written = time.monotonic()
    index = 0
    while time.monotonic() - started < seconds or any(row["read"] < 3 for row in rows.values()):
        name = min(rows, key=lambda name: rows[name]["seconds"])
        _one(name, wanted[name], f"{seed}-{index}", out, rows[name], found)
        index += 1
        if time.monotonic() - written > 10:
            written = time.monotonic()
            _write(out, rows, found, written - started, complete=False)
    _write(out, rows, found, time.monotonic() - started, complete=True)


def _write(out: Path, rows: dict, found: dict, seconds: float, complete: bool) -> None:
    reads = sum(row["read"] for row in rows.values())
    result = {"seconds": seconds, "read": reads, "targets": rows, "found": list(found.values())}
    result |= {"ok": not found, "complete": complete}
    (out / "result.json.new").write_text(json.dumps(result))
    os.replace(out / "result.json.new", out / "result.json")


def _copy(out: Path, name: str) -> Path:
    shutil.rmtree(out / "work", ignore_errors=True)
    return Path(shutil.copytree(out / "seeds" / name, out / "work"))


def _one(name: str, target: Any, key: str, out: Path, row: dict[str, Any], found: dict[Any, Any]) -> None:
    """One damaged folder read; what comes out is counted, and kept where it is unclear."""
    from chaos_mutate import damage_file

    names = [str(out / "work"), *(path.name for path in (out / "seeds" / name).rglob("*"))] if target.named else []
    draw, marker, began = random.Random(f"{name}-{key}"), out / "code-was-run", time.monotonic()
    folder = _copy(out, name)
    (out / "now").write_text(f"{name} {key}")
    if target.hostile is not None and draw.random() < 0.4:
        done = target.hostile(folder, draw)
    else:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        # Of what is written beside a checkpoint nothing is read.
        chosen = draw.choice([path for path in files if "tensorboard" not in path.parts])
        everywhere = [path for path in (out / "seeds").rglob("*") if path.is_file() and path.stat().st_size < 10**6]
        done = damage_file(chosen, everywhere, draw, marker)
    error: BaseException | None = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(PATIENCE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.load(folder)
    except (Exception, Hangs) as raised:
        error = raised
    finally:
        signal.alarm(0)
    row["read"] += 1
    row["refused" if error is not None else "accepted"] += 1
    row["seconds"] += time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    complaint = unclear(error, target.errors, names)
    if marker.exists():
        complaint = "code in the file was run", ""
    elif peak > GREEDY and row["read"] > 5:  # the first ones fill caches
        complaint = f"{peak >> 10} MiB of memory", done.split(":")[0]
    marker.unlink(missing_ok=True)
    if complaint is not None:
        kind = complaint[0].split(":")[0] if error is not None else "memory"
        entry = found.setdefault((name, kind, complaint[1]), {"target": name, "count": 0})
        entry["count"] += 1
        if entry["count"] == 1:
            kept = out / "found" / f"{name}-{key}"
            shutil.copytree(folder, kept, symlinks=True)
            shown = [] if error is None else traceback.format_exception(error)[-6:]
            entry |= {
                "error": complaint[0],
                "where": complaint[1],
                "done": done,
                "files": str(kept),
                "trace": "".join(shown)[-1500:],
            }


def unclear(
    error: BaseException | None, errors: tuple[type[BaseException], ...], names: Sequence[str] = ()
) -> tuple[str, str] | None:
    """Why an exception is not one of ours, or says too little, and where it was raised; None where all is well.

    Args:
        errors: that may be raised.
        names: of the files; the message has to have one of them. Empty where it need not.
    """
    if error is None:
        return None
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(_HERE)]
    where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "nowhere of ours"
    text = f"{type(error).__name__}: {str(error)[:300]}"
    ours = type(error).__module__.startswith(("vla_energy", "draccus"))
    plain = isinstance(error, _PLAIN) and bool(own) and (frames[-1] is own[-1] or isinstance(error, OSError))
    if not isinstance(error, errors) or not (ours or plain):
        return text, where
    if names and not any(name in str(error) for name in names):
        return f"names no file: {text}", where
    return None


def _hangs(*_: object) -> None:
    raise Hangs(f"not read after {PATIENCE} s")
