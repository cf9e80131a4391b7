"""The tools that the Makefile calls."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import find_browser  # noqa: E402
import lighten  # noqa: E402
import nbval_widgets  # noqa: E402
import notebooks  # noqa: E402

MODEL, LAYOUT, STRAY = "a" * 32, "b" * 32, "c" * 32


def shown(n: int = 3, measured: float = 0.5) -> nbformat.NotebookNode:
    """A notebook that shows one widget, with ids as a kernel would give them, and holds one that nothing shows."""
    view = v4.new_output("display_data", {notebooks.VIEW: {"model_id": MODEL}, "text/plain": "Figure"})
    streams = [v4.new_output("stream", name="stdout", text=text) for text in ("one\n", "two\n")]
    book = v4.new_notebook(cells=[v4.new_code_cell("figure", outputs=[*streams, view])])
    book.cells[0].metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    state = {MODEL: {"model_name": "AnyModel", "state": {"n": n, "own": measured, "layout": f"IPY_MODEL_{LAYOUT}"}},
             LAYOUT: {"model_name": "LayoutModel", "state": {"width": None}},
             STRAY: {"model_name": "LayoutModel", "state": {}}}
    book.metadata["widgets"] = {notebooks.STATE: {"state": state, "version_major": 2, "version_minor": 0}}
    return book


def test_normalised_notebooks_depend_on_content_alone() -> None:
    book = notebooks.normalise(shown())
    other = shown()
    other.cells[0]["id"] = book.cells[0]["id"]
    text = nbformat.writes(other).replace(MODEL, "d" * 32).replace(LAYOUT, "0" * 31 + "e")
    assert notebooks.normalise(nbformat.reads(text, as_version=4)) == book
    assert notebooks.normalise(copy.deepcopy(book)) == book
    assert sorted(notebooks.states(book)) == [f"{0:032x}", f"{1:032x}"]
    assert "execution" not in book.cells[0].metadata
    assert [output["output_type"] for output in book.cells[0].outputs] == ["stream", "display_data"]
    assert book.cells[0].outputs[0]["text"] == "one\ntwo\n"


def test_cells_get_different_ids() -> None:
    book = v4.new_notebook(cells=[v4.new_markdown_cell(str(number)) for number in range(5)])
    ids = [cell["id"] for cell in notebooks.normalise(book).cells]
    assert len(set(ids)) == 5


def test_widget_states_that_agree() -> None:
    assert nbval_widgets.faults(notebooks.normalise(shown()), notebooks.normalise(shown())) == []


def test_widget_states_that_differ_name_the_field() -> None:
    committed, fresh = notebooks.normalise(shown(n=3)), notebooks.normalise(shown(n=4))
    (fault,) = nbval_widgets.faults(committed, fresh)
    assert "field n is 3, in a fresh run 4" in fault


def test_measured_fields_are_masked_only_where_named() -> None:
    committed, fresh = notebooks.normalise(shown(measured=1.0)), notebooks.normalise(shown(measured=2.0))
    assert len(nbval_widgets.faults(committed, fresh)) == 1
    committed.metadata["bpkit"] = {"measured": ["own"]}
    assert nbval_widgets.faults(committed, fresh) == []


def test_a_view_without_a_saved_state_is_a_fault() -> None:
    """This is what JupyterLab's own Save leaves."""
    committed = notebooks.normalise(shown())
    del committed.metadata["widgets"]
    faults = nbval_widgets.faults(committed, notebooks.normalise(shown()))
    assert any("never save from JupyterLab" in fault for fault in faults)


def test_a_browser_that_does_not_start_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub = tmp_path / "chromium"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("BPKIT_BROWSER", str(stub))
    with pytest.raises(RuntimeError, match="does not start.*BPKIT_NO_BROWSER=1"):
        find_browser.find_or_install()


def test_where_no_browser_can_be_had_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.delenv("BPKIT_BROWSER", raising=False)
    monkeypatch.setattr(find_browser, "candidates", lambda: iter([None, "/no/such/browser"]))
    monkeypatch.setattr(find_browser, "quietly", lambda *command: bool(tried.append(" ".join(command))))
    with pytest.raises(RuntimeError, match="apt install chromium.*BPKIT_NO_BROWSER=1"):
        find_browser.find_or_install()
    assert tried[-1].endswith("playwright install chromium")


@pytest.mark.parametrize(("python", "message"), [
    ("{old}", "bpkit needs Python 3.11 or newer, but .*old is 3.9, and no newer one was found"),
    ("/no/such/python", "no Python was found"),
    ("{bare}", "has no venv module"),
])
def test_setup_says_what_is_wrong_with_python(tmp_path: Path, python: str, message: str) -> None:
    """Stand-ins for an interpreter that is too old and for one without venv."""
    for name, body in {"old": "echo '3.9 old'", "bare": "[ \"$1\" = -c ] && exit 1; echo '3.12 tested'"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    chosen = python.format(old=tmp_path / "old", bare=tmp_path / "bare")
    environment = dict(os.environ, PYTHON=chosen)
    run = subprocess.run(["sh", str(ROOT / "tools/setup.sh"), "venv", "course", "stamp"], cwd=tmp_path,
                         env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert re.search(message, run.stderr), run.stderr
    assert not (tmp_path / "stamp").exists()


def test_unknown_stages_and_benchmarks_are_named() -> None:
    for tool in ("test", "bench"):
        run = subprocess.run([sys.executable, f"tools/{tool}.py", "nonsense"], cwd=ROOT, capture_output=True,
                             text=True, timeout=60)
        assert run.returncode == 2
        assert "nonsense" in run.stdout


def opened(url: str) -> int:
    """The status of a page; JupyterLab prints its address a moment before it listens."""
    for _ in range(50):
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return response.status
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.2)
    raise AssertionError(f"nobody listens at {url}")


def test_lab_answers_with_its_token_and_not_without() -> None:
    process = subprocess.Popen([sys.executable, "tools/lab.py", "--no-browser"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        seen = ""
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/lab/tree/chapters/README\.md\?token=(\w+)", seen)):
            line = process.stdout.readline()
            assert line, f"JupyterLab ended:\n{seen}"
            seen += line
        assert opened(found[0]) == 200
        contents = f"http://127.0.0.1:{found[1]}/api/contents/chapters/README.md"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(contents, timeout=30)
        with urllib.request.urlopen(f"{contents}?token={found[2]}", timeout=30) as response:
            assert b"The map of the course" in response.read()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        watchdog.cancel()


CELL = "import ipywidgets\nslider = ipywidgets.IntSlider(value={value})\nprint('shown')\nslider"


def chapter(tmp_path: Path, run: int, saved: int, said: str = "shown\n") -> subprocess.CompletedProcess:
    """A notebook whose cell shows a slider at `run`, with the state of one at `saved`, as `make test` checks it."""
    path = tmp_path / "chapter.ipynb"
    book = v4.new_notebook(cells=[v4.new_code_cell(CELL.format(value=saved))])
    path.write_text(nbformat.writes(book))
    book = notebooks.execute(path)
    book.cells[0]["source"] = CELL.format(value=run)
    book.cells[0].outputs[0]["text"] = said
    notebooks.write(book, path)
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "tools"))
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "nbval_widgets", str(path)], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("run", "saved", "said", "outcome"), [
    (3, 3, "shown\n", "2 passed"),
    (4, 3, "shown\n", "field value is 3, in a fresh run 4"),
    (3, 3, "hidden\n", "Cell outputs differ"),
])
def test_a_chapter_runs_once_for_outputs_and_widgets(tmp_path: Path, run: int, saved: int, said: str,
                                                     outcome: str) -> None:  # fmt: skip
    assert outcome in chapter(tmp_path, run, saved, said).stdout


PAGE = """<html><head><link rel="stylesheet" href="_static/a.css"><script src="_static/scripts/fontawesome.js"></script>
<script src="_static/searchtools.js"></script><script src="_static/own.js"></script></head><body><article>
<p>What the page is about.</p><i class="fa-solid fa-star"></i><span class="math">\\(a_1 < b\\)</span>
<p class="used">text</p></article></body></html>"""
SHEET = ".used, .unused { color: red } .unused { top: 1 } @media print { .unused { top: 2 } } p:not(.x) { top: 0 }"


def test_pages_are_made_light(tmp_path: Path) -> None:
    scripts = tmp_path / "_static" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "fontawesome.js").write_text('star:[9,8,[1],"f0","M outline"]},{star:[9,8,[1],"f0","M1 2z"]')
    for name, text in {"a.css": SHEET, "own.js": "1", "searchtools.js": "2"}.items():
        (tmp_path / "_static" / name).write_text(text)
    (tmp_path / "page.html").write_text(PAGE)
    lighten.lighten(tmp_path)
    made = (tmp_path / "page.html").read_text()
    assert '<path d="M1 2z"></path>' in made and "fa-star" not in made and "fontawesome.js" not in made
    assert "<math" in made and 'alttext="a_1 &lt; b"' in made and "\\(" not in made
    assert "searchtools" not in made and '<script defer="" src="_static/own.js">' in made
    assert '<meta content="What the page is about." name="description"/>' in made
    (sheet,) = (tmp_path / "_static").glob("book-*.css")
    assert f'href="_static/{sheet.name}"' in made
    assert sheet.read_text() == ".used{color: red}\np:not(.x){top: 0}"
