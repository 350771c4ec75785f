"""What `import phoenix.losses` costs beside `import torch`: fresh processes, the median of 15.

    python benchmarks/import_time.py [--output=PATH]

Each process imports torch, then phoenix.losses, and says how long either took and which modules the second
added that are not of the standard library.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from side_by_side import environment  # noqa: E402

from phoenix.files import write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "import_time.json"
REPEATS = 15
SCRIPT = """
import json, sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
before = set(sys.modules)
import phoenix.losses
end = time.perf_counter()
new = {name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names}
print(json.dumps({"torch": middle - start, "losses": end - middle, "modules": sorted(new)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    runs = []
    for _ in range(REPEATS + 1):  # the first fills the page cache
        done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, check=True)
        runs.append(json.loads(done.stdout))
    seconds = {name: statistics.median(run[name] for run in runs[1:]) for name in ("torch", "losses")}
    result = {
        "environment": environment(["torch"]), "repeats": REPEATS, "modules_beside_torch": runs[0]["modules"],
        "torch_seconds": seconds["torch"], "losses_seconds": seconds["losses"],
        "losses_share_of_torch": seconds["losses"] / seconds["torch"],
    }  # fmt: skip
    write_json(output, result)
    print(f"torch {seconds['torch']:.3f} s, phoenix.losses {1000 * seconds['losses']:.1f} ms more; {output}")


if __name__ == "__main__":
    main()
