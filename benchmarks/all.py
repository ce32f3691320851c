"""Runs the benchmarks one after another, each in its own process, and writes `docs/benchmarks.md` from their JSON.

    python benchmarks/all.py                    # make bench: results in benchmarks/results/, page in docs/
    python benchmarks/all.py --quick            # make bench QUICK=1: small shapes; results and page in runs/bench/
    python benchmarks/all.py --report           # the page again, nothing is measured
    python benchmarks/all.py --only cache,data --host openvla-oft --dlimp dlimp_openvla --data_root_dir DATA \
        --dataset_name libero_spatial_no_noops

A benchmark that fails is named at the end, with exit code 1; the others run all the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from goals import write_page

FOLDER = Path(__file__).parent
BENCHMARKS = (
    "loss", "context_dtype", "peak_memory", "rerank", "finetune_step", "import_time", "cache", "data", "scaling",
    "shapes",
)  # fmt: skip
"""Files in this folder, each with `--quick` and `--out`, in the order in which they run."""


def run(name: str, args: argparse.Namespace, results: Path) -> bool:
    """Whether a benchmark ended well."""
    print(f"== {name}", flush=True)
    # Without the host there is nothing to compare with: the stored comparison stays.
    file = "data_alone" if name == "data" and args.host is None else name
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--out", str(results / f"{file}.json")]
    command += ["--quick"] if args.quick else []
    if name == "data" and args.host is not None:
        command += [f"--{flag}={getattr(args, flag)}" for flag in ("host", "data_root_dir", "dataset_name")]
        command += [] if args.dlimp is None else [f"--dlimp={args.dlimp}"]
    started = time.monotonic()
    code = subprocess.run(command).returncode
    print(
        f"== {name}: {'done' if code == 0 else f'exit code {code}'} in {time.monotonic() - started:.0f} s", flush=True
    )
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each benchmark's --quick")
    parser.add_argument("--report", action="store_true", help="write the page from the results there are")
    parser.add_argument("--only", help=f"some of them, by comma: {','.join(BENCHMARKS)}")
    parser.add_argument("--host", type=Path, help="checkout of openvla-oft, for data.py; with the next three")
    parser.add_argument("--dlimp", type=Path)
    parser.add_argument("--data_root_dir", type=Path)
    parser.add_argument("--dataset_name", default="libero_spatial_no_noops")
    args = parser.parse_args()
    names = BENCHMARKS if args.only is None else tuple(args.only.split(","))
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"--only {','.join(unknown)}: known are {', '.join(BENCHMARKS)}")
    if args.host is not None and args.data_root_dir is None:
        parser.error("--host needs --data_root_dir, with a dataset that the host knows")
    if absent := [name for name in names if not (FOLDER / f"{name}.py").is_file()]:
        print(f"left out, as this version has no such file: {', '.join(absent)}")
        names = tuple(name for name in names if name not in absent)
    results = Path("runs/bench") if args.quick else FOLDER / "results"
    page = results / "benchmarks.md" if args.quick else FOLDER.parent / "docs" / "benchmarks.md"
    results.mkdir(parents=True, exist_ok=True)
    failed = [] if args.report else [name for name in names if not run(name, args, results)]
    write_page(results, page, quick=args.quick)
    print(f"written: {page}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
