"""Run every stage of `make test`, whatever fails, then say what failed.

    python tools/test.py [lint] [unit] [slow] [chapters] [book] [browser]

`unit` is the fast part of the library's tests, `slow` those that are marked so.  Both, and the browser's, run two files
at a time: much of them waits for processes to start, to end or to time out.  Each chapter is executed once, by itself:
nbval compares its outputs, a plugin of ours its widgets.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import find_browser
import notebooks

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "test"
STAGES = ("lint", "unit", "slow", "chapters", "book", "browser")
PYTEST = [sys.executable, "-m", "pytest", "-q"]
#: Seconds after which a stage is ended, so that one that hangs does not hide the others.
LONGEST = 1500


def commands(stage: str) -> list[list[str]]:
    """The commands of one stage; all are run, even when the first fails."""
    junit = f"--junitxml={RESULTS / stage}.xml"
    two = ["-n", "2", "--dist", "loadfile"]
    library = [*PYTEST, junit, *two, "--ignore=tests/book", "--continue-on-collection-errors", "tests", "-m"]
    nbval = [*PYTEST, junit, "-p", "nbval_widgets", "-p", "no:cacheprovider", "--nbval-cell-timeout=300",
             "--nbval-sanitize-with=chapters/sanitize.cfg"]
    return {
        "lint": [[sys.executable, "-m", "ruff", "check", "--quiet", "."], [sys.executable, "-m", "mypy"]],
        "unit": [[*library, "not slow"]],
        "slow": [[*library, "slow"]],
        "chapters": [[*nbval, *chapters()]] if chapters() else [],
        "book": [[sys.executable, "tools/book.py"]],
        "browser": [[*PYTEST, junit, "-n", "2", "tests/book"]],
    }[stage]


def chapters() -> list[str]:
    """The notebooks of the course, in order."""
    return [str(path.relative_to(ROOT)) for path in notebooks.chapters()]


def run_stage(stage: str, environment: dict[str, str]) -> tuple[bool, float]:
    """Run one stage; return whether it passed and the seconds that it took."""
    print(f"\n==== {stage}", flush=True)
    start = time.monotonic()
    passed = all([run(command, environment) for command in commands(stage)])
    return passed, time.monotonic() - start


def run(command: list[str], environment: dict[str, str]) -> bool:
    """Run one command to its end, or to the time limit; return whether it succeeded."""
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=LONGEST).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"ended after {LONGEST} s: {' '.join(command[1:4])}", flush=True)
        return False


def count_tests(stages: list[str]) -> Counter[str]:
    """Passed, failed and skipped over all pytest runs of these stages."""
    total: Counter[str] = Counter()
    for stage in stages:
        path = RESULTS / f"{stage}.xml"
        for suite in ElementTree.parse(path).iter("testsuite") if path.exists() else ():
            number = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
            bad = number["failures"] + number["errors"]
            total += Counter(failed=bad, skipped=number["skipped"],
                             passed=number["tests"] - bad - number["skipped"])
    return total


def prepare(stages: list[str]) -> tuple[dict[str, str], str]:
    """The environment of the stages, and what is missing ("" when nothing is)."""
    # One thread a process: the tests start workers, and results must not depend on the number of cores.
    # Pytest finds its plugin in tools/.
    path = os.pathsep.join(filter(None, [str(ROOT / "tools"), os.environ.get("PYTHONPATH")]))
    environment = dict(os.environ, OMP_NUM_THREADS="1", BPKIT_PROGRESS="0", PYDEVD_DISABLE_FILE_VALIDATION="1",
                       PYTHONPATH=path)  # fmt: skip
    if "browser" not in stages:
        return environment, ""
    if os.environ.get("BPKIT_NO_BROWSER") == "1":
        stages.remove("browser")
        print("BPKIT_NO_BROWSER=1: the browser tests are left out.")
        return environment, ""
    try:
        environment["BPKIT_BROWSER"] = find_browser.find_or_install()
    except RuntimeError as error:
        stages.remove("browser")
        print(f"{error} The other stages run now; the whole fails at the end.", flush=True)
        return environment, str(error)
    return environment, ""


def main(wanted: list[str]) -> int:
    """Run the wanted stages (all by default); return the exit code."""
    if unknown := [stage for stage in wanted if stage not in STAGES]:
        print(f"no such stage: {', '.join(unknown)}; the stages are {', '.join(STAGES)}")
        return 2
    stages = [stage for stage in STAGES if not wanted or stage in wanted]
    RESULTS.mkdir(parents=True, exist_ok=True)
    for old in RESULTS.glob("*.xml"):
        old.unlink()
    environment, missing = prepare(stages)
    outcomes = {stage: run_stage(stage, environment) for stage in stages}
    print("\n==== summary")
    for stage, (passed, seconds) in outcomes.items():
        print(f"{stage:10} {'passed' if passed else 'FAILED'} {seconds:8.1f} s")
    if missing:
        print(f"browser    FAILED: not run. {missing}")
    counts = count_tests(stages)
    failed = [stage for stage, (passed, _) in outcomes.items() if not passed] + (["browser"] if missing else [])
    if failed:
        print(f"failed: {', '.join(failed)}")
    if counts.total():
        print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
