"""Seconds that importing our package takes beyond `import torch`, each import in fresh processes, in turns.

    python benchmarks/import_time.py [--quick] [--out runs/bench/import_time.json]

`import vla_energy` loads names on first use, so the names themselves are asked for as well. CPU time of the import
alone, medians; a first round, which fills the file cache, is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

IMPORTS = {
    "torch": "import torch",
    "vla_energy": "import torch, vla_energy",
    "EnergyHead": "import torch\nfrom vla_energy import EnergyHead",
    "all names": "import torch\nfrom vla_energy import EnergyConfig, EnergyHead, Reranker, losses",
    "training objective": "import torch\nfrom vla_energy.objective import EnergyObjective",
}
CHILD = "import time\nstart = time.process_time()\n{}\nprint(time.process_time() - start)"


def seconds(statement: str) -> float:
    """CPU seconds of `statement` in a fresh interpreter."""
    command = [sys.executable, "-c", CHILD.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 15")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/import_time.json"))
    args = parser.parse_args()
    rounds = 5 if args.quick else 15
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for index in range(rounds + 1):
        for name, statement in IMPORTS.items():
            value = seconds(statement)
            if index:
                taken[name].append(value)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    beyond = {name: value - medians["torch"] for name, value in medians.items() if name != "torch"}
    print("| import | CPU s | beyond torch, s |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.3f} | {value - medians['torch']:.3f} |")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"cpu_seconds": medians, "beyond_torch": beyond, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
