"""Run the benchmarks one after the other; keep their results in build/bench.

    python tools/bench.py [NAME ...]     (all of benchmarks/*.py, when none is named; _private.py is left out)
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "bench"


def main(names: list[str]) -> int:
    """Run the named benchmarks; return the exit code."""
    found = {path.stem: path for path in sorted((ROOT / "benchmarks").glob("*.py")) if path.stem[0] != "_"}
    if unknown := [name for name in names if name not in found]:
        print(f"no such benchmark: {', '.join(unknown)}; there are: {', '.join(found)}")
        return 2
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names or found:
        print(f"\n==== {name}", flush=True)
        start = time.monotonic()
        file = RESULTS / f"{name}.json"
        file.unlink(missing_ok=True)
        if subprocess.run([sys.executable, str(found[name]), "--json", str(file)], cwd=ROOT).returncode:
            failed.append(name)
        made = f"build/bench/{name}.json" if file.exists() else "nothing recorded"  # such as without a GPU
        print(f"{name}: {time.monotonic() - start:.0f} s, {made}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
