"""Every command that README, how-to and GPU page tell a reader to type is run here, or it is said what runs it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "book/howto.md", "book/gpu.md")
#: What a command begins with; other code in the text is a name, a setting or a file.
PROGRAMS = ("make", "python", ".venv/bin/", "pip", "conda", "torchrun", "git", "cd", "docker", "ssh", "mpirun", "nproc")
#: `make` on the environment that runs the tests, which counts as made.
MAKE = ["make", f"VENV={sys.prefix}", "-o", "pyproject.toml", "-o", "constraints.txt"]


def typed(page: str) -> Iterator[str]:
    """The commands of a page: the lines of its shell blocks, and code in the text that begins with a program."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        yield from (line.split("#")[0].strip() for line in block.splitlines() if line.strip())
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if (code.split()[0] in PROGRAMS and (" " in code or code == "nproc")) or code.startswith(".venv/bin/"):
            yield code


def run(*command: str, limit: float = 120.0, **environment: str) -> str:
    """Run a command from the repository's root; what it printed, once it has succeeded."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, text=True, timeout=limit,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def made(*target: str) -> str:
    """What a target of the Makefile would run."""
    return run(*MAKE, "-n", *target)


def python(*arguments: str) -> Callable[[], str]:
    return lambda: run(sys.executable, *arguments)


def other_python() -> str:
    """Another interpreter gets an environment of its own."""
    said = run("make", "-n", "test", "PYTHON=/path/to/python3.12")
    assert "tools/setup.sh .venv-python3.12 course,book,test" in said
    assert ".venv-python3.12/bin/python tools/test.py" in said
    return said


WHAT_TORCH_SEES = "import torch; print(torch.__version__, torch.cuda.is_available(), torch.cuda.device_count())"
#: The command, and what runs it here.
HERE: dict[str, Callable[[], str]] = {
    "make help": lambda: run("make", "help"),
    "make book": lambda: made("book"), "make test": lambda: made("test"), "make execute": lambda: made("execute"),
    "make bench": lambda: run(*MAKE, "-n", "-o", f"{sys.prefix}/.bpkit-bench", "bench"),
    "make setup": lambda: made("setup"), "make freeze": lambda: made("freeze"),
    "make test T=unit": lambda: made("test", "T=unit"), 'make test T="lint unit"': lambda: made("test", "T=lint unit"),
    "make test PYTHON=python3.13": other_python, "make lab PYTHON=/path/to/python3.12": other_python,
    "make execute NOTEBOOKS=chapters/NN_slug.ipynb": lambda: made("execute", "NOTEBOOKS=book/index.ipynb"),
    f'.venv/bin/python -c "{WHAT_TORCH_SEES}"': python("-c", WHAT_TORCH_SEES),
    ".venv/bin/python -m pytest tests/gpu": python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"),
    ".venv/bin/pre-commit install": lambda: run(sys.executable, "-m", "pre_commit", "install", "--help"),
    "python tools/record.py --out book/measurements/NAME.json": python("tools/record.py", "--help"),
    "nproc": lambda: run("nproc"),
}
#: Those that a test elsewhere runs.
ELSEWHERE = {
    "make lab": "tests/test_tools.py::test_lab_answers_with_its_token_and_not_without",
    "python tools/lab.py": "tests/test_tools.py::test_lab_answers_with_its_token_and_not_without",
    "python tools/gpu.py": "tests/test_commands.py::test_the_command_for_gpus",
    "python tools/gpu.py --fetch-pytest": "tests/test_commands.py::test_the_command_for_gpus",
    ".venv/bin/python benchmarks/gpu.py": "tests/test_gpu_benchmark.py::record",
    "torchrun --standalone --nproc-per-node 2 train.py":
        "tests/test_gpu_benchmark.py::test_the_script_for_several_hosts_trains",
    "pip install .": "tests/test_commands.py::test_an_installed_library",
}  # fmt: skip
#: Those that nothing here can run, for want of an address, conda, a container engine, MPI or a second host; or because
#: they would change the environment of the tests.
NOWHERE = {
    "git clone <this repository> bpkit", "git remote -v", "cd bpkit",
    "conda env create -f environment.yml", "conda activate bpkit",
    ".venv/bin/python", 'pip install -c constraints.txt -e ".[test]"', "docker run --shm-size=2g",
    "ssh -L 8888:127.0.0.1:8888 host", "mpirun -n 8 --hostfile hosts python train.py",
    "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-id 1 --rdzv-endpoint host0:29500 train.py",
}


def test_every_command_is_accounted_for() -> None:
    found = {command for page in PAGES for command in typed(page)}
    assert found - {*HERE, *ELSEWHERE, *NOWHERE} == set(), "run it here, or say where it runs"
    assert {*HERE, *ELSEWHERE, *NOWHERE} - found == set(), "no page says it any more"
    for place in ELSEWHERE.values():
        path, _, name = place.partition("::")
        assert f"def {name}" in (ROOT / path).read_text(), place


@pytest.mark.parametrize("command", HERE)
def test_commands(command: str) -> None:
    assert HERE[command]()


def test_the_first_lines_of_the_readme(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "first.py").write_text(code)
    run(sys.executable, str(tmp_path / "first.py"), PYTHONPATH=str(ROOT), MPLBACKEND="agg")


def test_an_installed_library(tmp_path: Path) -> None:
    """What pip installs holds what the library reads at run time."""
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), ".", limit=300.0)
    said = run(sys.executable, "-P", "-c", "import bpkit as bp; bp.data.digits(); print(bp.__file__)",
               PYTHONPATH=str(tmp_path))  # fmt: skip
    assert str(tmp_path) in said


def test_the_command_for_gpus(tmp_path: Path) -> None:
    """With no GPU the tests are skipped, and the benchmark takes the processor; the last five lines say so."""
    said = run(sys.executable, "tools/gpu.py", "--device", "cpu", "--out", str(tmp_path), "--minutes", "4", limit=240)
    lines = [line.split(":")[0] for line in said.strip().splitlines()[-5:]]
    assert lines == ["machine", "tests", "benchmark", "verdict", "files"]
    assert {"machine.json", "tests.txt", "tests.xml", "benchmark.json"} <= {path.name for path in tmp_path.iterdir()}
    assert "0 failed" in said and ("nothing ran on a GPU" in said or shutil.which("nvidia-smi"))
    assert "pytest is there" in run(sys.executable, "tools/gpu.py", "--fetch-pytest")


@pytest.mark.parametrize("given", ["--no-browser --port 9347", "--no-browser --ip=127.0.0.1 --ServerApp.port=9348"])
def test_lab_takes_arguments(given: str) -> None:
    """A port may be named in either form, though the course has one of its own."""
    port = re.search(r"9\d+", given)[0]
    process = subprocess.Popen([*MAKE, "lab", f"BPKIT_LAB_ARGS={given}"], cwd=ROOT, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    watchdog = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        seen = ""
        while f"http://127.0.0.1:{port}/lab/tree/chapters/README.md?token=" not in seen:
            line = process.stdout.readline()
            assert line, f"JupyterLab ended:\n{seen}"
            seen += line
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        watchdog.cancel()
