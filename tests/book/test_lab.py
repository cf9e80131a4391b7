"""The explorer in a real JupyterLab, with a real kernel and real workers: Measure, Stop, Measure again, Restart."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

ROOT = Path(__file__).resolve().parents[2]
# So many steps that a run can be stopped in its middle, and so small that a whole one ends soon.
CELL = """
import os
import pathlib
import bpkit as bp

pathlib.Path("pid").write_text(str(os.getpid()))
network, data = bp.nn.mlp([64, 64, 10], seed=0), bp.data.digits()
figure = bp.course.explorer(network=network, data=data, workers=[1, 2], batch=64, steps=STEPS)
figure
"""
PIPELINES = """
import bpkit as bp
from bpkit.course.figures.schedules import equal_stages

bp.course.pipelines(None, "gpipe", 2, 4, network=equal_stages(64))
"""

# Before the kernel is there, "run" would ask which one to take.
KERNEL_IS_IDLE = "() => jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until `condition` gives something true, and return it."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return value


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """Whether a server answers there."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """A JupyterLab in a folder of its own: its address, its token, the folder."""
    folder, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    port, token = free_port(), secrets.token_hex(16)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JUPYTER_PLATFORM_DIRS": "1",
                   "JUPYTER_CONFIG_DIR": str(home), "JUPYTER_DATA_DIR": str(home), "JUPYTER_RUNTIME_DIR": str(home),
                   "IPYTHONDIR": str(home)}
    arguments = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
                 f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--allow-root",
                 "--LabApp.expose_app_in_browser=True",
                 f"--LabApp.app_settings_dir={ROOT / 'tools' / 'lab_settings'}"]
    with (home / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *arguments], env=environment, stdout=log,
                                   stderr=subprocess.STDOUT, cwd=folder)
        try:
            until(lambda: answers(f"http://127.0.0.1:{port}/api?token={token}"), 60, "JupyterLab answers")
            yield f"http://127.0.0.1:{port}", token, folder
        finally:
            below = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(15)
            _, alive = psutil.wait_procs(below, timeout=10)
            for left in alive:
                left.kill()
    assert alive == [], "JupyterLab left processes behind"


@pytest.fixture
def notebook(lab: tuple[str, str, Path], browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a new notebook whose explorer measures the given number of steps, and run it."""
    url, token, folder = lab
    contexts = []

    def open_notebook(steps: int, source: str = CELL) -> Page:
        cell = nbformat.v4.new_code_cell(source.replace("STEPS", str(steps)).strip())
        made = nbformat.v4.new_notebook(cells=[cell])
        made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        name = f"figure{steps}.ipynb"
        nbformat.write(made, folder / name)
        (folder / "pid").unlink(missing_ok=True)
        context = browser.new_context(viewport={"width": 1300, "height": 1600})
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        # A workspace of its own: JupyterLab would open the notebooks of the last one too.
        page.goto(f"{url}/lab/workspaces/steps{steps}/tree/{name}?token={token}")
        page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
        run_all(page)
        return page

    yield open_notebook
    for context in contexts:
        context.close()


def command(page: Page, name: str) -> None:
    """Run a command of JupyterLab, without waiting for what it does."""
    page.evaluate(f"() => {{ window.jupyterapp.commands.execute('{name}'); }}")


def run_all(page: Page) -> Locator:
    """Run the notebook; the figure that its cell shows."""
    page.wait_for_function(KERNEL_IS_IDLE)
    command(page, "notebook:run-all-cells")
    figure = page.locator(".bpkit-explorer")
    expect(figure.get_by_role("button", name="Measure on this machine")).to_be_visible(timeout=60_000)
    return figure


def kernel(folder: Path) -> psutil.Process:
    """The kernel's process, whose id the cell wrote down."""
    text = until(lambda: (folder / "pid").exists() and (folder / "pid").read_text(), 30, "the cell ran")
    return psutil.Process(int(text))


def running(processes: list[psutil.Process]) -> list[int]:
    """The ids of those that still run after a while; a zombie has ended, though nobody asked how.

    Jupyter first asks the kernel to end, and after some seconds makes it.
    """
    _, left = psutil.wait_procs(processes, timeout=20)
    return [process.pid for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def progress(figure: Locator) -> float:
    """What the progress bar shows, from 0 to 1."""
    return float(figure.locator("progress").evaluate("bar => bar.value"))


def test_measure_stop_and_measure_again(lab: tuple[str, str, Path], notebook: Callable[[int], Page]) -> None:
    page = notebook(300)
    figure = page.locator(".bpkit-explorer")
    figure.get_by_role("button", name="Measure on this machine").click()
    until(lambda: 0 < progress(figure) < 1, 30, "progress is shown")
    expect(figure.locator(".bpkit-measure [role=status]")).not_to_be_empty()
    figure.get_by_role("button", name="Stop").click()
    expect(figure.get_by_text("Stopped; nothing was added.")).to_be_visible(timeout=10_000)
    expect(figure.locator("progress")).to_be_hidden()
    figure.get_by_label("2 workers").fill("1.7")
    figure.get_by_role("button", name="Measure on this machine").click()
    # "Interrupt" is for cells: it reaches neither our thread nor the workers.
    until(lambda: 0 < progress(figure) < 1, 30, "progress is shown again")
    command(page, "kernelmenu:interrupt")
    expect(figure.get_by_text("Measured.")).to_be_visible(timeout=60_000)
    expect(figure.get_by_role("button", name="Measure again")).to_be_visible()
    figure.get_by_role("button", name="Show the measurement").click()
    expect(figure.locator(".mark.own")).to_have_count(2)
    expect(figure.locator(".bpkit-verdict")).to_have_text(re.compile("With 2 workers you predicted 1.70×, measured"))
    # Arrow keys stay with the slider, in spite of JupyterLab's own use of them.
    slider = figure.locator("input[type=range]")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    expect(figure.locator("output")).to_have_text("1")
    expect(slider).to_be_focused()


def test_pipelines_are_measured_and_keep_their_keys(notebook: Callable[..., Page]) -> None:
    page = notebook(0, PIPELINES)
    figure = page.locator(".bpkit-pipelines")
    figure.get_by_role("button", name="Measure on this machine").click()
    expect(figure.get_by_text("Measured. Make your prediction, then show it.")).to_be_visible(timeout=60_000)
    figure.get_by_label("units a step").fill("15")
    figure.get_by_role("button", name="Show the timeline").click()
    expect(figure.locator(".bpkit-verdict")).to_have_text(re.compile("a step takes 15 units: right"))
    expect(figure.locator(".bpkit-words")).to_contain_text("Measured (yours, on ")
    expect(figure.locator(".pass.measured[data-cell='1B3']")).to_have_count(1)
    figure.locator(".bpkit-lanes .bpkit-scroll").focus()
    for key, cell in (("ArrowRight", "0F0"), ("ArrowDown", "1F0"), ("ArrowRight", "1F1"), ("ArrowUp", "0F2")):
        page.keyboard.press(key)
        expect(figure.locator(".frame.looked")).to_have_attribute("data-cell", cell)


def test_restart_in_mid_run_leaves_no_worker(lab: tuple[str, str, Path], notebook: Callable[[int], Page]) -> None:
    page = notebook(20_000)
    figure = page.locator(".bpkit-explorer")
    before = kernel(lab[2])
    figure.get_by_role("button", name="Measure on this machine").click()
    until(lambda: 0 < progress(figure) < 1, 30, "progress is shown")
    workers = until(lambda: before.children(recursive=True), 20, "workers run below the kernel")
    (lab[2] / "pid").unlink()
    command(page, "kernelmenu:restart")
    page.locator(".jp-Dialog .jp-mod-accept").click()
    expect(page.locator(".jp-Dialog")).to_have_count(0)
    assert running([before, *workers]) == []
    # The new kernel is of use.
    run_all(page)
    assert kernel(lab[2]).pid != before.pid
