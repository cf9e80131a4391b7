"""What must hold of the repository as a whole."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
# From the ground up; a room imports only from floors below its own, or from within itself.
FLOORS = [
    {"lazy", "given"}, {"description"}, {"nn", "optim", "data", "compress"}, {"plan"}, {"trace"}, {"run", "simulate"},
    {"measure"}, {"show"}, {"course"},
]  # fmt: skip
LONGEST_FILE = 400
# Code lines (without blank lines, comments and docstrings) that may stand in rooms together.
# The course has no ceiling but that of a file.
CEILINGS = {
    ("description", "nn", "optim", "compress", "data", "plan", "trace", "simulate", "run",
     "run/engine"): 6200,
    ("run/transports", "run/processes"): 1902,
    ("measure", "show", "cli"): 1400,
    ("given", "lazy"): 60,  # no part of the subject: what callers give, and what is loaded late
}
# Cells whose output nbval leaves out, in one notebook.
IGNORED_CELLS = 8
# Cells of one chapter, and lines of code that its reader sees: what fits into an hour.
CELLS, VISIBLE_LINES = 60, 160
FOLDED = {"hide-cell", "hide-input", "remove-cell", "remove-input"}
ROOMS = set().union(*FLOORS)


def tracked(*patterns: str) -> list[Path]:
    """The files under version control that match, or all that are there where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    try:
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return [path for pattern in patterns for path in ROOT.rglob(pattern) if "/.venv" not in path.as_posix()]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement: str) -> str:
    """The normalised name of a requirement."""
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split(";")[0].strip().split("==") for line in lines if line and not line.startswith("#")]
    return {name_of(name): version for name, version in pairs}


# Dependencies: declared once


def test_every_dependency_has_one_exact_version() -> None:
    wanted = [*project()["dependencies"], *chain.from_iterable(project()["optional-dependencies"].values())]
    assert [text for text in wanted if name_of(text) not in constraints()] == []
    assert [name for name, version in constraints().items() if "+" in version] == [], "a local build"


def test_every_import_is_declared() -> None:
    """What our files import from others stands in pyproject.toml, not only in what something else brings."""
    called = {"axe_playwright_python": "axe-playwright-python", "bs4": "beautifulsoup4", "yaml": "pyyaml"}
    # Imported only where it is found; the tests and benchmarks that do so say so.
    optional = {"sklearn", "torchvision", "IPython", "traitlets", "jupyter_client"}
    declared = {name_of(text) for text in [*project()["dependencies"],
                                           *chain.from_iterable(project()["optional-dependencies"].values())]}
    files = tracked("bpkit/*.py", "tests/*.py", "tools/*.py", "benchmarks/*.py")
    own = {"bpkit", "tests"} | {path.stem for path in files}
    missing = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.split(".")[0] for name in names} - own - optional - set(sys.stdlib_module_names):
                if called.get(top, top.replace("_", "-").lower()) not in declared:
                    missing.add((top, str(path.relative_to(ROOT))))
    assert missing == set()


def test_environment_uses_the_same_declaration() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", "-e .[course]"]
    # Conda gives the interpreter and pip; a package named here would be declared twice.
    assert {name_of(entry) for entry in plain} == {"python", "pip"}
    python = next(entry for entry in plain if entry.startswith("python"))
    assert f"Programming Language :: Python :: {python.split('=')[-1]}" in project()["classifiers"]
    # pip's own index gives Linux the PyTorch with CUDA; another channel, index or build could be one without.
    assert environment["channels"] == ["conda-forge"] and set(environment) == {"name", "channels", "dependencies"}


def test_exact_versions_are_those_that_pyproject_allows() -> None:
    def number(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version))

    wanted = [*project()["dependencies"], *chain.from_iterable(project()["optional-dependencies"].values())]
    for text in wanted:
        operator, least = re.fullmatch(r"[\w.-]+(>=|==)([\w.]+)", text).groups()
        found = constraints()[name_of(text)]
        assert number(found) >= number(least) if operator == ">=" else found == least, (text, found)


def test_makefile_and_ci_use_the_constraints() -> None:
    assert "-c constraints.txt" in (ROOT / "tools/setup.sh").read_text()
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_oldest_python_is_said_once() -> None:
    oldest = project()["requires-python"].removeprefix(">=")
    assert f'oldest="{oldest}"' in (ROOT / "tools/setup.sh").read_text()
    newest = sorted(text.split(" :: ")[-1] for text in project()["classifiers"] if " :: 3." in text)[-1]
    assert f'newest="{newest}"' in (ROOT / "tools/setup.sh").read_text()


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE-text", "CITATION.cff", "CONTRIBUTING.md", "README.md",
                                  "bpkit/data/SOURCE.txt"])
def test_papers_are_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 200


def test_version_is_said_once() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project()["version"]
    assert citation["license"] == project()["license"]


# Code: short files, floors, a light import


def test_no_file_is_too_long() -> None:
    files = tracked("*.py", "*.js", "*.css", "*.sh", "Makefile")
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files
               if "vendor" not in path.parts}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    text = path.read_text()
    lines = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def lines_by_room() -> dict[str, int]:
    """Code lines of each room; those inside `run` by themselves."""
    lines: dict[str, int] = {}
    for path in tracked("bpkit/*.py"):
        room, *inside = path.relative_to(ROOT / "bpkit").with_suffix("").parts
        room = f"run/{inside[0]}" if room == "run" and len(inside) > 1 else room
        lines[room] = lines.get(room, 0) + code_lines(path)
    return lines


def test_rooms_stay_small() -> None:
    lines = lines_by_room()
    assert set(lines) <= {"__init__", "course", *chain.from_iterable(CEILINGS)}, "a room without a ceiling"
    found = {rooms: sum(lines.get(room, 0) for room in rooms) for rooms in CEILINGS}
    assert {rooms: count for rooms, count in found.items() if count > CEILINGS[rooms]} == {}, lines


def imports(path: Path) -> set[str]:
    """The modules of bpkit that a file imports, anywhere in it, for types too; without `bpkit.`."""
    package = ["bpkit", *path.relative_to(ROOT / "bpkit").parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return {name.removeprefix("bpkit.") for name in found if name.startswith("bpkit.")}


def rooms() -> dict[str, set[str]]:
    """Each room of the library with the rooms that its files import."""
    seen: dict[str, set[str]] = {}
    for path in tracked("bpkit/*.py"):
        room = path.relative_to(ROOT / "bpkit").parts[0].removesuffix(".py")
        if room != "__init__":
            seen.setdefault(room, set()).update(name.split(".")[0] for name in imports(path))
    return {room: {name for name in used if name in ROOMS and name != room} for room, used in seen.items()}



def test_imports_run_only_down_the_floors() -> None:
    floor = {room: height for height, names in enumerate(FLOORS) for room in names}
    assert set(rooms()) <= ROOMS, "a room that stands on no floor: put it into FLOORS"
    assert [(room, used) for room, names in rooms().items() for used in names if floor[used] >= floor[room]] == []


# Inside `run`, of a room or of a module of `run` itself: what it may import of the others, and whether of a plan.
JOB = {"errors", "job", "room", "whole"}  # what travels; below the engine
INSIDE_RUN = {"transports": ({"errors"}, False), "processes": ({"errors", "transports"}, False),
              "engine": ({*JOB, "transports"}, True), "job": ({*JOB, "transports"}, True)}


def test_rooms_of_run_stand_on_each_other() -> None:
    """`run` itself uses engine, processes and transports; of `run` itself these see only errors and what travels."""
    wrong = []
    for path in tracked("bpkit/run/*.py"):
        room = path.relative_to(ROOT / "bpkit/run").parts[0].removesuffix(".py")
        room = "job" if room in JOB else room
        allowed, plans = INSIDE_RUN.get(room, (None, True))
        if allowed is not None:
            used = {name.split(".")[1] for name in imports(path) if name.startswith("run.")} - {room}
            wrong += [(str(path), name) for name in used - allowed]
            wrong += [(str(path), name) for name in imports(path) if name.split(".")[0] == "plan" and not plans]
    assert wrong == []


def test_modules_import_in_no_circle() -> None:
    """Imports at the top of modules; a module imports its package's __init__ only where that is named."""
    files = {".".join(path.relative_to(ROOT / "bpkit").with_suffix("").parts).removesuffix(".__init__"): path
             for path in tracked("bpkit/*.py") if path != ROOT / "bpkit/__init__.py"}
    graph = {name: {used for used in imports(path) if used in files and used != name
                    and not (path.name != "__init__.py" and name.startswith(f"{used}."))}
             for name, path in files.items()}
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " imports ".join([*above[above.index(name):], name])
        if name not in done:
            for used in sorted(graph[name]):
                walk(used, (*above, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_import_loads_torch_and_numpy_only() -> None:
    """On a bare GPU machine there is nothing else."""
    banned = ["matplotlib", "IPython", "ipykernel", "ipywidgets", "anywidget", "cloudpickle", "tqdm", "traitlets",
              "pandas", "sklearn", "jupyter_client"]
    script = "import sys, json; import torch, numpy; before = set(sys.modules); import bpkit; " \
             "[getattr(bpkit, name) for name in set(bpkit.__all__) - {'course', 'exercises'}]; " \
             "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert sorted(set(json.loads(run.stdout)) & set(banned)) == []


def test_plans_and_descriptions_import_the_standard_library_alone() -> None:
    """So the checker also runs where there is no torch: in a browser."""
    rooms = ("plan/*", "description/*", "simulate/*", "lazy", "given", "__init__")
    files = tracked(*(f"bpkit/{room}.py" for room in rooms))
    allowed = {*sys.stdlib_module_names, "bpkit"}
    found = {(str(path.relative_to(ROOT)), top) for path in files for node in ast.walk(ast.parse(path.read_text()))
             for top in ([alias.name.split(".")[0] for alias in node.names] if isinstance(node, ast.Import)
                         else [(node.module or "").split(".")[0]] if isinstance(node, ast.ImportFrom) else [])}
    assert {(path, top) for path, top in found if top not in allowed} == set()
    script = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy"):
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from bpkit.description import Description, layers
from bpkit.plan import Plan, check, compile, one_f_one_b
from bpkit.simulate.events import Times, run

plan = one_f_one_b(8, 32)
check(plan)
described = Description((layers.Linear(64, 64), layers.ReLU()) * 8, (64,))
print(compile(plan, described).sizes, max(map(max, run(plan, Times(), 1)[0].end)))
row = list(plan.rows[3])
row.remove(next(action for action in row if action.kind == "SEND_F"))
try:
    check(Plan.parse(str(plan.with_rows([*map(list, plan.rows[:3]), row, *map(list, plan.rows[4:])]))))
except ValueError as error:
    print(error)
assert not {"torch", "numpy"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{(64 * 64 + 64,) * 8} {3 * (32 + 7)}000000000\n")
    assert ">>" in run.stdout and "row 7" in run.stdout


# Chapters


def chapters() -> list[Path]:
    return sorted((ROOT / "chapters").glob("*.ipynb"))


def test_map_toc_and_chapters_agree() -> None:
    toc = (ROOT / "book/_toc.yml").read_text()
    there = {path.name for path in chapters()}
    assert {f"{name}.ipynb" for name in re.findall(r"chapters/(\w+)", toc)} == there
    assert set(re.findall(r"\]\((\w+\.ipynb)\)", (ROOT / "chapters/README.md").read_text())) == there


def test_few_cells_are_left_out_by_nbval() -> None:
    counts = {path.name: sum("nbval-ignore-output" in cell["metadata"].get("tags", []) or
                             "nbval-skip" in cell["metadata"].get("tags", [])
                             for cell in json.loads(path.read_text())["cells"]) for path in chapters()}
    assert {name: count for name, count in counts.items() if count > IGNORED_CELLS} == {}


def test_chapters_are_short() -> None:
    for path in (ROOT / "chapters").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        seen = ["".join(cell["source"]) for cell in code if not FOLDED & {*cell["metadata"].get("tags", [])}]
        lines = [line for text in seen for line in text.splitlines() if line.strip()]
        assert len(cells) <= CELLS and len(lines) <= VISIBLE_LINES, (path.name, len(cells), len(lines))


def test_notebooks_are_as_make_execute_saves_them() -> None:
    """No times, versions or random ids, so a change in a notebook's history is a change in what it says."""
    sys.path.insert(0, str(ROOT / "tools"))
    import nbformat

    import notebooks

    differ = [path.name for path in chapters()
              if nbformat.writes(notebooks.normalise(notebooks.read(path))) + "\n" != path.read_text()]
    assert differ == [], "run `make execute`, and do not save from JupyterLab after it"


def test_nothing_names_the_machine_it_was_written_on() -> None:
    texts = tracked("*.md", "*.py", "*.yml", "*.ipynb", "Makefile", "*.sh", "*.json", "*.toml", "*.txt")
    private = re.compile(r"/(?:work|root|home/\w+)/")
    assert [str(path.relative_to(ROOT)) for path in texts if private.search(path.read_text(errors="replace"))
            and path != Path(__file__)] == []
