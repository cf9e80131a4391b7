"""The figures: what is drawn, what is said in words, and that the same figure is the same file."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

import bpkit as bp
from bpkit.measure import Parts, Point, Scaling, Spread
from bpkit.plan.action import LOOKS, PASSES
from bpkit.show.drawing import TEXT
from bpkit.show.looks import FILLS, css
from bpkit.simulate import simulate

from ..measure.made import repeated, result

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def scaling() -> Scaling:
    """A made measurement of 1 and 2 workers."""
    points = []
    for n, speedup in ((1, 1.0), (2, 1.6)):
        step = 1e-3 / speedup
        points.append(
            Point(
                workers=n, batch=8, step_s=Spread(step, 0.9 * step, 1.2 * step, (step,)), throughput=8 / step,
                speedup=speedup, efficiency=speedup / n, parts=Parts(0.6 * step, 0.1 * step, 0.2 * step, 0.1 * step),
                hidden_communication=0.1 * step * (n - 1), bytes_sent=None, payload_bytes=100, algorithm="made",
                time_to_accuracy_s=None, steps_to_accuracy=None, final_loss=0.1, timeline=(),
            )
        )  # fmt: skip
    experiment = {"scaling": "strong", "network": "mlp 4-6-3", "plan": "p", "backend": "shm", "data": "d", "batch": 8}
    experiment |= {"steps": 10, "repetitions": 5}
    return Scaling({"name": "made"}, {**experiment, "target_accuracy": None}, tuple(points))


def figures() -> dict[str, Any]:
    """One of each."""
    made = result(repeated())
    return {
        "timeline": bp.show.timeline(made),
        "report": bp.show.breakdown(bp.report(made)),
        "scaling": bp.show.breakdown(scaling()),
        "speedup": bp.show.speedup(scaling()),
        "plan": bp.show.plan(made.plan),
    }


def test_figures_are_text_on_a_transparent_ground_and_reproducible() -> None:
    first, second = figures(), figures()
    for name, figure in first.items():
        drawn = figure.svg()
        assert drawn == second[name].svg(), name
        assert "<text" in drawn and "<dc:date>" not in drawn
        assert 'role="img"><title>' in drawn and figure.alt.split(".")[0] in drawn
        assert not re.search(r"fill: #(fff|ffffff|000|000000)\b(?!.*<text)", drawn.split("axes_1")[0]), name


def test_a_notebook_gets_svg_and_words_without_figures_in_the_text() -> None:
    data, metadata = figures()["timeline"]._repr_mimebundle_()
    assert data["text/plain"] == "<Drawing>" and data["image/svg+xml"].count("<svg") == 1
    assert metadata["image/svg+xml"]["alt"].startswith("Timeline of step")


def test_timeline_draws_lanes_waits_and_labels() -> None:
    figure = bp.show.timeline(repeated(), step=1)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0", "rank 1"]
    hatched = [bar for bar in axes.collections if bar.get_hatch()]
    assert len(hatched) == 4  # two waits on each rank
    assert len(axes.collections) == 9 + 4 + 1  # and one wait for a core
    assert {text.get_text() for text in axes.texts} >= {"1F0", "1B0", "0B0"}
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words == ["forward (F)", "backward (B)", "communication", "update", "waiting for a core",
                     "blocked by communication"]  # fmt: skip
    # The update's bar is its work: it starts after the wait.
    left, right = (axes.collections[i].get_paths()[0].get_extents().intervalx for i in (0, 2))
    assert left == pytest.approx([0, 30]) and right == pytest.approx([30, 60])


def test_timeline_of_some_ranks_and_of_a_simulated_trace() -> None:
    trace = repeated()
    assert len(bp.show.timeline(trace, ranks=[1]).axes[0].get_yticks()) == 1
    figure = bp.show.timeline(replace(trace, simulated=True))
    assert "simulated" in figure.svg() and "(simulated)" in bp.show.alt_text(figure)
    assert "simulated" not in bp.show.timeline(trace).svg()


# -- marks and legend


def marks(drawn: str) -> tuple[set[str], dict[str, str]]:
    """Fills of the marks in the axes of an SVG, and the legend's fills by its words."""
    root = ElementTree.fromstring(drawn)
    svg = "{http://www.w3.org/2000/svg}"

    def fill(element: ElementTree.Element) -> str:
        path = next(element.iter(f"{svg}path"), next(element.iter(f"{svg}use"), element))
        style = dict(part.split(": ", 1) for part in path.get("style", "").split("; ") if part)
        assert float(style.get("opacity", 1)) == 1 or style.get("fill", "none") == "none", style
        return style.get("fill", "none").rstrip(";")

    groups = {group.get("id", ""): group for group in root.iter(f"{svg}g")}
    (legend,) = (group for name, group in groups.items() if name.startswith("legend"))
    entries = list(legend)
    words = ["".join(entry.itertext()).strip() for entry in entries if entry.get("id", "").startswith("text")]
    fills = [fill(entry) for entry in entries if entry.get("id", "").startswith("patch")]
    bars = {name for name in groups if name.startswith(("FillBetween", "PolyCollection", "patch"))}
    inside = {id(element) for element in legend.iter()}
    axes = groups["axes_1"]
    skipped = {id(group) for group in axes if group.get("id", "").startswith(("patch_2", "matplotlib"))}
    found = {fill(group) for name, group in groups.items() if name in bars and id(group) not in inside | skipped}
    return {one for one in found if one.startswith("#")}, dict(zip(words, fills, strict=True))


SIMULATED = {
    "1F1B": bp.plan.one_f_one_b(4, 8), "ZB-H1": bp.plan.zero_bubble_h1(4, 8), "GPipe": bp.plan.gpipe(2, 4),
    "ZB-V": bp.plan.zb_v(2, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", SIMULATED)
def test_bars_have_the_colours_of_their_legend(name: str) -> None:
    """Simulated or not: no transparency makes a bar paler than its legend."""
    figure = bp.show.timeline(simulate(SIMULATED[name], steps=1))
    drawn, legend = marks(figure.svg())
    assert drawn == {fill for fill in legend.values() if fill.startswith("#")}
    looks = {action.verb.look for row in SIMULATED[name].rows for action in row if action.kind in PASSES}
    assert drawn == {LOOKS[look][0] for look in looks}


def test_measured_bars_have_the_colours_of_their_legend() -> None:
    drawn, legend = marks(bp.show.timeline(repeated(), step=1).svg())
    assert drawn == {fill for fill in legend.values() if fill.startswith("#")} and len(drawn) == 5
    assert legend["waiting for a core"] in drawn


def test_a_simulation_is_in_units_and_draws_no_message_that_takes_no_time() -> None:
    figure = bp.show.timeline(simulate(bp.plan.one_f_one_b(4, 8), steps=1))
    axes = figure.axes[0]
    assert axes.get_xlabel() == "simulated time, units" and axes.get_xlim() == (0, 33)
    assert "communication" not in [text.get_text() for text in axes.get_legend().get_texts()]
    labels = [text.get_text() for text in axes.texts]
    assert sorted(labels) == sorted(4 * 2 * [str(mb) for mb in range(8)])  # every pass, by its microbatch
    # Rank 0 ends with the step; rank 3 ended p - 1 backwards before it and is hatched from there on.
    hatched = [bar.get_paths()[0].get_extents() for bar in axes.collections if bar.get_hatch()]
    last = {round(box.y0 + 0.35): box.x0 for box in hatched if box.x1 == 33}
    assert last == {1: 31, 2: 29, 3: 27}


def test_a_simulation_in_measured_seconds_is_in_milliseconds_or_in_the_unit_that_is_given() -> None:
    trace = simulate(bp.plan.gpipe(2, 2), bp.simulate.Times(1.3e-3, 1e-3, 1e-3), steps=1)
    assert bp.show.timeline(trace).axes[0].get_xlabel() == "simulated time, ms"
    axes = bp.show.timeline(trace, unit=1e-3).axes[0]
    assert axes.get_xlabel() == "simulated time, units" and axes.get_xlim()[1] == pytest.approx(9.9)


def test_a_measured_timeline_says_that_it_is_one_step_and_a_breakdown_of_how_many() -> None:
    assert bp.show.timeline(repeated(), step=1).axes[0].get_xlabel() == "one step, number 1; us"
    assert bp.show.breakdown(bp.report(result(repeated()))).axes[0].get_xlabel().endswith("median of 2 steps")
    assert bp.show.breakdown(scaling()).axes[0].get_xlabel().endswith("median of 50 steps")


@pytest.mark.parametrize("name", [*figures(), *SIMULATED, "long plan"])
def test_text_is_nine_pixels_tall_on_a_telephone(name: str) -> None:
    """350 pixels are the column of a page that is 390 wide (tests/book measures it)."""
    made = (figures()[name] if name in figures() else bp.show.plan(bp.plan.zero_bubble_h2(2, 6)) if name == "long plan"
            else bp.show.timeline(simulate(SIMULATED[name], steps=1)))  # fmt: skip
    drawn = made.svg()
    width = float(re.search(r'width="([\d.]+)pt"', drawn)[1])
    sizes = [float(size) for size in re.findall(r"font(?:-size)?:[^;]*?([\d.]+)px", drawn)]
    assert sizes and min(sizes) * 350 / width >= 9


def test_words_and_colours_are_the_same_on_the_page() -> None:
    """What the explorers call a kind or a part, and how they colour it, comes from the same table."""
    words = (ROOT / "bpkit/course/figures/static/text.js").read_text()
    for name in FILLS:
        said = re.search(rf"^    {name}: \"([^\"]+)\"", words, re.MULTILINE)
        assert said and said[1] == TEXT[name], name
        fill, ink = FILLS[name]
        assert f"--bp-{name.replace('_', '-')}: {fill};" in css() and f"-ink: {ink};" in css()


def test_timeline_refuses_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="step 9 is not in the trace, which has steps 0 to 2"):
        bp.show.timeline(repeated(), step=9)
    with pytest.raises(ValueError, match="rank 5 is not in the trace, which has ranks 0 to 1"):
        bp.show.timeline(repeated(), ranks=[0, 5])


def test_breakdown_stacks_to_the_step_time() -> None:
    axes = figures()["scaling"].axes[0]
    whole = [patch.get_width() for patch in axes.patches if patch.get_height() > 0.5]
    assert sum(whole[:4]) == pytest.approx(1.0) and sum(whole[4:]) == pytest.approx(0.625)  # ms
    assert len(axes.patches) == 9  # and one stripe of hidden communication
    assert "2: 625 us, of it compute 375 us" in figures()["scaling"].alt
    assert [label.get_text() for label in figures()["report"].axes[0].get_yticklabels()] == [
        "mean of ranks", "rank 0", "rank 1",
    ]  # fmt: skip


def test_speedup_has_the_ideal_line_and_every_point() -> None:
    axes = figures()["speedup"].axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1, 1], [2, 2]]
    assert axes.lines[1].get_ydata().tolist() == [1.0, 1.6]
    assert "1.60 with 2" in figures()["speedup"].alt
    with pytest.raises(ValueError, match="at least one measurement"):
        bp.show.speedup()
    with pytest.raises(ValueError, match="1 measurements but 2 names"):
        bp.show.speedup(scaling(), names=["a", "b"])


def test_plan_draws_each_action() -> None:
    plan = bp.plan.data_parallel(2, buckets=2)
    axes = bp.show.plan(plan).axes[0]
    assert [t.get_text().replace("\n", "") for t in axes.texts] == [str(action) for action in plan.rows[0]]


def test_a_kernel_shows_each_figure_once_as_svg() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cells = [
        "import bpkit as bp",
        "bp.show.plan(bp.plan.data_parallel(2))",
        "bp.show.setup(); import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()",
        "bp.show.plan(bp.plan.serial())",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": ROOT}}
    ).execute()
    kinds = [[set(o["data"]) for o in cell.outputs if "data" in o] for cell in notebook.cells]
    assert kinds[1:] == [[{"image/svg+xml", "text/plain"}]] * 3


def test_show_loads_neither_matplotlib_nor_widgets() -> None:
    code = "import sys, bpkit.show as show; show.__all__; print({'matplotlib', 'anywidget'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bp.show.nothing


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("bpkit.show.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'bp\.show\.timeline needs matplotlib: pip install "bpkit\[course\]"'
    ):
        _ = bp.show.timeline
