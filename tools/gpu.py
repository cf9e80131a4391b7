"""All that a GPU at hand for ten minutes can tell: the tests on GPUs, and the quick benchmark; in under eight minutes.

    python tools/gpu.py [--out build/gpu] [--minutes 8] [--device cpu]
    python tools/gpu.py --fetch-pytest

A machine needs torch 2.11 or later and NumPy, and nothing else: no make, no installed bpkit.  Where it has no pytest,
this takes it from build/pytest, or asks pip for it; on a machine that reaches no package index bring that folder along,
made by --fetch-pytest elsewhere (pytest is pure Python).  Whatever fails or is cut off, what was found until then lies
in one folder, and the last five lines say what passed.  ``--device cpu`` takes the same way without a GPU, to try it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ROOT / "build" / "pytest"
#: The share of the time that the tests may take; the benchmark has the rest.
TESTS_SHARE = 0.6


def fetch_pytest() -> bool:
    """Whether pytest is there, installed or in build/pytest; fetched if need be."""
    if importlib.util.find_spec("pytest") or (PYTEST / "pytest").is_dir():
        return True
    install = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    return run([*install, "--target", str(PYTEST), "pytest"], None, 60.0) == 0


def run(command: Sequence[str], log: Path | None, limit: float) -> int:
    """Run a command, shown and kept in `log`; its exit code, or 124 where it took longer than `limit` seconds."""
    path = os.pathsep.join([str(ROOT), str(PYTEST), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict(os.environ, OMP_NUM_THREADS="1", BPKIT_PROGRESS="0", PYTHONPATH=path, PYTHONUNBUFFERED="1")
    with (log or Path(os.devnull)).open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 15)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
            return 124


def machine(out: Path) -> str:
    """Write down what machine this is; one line of it."""
    import numpy
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_name(index) for index in range(count)]
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
             "numpy": numpy.__version__, "gpus": gpus, "cores": os.cpu_count(), "system": platform.platform()}
    (out / "machine.json").write_text(json.dumps(found, indent=1))
    if shutil.which("nvidia-smi"):
        run(["nvidia-smi"], out / "nvidia-smi.txt", 30.0)
    return f"{', '.join(gpus) or 'no GPU'}; Python {found['python']}, torch {found['torch']}, NumPy {found['numpy']}"


def said_of_tests(code: int, junit: Path) -> str:
    """The outcome of the tests in a line."""
    if not junit.exists():
        return f"no result (exit code {code}): see tests.txt"
    count = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(junit).iter("testsuite"):
        count = {key: number + int(suite.get(key, 0)) for key, number in count.items()}
    bad = count["failures"] + count["errors"]
    passed = count["tests"] - bad - count["skipped"]
    return f"{passed} passed, {bad} failed, {count['skipped']} skipped (reasons in tests.txt)"


def said_of_benchmark(code: int, record: Path) -> str:
    """The outcome of the benchmark in a line."""
    if not record.exists():
        return f"no result (exit code {code}): see benchmark.txt"
    found = json.loads(record.read_text(encoding="utf-8"))
    rows = [row for row in found["rows"] if not row["info"]]
    met = sum(row["ratio"] >= row["wanted"] for row in rows)
    return f"{len(found['rows'])} rows; {met} of {len(rows)} ratios as wanted; {len(found['not_run'])} not run"


def verdict(code: int, measured: int, here: str) -> str:
    """The whole in a few words."""
    if code or measured:
        return f"NOT all passed (exit codes {code} and {measured})"
    return "nothing ran on a GPU" if here.startswith("no GPU") else "all passed"


def main(given: Sequence[str]) -> int:
    """Run both; the exit code says whether all passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="the folder for what is found")
    parser.add_argument("--minutes", type=float, default=8.0, help="the time for all of it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only try the way out")
    parser.add_argument("--fetch-pytest", action="store_true", help="only put pytest into build/pytest")
    options = parser.parse_args(given)
    if options.fetch_pytest:
        print(f"pytest is {'there' if fetch_pytest() else 'not to be had: no package index is reached'}")
        return int(not fetch_pytest())
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tests.xml", "benchmark.json"):
        (out / name).unlink(missing_ok=True)
    began, limit = time.monotonic(), 60.0 * options.minutes - 20.0
    here = machine(out)
    print(f"{here}\ntests/gpu ... (at most {limit * TESTS_SHARE:.0f} s)", flush=True)
    code, tests = 1, "not run: there is no pytest, and no package index is reached; bring build/pytest along (--help)"
    if fetch_pytest():
        pytest = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider"]
        code = run([*pytest, f"--junitxml={out / 'tests.xml'}", "tests/gpu"], out / "tests.txt", limit * TESTS_SHARE)
        tests = said_of_tests(code, out / "tests.xml")
    took = time.monotonic() - began
    print(f"benchmarks/gpu.py --quick ... (at most {limit - took:.0f} s)", flush=True)
    command = [sys.executable, "benchmarks/gpu.py", "--quick", "--device", options.device]
    measured = run([*command, "--json", str(out / "benchmark.json")], out / "benchmark.txt", limit - took)
    print(f"""
machine:   {here}
tests:     {tests} ({took:.0f} s)
benchmark: {said_of_benchmark(measured, out / 'benchmark.json')} ({time.monotonic() - began - took:.0f} s)
verdict:   {verdict(code, measured, here)}
files:     {', '.join(sorted(path.name for path in out.iterdir()))} in {out.name}/""")
    return int(code != 0 or measured != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
