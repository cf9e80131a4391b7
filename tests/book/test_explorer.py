"""The explorer as a reader meets it: drawn, worked by mouse and by keyboard, in both themes, on a narrow screen.

A page with invented measurements stands for the states that no recorded run has; the last tests ask the same of
the built pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import explorer_samples as samples
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, expect

from bpkit.course.figures.explorers import Explorer, explorer, fragment
from bpkit.show.looks import FILLS

Open = Callable[..., Page]
Find = Callable[[type], list[str]]

OVERFLOWING = """figure => [...figure.querySelectorAll("*")]
    .filter(e => !e.closest(".bpkit-scroll") && !e.closest("defs") && e.getClientRects().length)
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5)
    .map(e => e.tagName + ": " + e.textContent.slice(0, 40))"""


@pytest.fixture
def show(tmp_path: Path, open_page: Open) -> Callable[..., Locator]:
    """Open a page with the given figures from a file, without any server; return the first figure."""

    def make(*figures: Any, views: int = 1, theme: str = "", **options: Any) -> Locator:
        page = open_page(**options)
        page.goto(samples.write_page(tmp_path, *figures, views=views, theme=theme).as_uri())
        figure = page.locator(".bpkit-explorer").first
        expect(figure.locator(".bpkit-speedup .ideal").first).to_be_visible()
        return figure

    return make


def full_figure(**traits: Any) -> Any:
    """A figure with two machines, both scalings on one of them, and a run of the reader's own."""
    weak = samples.measurement(scaling="weak", speedups={1: 1.0, 2: 1.8, 4: 3.1})
    other = samples.measurement("eight cores", counted=True, speedups={1: 1.0, 2: 1.9, 4: 3.5, 8: 5.6})
    figure = explorer([samples.measurement(), weak, other], **traits)
    figure.own = [samples.measurement("this laptop", speedups={1: 1.0, 2: 1.4, 4: 1.9})]
    return figure


def words(figure: Locator) -> str:
    """The text equivalent that stands under the figure."""
    return figure.locator(".bpkit-words").inner_text().replace("\u00a0", " ")


def set_slider(figure: Locator, stop: int) -> None:
    """Move the worker slider to its stop number `stop`, as a drag does."""
    figure.locator("input[type=range]").fill(str(stop))


def test_the_slider_moves_what_is_drawn(show: Callable[..., Locator]) -> None:
    figure = show(explorer([samples.measurement()], revealed=True))
    guide, chosen = figure.locator(".guide"), figure.locator(".bpkit-parts .row.chosen")
    before = (guide.get_attribute("x1"), figure.locator(".bpkit-timeline .event").count(), words(figure))
    assert chosen.get_attribute("data-workers") == "4"
    set_slider(figure, 1)
    assert chosen.get_attribute("data-workers") == "2"
    assert float(guide.get_attribute("x1") or 0) < float(before[0] or 0)
    assert figure.locator(".bpkit-timeline .event").count() * 2 == before[1]
    assert "2 workers" in words(figure) and "1.62×" in words(figure) and words(figure) != before[2]
    assert figure.locator("input[type=range]").get_attribute("aria-valuetext") == "2 workers"


def test_bars_are_as_long_as_the_measurement(show: Callable[..., Locator]) -> None:
    run = samples.measurement()
    figure = show(explorer([run], revealed=True))
    for point in run["points"]:
        rects = figure.locator(f".bpkit-parts .row[data-workers='{point['workers']}'] rect")
        drawn = {rect.get_attribute("class"): float(rect.get_attribute("width") or 0) for rect in rects.all()}
        compute = drawn["part compute"]
        for name, seconds in point["parts"].items():
            assert drawn[f"part {name}"] == pytest.approx(compute * seconds / point["parts"]["compute"], abs=0.01)
        hidden = point["hidden_communication"]
        assert ("part hidden_communication" in drawn) == (hidden > 0)


def colours(panel: Locator, mark: str) -> dict[str, tuple[str, str]]:
    """For each swatch of a panel's legend: its colour, and the fill of the first mark of its class."""
    return panel.evaluate(samples.COLOURS, mark)


@pytest.mark.parametrize("dark", [False, True])
def test_marks_have_the_colours_of_their_legend(show: Callable[..., Locator], dark: bool) -> None:
    """And both those of the one table that matplotlib's figures use."""
    figure = show(explorer([samples.measurement()], revealed=True), dark=dark)
    parts = colours(figure.locator(".bpkit-parts"), ".part.*")
    kinds = colours(figure.locator(".bpkit-timeline"), ".part.*")
    assert {*parts} == {"compute", "waiting_for_core", "exposed_communication", "idle", "hidden_communication"}
    assert {*kinds} == {"forward", "backward", "communication", "update", "waiting_for_core"}
    for name, (swatch, drawn) in (parts | kinds).items():
        red, green, blue = (int(FILLS[name][0][at : at + 2], 16) for at in (1, 3, 5))
        assert swatch == drawn == f"rgb({red}, {green}, {blue})", name
    faint = figure.locator(".bpkit-parts .part, .bpkit-timeline .part").evaluate_all(
        "marks => marks.filter((mark) => getComputedStyle(mark).opacity !== '1').length")  # fmt: skip
    assert faint == 0


def test_waiting_for_a_core_is_at_the_end_of_its_action(show: Callable[..., Locator]) -> None:
    figure = show(explorer([samples.measurement()], revealed=True))
    event = figure.locator(".event[data-cell='0F0'][data-rank='0']")
    rects = [event.locator(f"rect.{name}") for name in ("forward", "waiting_for_core")]
    (left, whole), (begin, core) = ([float(rect.get_attribute(at) or 0) for at in ("x", "width")] for rect in rects)
    assert core == pytest.approx(0.2 * whole) and begin + core == pytest.approx(left + whole)
    assert "it waits for a core" in event.locator("title").text_content()
    set_slider(figure, 1)
    expect(figure.locator(".bpkit-timeline .waiting_for_core")).to_have_count(0)  # two workers, two cores


def test_the_answer_stays_hidden_until_it_is_asked_for(show: Callable[..., Locator]) -> None:
    figure = show(full_figure())
    for panel in ("parts", "bytes", "throughput", "accuracy", "timeline"):
        expect(figure.locator(f".bpkit-{panel}")).to_be_hidden()
    expect(figure.locator(".mark")).to_have_count(0)
    expect(figure.locator("table")).to_have_count(0)
    assert "1.40" not in figure.inner_text() and "hidden until you show it" in words(figure)
    figure.get_by_role("button", name="Show the measurement").click()
    expect(figure.get_by_role("alert").first).to_contain_text("at least one prediction")
    expect(figure.locator(".mark")).to_have_count(0)


def test_a_prediction_far_beyond_stands_at_the_edge_and_one_below_zero_is_refused_with_a_word(
    show: Callable[..., Locator],
) -> None:
    figure = show(explorer([samples.measurement()]))
    ideal = figure.locator(".curve.ideal").get_attribute("d")
    field = figure.get_by_label("4 workers")
    field.fill("100")
    diamond = figure.locator(".diamond[data-workers='4']")
    assert diamond.get_attribute("data-speedup") == "100"
    box, plot = diamond.bounding_box(), figure.locator(".bpkit-speedup svg").bounding_box()
    assert box and plot and plot["y"] - 8 <= box["y"] < plot["y"] + 30
    after = figure.locator(".curve.ideal").get_attribute("d")
    ends = [[float(y) for y in re.findall(r",([\d.]+)", path or "")] for path in (ideal, after)]
    assert ends[1][0] - ends[1][1] > 0.6 * (ends[0][0] - ends[0][1]), "the plot is not squeezed"
    field.fill("-3")
    expect(figure.get_by_role("alert").first).to_contain_text("a number above 0")
    expect(field).to_have_value("-3")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(figure.locator(".diamond[data-workers='4']")).to_have_class(re.compile("unset"))
    field.fill("1.5")
    expect(figure.locator(".bpkit-predict .bpkit-problem")).to_have_text("")


def test_runs_have_short_names_that_differ_at_the_front_and_stand_side_by_side(show: Callable[..., Locator]) -> None:
    ring, zero = samples.measurement(), samples.measurement(counted=True, speedups={1: 1.0, 2: 1.4, 4: 2.0})
    zero["experiment"]["plan"] = "zero(n, 3)"
    zero["points"][2]["memory_bytes"] = 2_500_000
    figure = show(explorer([ring, zero], revealed=True))
    assert figure.locator("select option").all_inner_texts() == ["data_parallel(buckets=3)", "zero(n, 3)"]
    rows = [row.split("\t") for row in figure.locator(".bpkit-beside tbody").inner_text().split("\n")]
    assert [row[0] for row in rows] == ["data_parallel(buckets=3)", "zero(n, 3)"]
    assert [row[2] for row in rows] == ["2.31×", "2.00×"]
    assert rows[1][-1].replace("\u00a0", " ") == "2.5 MB" and rows[0][-1] == "–"
    figure.locator("select").select_option(index=1)
    assert "2.00×" in words(figure)
    alone = show(explorer([ring], revealed=True))
    expect(alone.locator(".bpkit-beside")).to_have_count(0)


def test_the_noise_of_the_machine_and_stolen_time_are_said(show: Callable[..., Locator]) -> None:
    about = show(explorer([samples.measurement()])).locator(".bpkit-about").inner_text().replace("\u00a0", " ")
    assert "The same work against itself took 0.96× to 1.05× as long" in about
    assert "kept 2 % of the CPU time for others" in about


def test_no_text_is_under_nine_pixels_on_a_telephone(show: Callable[..., Locator]) -> None:
    figure = show(full_figure(revealed=True), width=390, height=800)
    assert figure.evaluate(samples.SMALL) == []
    drawn = figure.locator("svg").evaluate_all("all => all.filter(e => e.getClientRects().length && "
                                               "e.getBoundingClientRect().width + 1 < e.viewBox.baseVal.width).length")
    assert drawn == 0, "a drawing is not scaled down: one unit is one pixel"


def test_a_prediction_by_mouse(show: Callable[..., Locator]) -> None:
    figure = show(explorer([samples.measurement()]))
    mouse = figure.page.mouse
    diamond = figure.locator(".diamond[data-workers='4']")
    assert "unset" in (diamond.get_attribute("class") or "")
    box = diamond.bounding_box()
    assert box is not None
    mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    mouse.down()
    mouse.move(box["x"], box["y"] + 40)
    mouse.move(box["x"], box["y"] + 80)
    mouse.up()
    mouse.move(box["x"], box["y"] + 160)
    value = float(diamond.get_attribute("data-speedup") or 0)
    assert 1.5 < value < 3.9 and "unset" not in (diamond.get_attribute("class") or "")
    assert figure.get_by_label("4 workers").input_value() == f"{value:g}"
    figure.get_by_role("button", name="Show the measurement").click()
    expect(figure.locator(".mark")).to_have_count(3)
    assert float(figure.locator(".diamond[data-workers='4']").get_attribute("data-speedup") or 0) == value
    verdict = figure.locator(".bpkit-verdict").inner_text()
    assert f"you predicted {value:.2f}×, measured 2.31×" in verdict
    assert ("too high" if value > 2.31 else "too low") in verdict


def test_a_prediction_by_keyboard_alone(show: Callable[..., Locator]) -> None:
    figure = show(explorer([samples.measurement()]))
    keys = figure.page.keyboard
    keys.press("Tab")
    assert figure.page.evaluate("document.activeElement.type") == "range"
    keys.press("ArrowLeft")
    expect(figure.locator("output")).to_have_text("2")
    keys.press("Tab")
    keys.type("1.9")
    keys.press("Tab")
    keys.type("2.2")
    ring = figure.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid", "the focus must be seen"
    keys.press("Tab")
    keys.press("Enter")
    verdict = figure.locator(".bpkit-verdict")
    expect(verdict).to_be_focused()
    expect(verdict).to_contain_text("With 2 workers you predicted 1.90×, measured 1.62×: 0.28× too high (17")
    expect(verdict).to_contain_text("With 4 workers you predicted 2.20×, measured 2.31×: 0.11× too low (5")
    keys.press("Tab")
    keys.press("Enter")
    expect(figure.locator(".mark")).to_have_count(0)


def test_every_control_keeps_its_keys_from_jupyterlab(show: Callable[..., Locator]) -> None:
    figure = show(full_figure())
    for control in figure.locator("input, select").all():
        assert control.get_attribute("data-lm-suppress-shortcuts") == "true"


def test_a_prediction_can_be_skipped(show: Callable[..., Locator]) -> None:
    figure = show(explorer([samples.measurement()]))
    figure.get_by_label("2 workers").fill("1.5")
    figure.get_by_role("button", name="Skip the prediction").click()
    expect(figure.locator(".mark")).to_have_count(3)
    expect(figure.locator(".diamond")).to_have_count(0)
    expect(figure.locator(".bpkit-verdict")).to_have_text("You made no prediction.")


def test_own_measurements_lie_over_the_recorded_ones(show: Callable[..., Locator]) -> None:
    figure = show(full_figure(revealed=True))
    legend = figure.locator(".bpkit-speedup .bpkit-legend")
    expect(legend).to_contain_text("recorded on sample machine")
    expect(legend).to_contain_text("yours, on this laptop")
    expect(figure.locator(".curve.recorded")).to_have_count(1)
    expect(figure.locator(".curve.own")).to_have_count(1)
    expect(figure.locator(".bpkit-parts .row.chosen .bar")).to_have_count(2)
    assert "2.31×" in words(figure) and "1.90×" in words(figure)


def test_switches_change_the_run(show: Callable[..., Locator]) -> None:
    figure = show(full_figure(revealed=True))
    figure.get_by_label("weak: fixed batch a worker").check()
    assert "3.10×" in words(figure) and "1.90×" not in words(figure), "own strong runs do not mix with weak ones"
    figure.get_by_label("Recorded run").select_option(index=1)
    expect(figure.locator("fieldset")).to_be_hidden()
    set_slider(figure, 3)
    assert "5.60×" in words(figure) and "Each worker sends 2.11 MB a step" in words(figure)
    assert "97 % test accuracy was not reached" in words(figure)


def test_simulated_points_look_different_and_say_so(show: Callable[..., Locator]) -> None:
    figure = show(explorer([samples.measurement(simulated=True)], revealed=True))
    fill, stroke = figure.locator(".mark").first.evaluate(
        "mark => [getComputedStyle(mark).fill, getComputedStyle(mark).stroke]")
    assert fill != stroke, "hollow, where measured points are solid"
    assert "simulated, not measured" in words(figure)
    expect(figure.locator(".bpkit-speedup .bpkit-legend")).to_contain_text("(simulated)")


def test_the_words_and_the_table_say_what_is_drawn(show: Callable[..., Locator]) -> None:
    figure = show(explorer([samples.measurement()], revealed=True))
    said = words(figure)
    for part in ("2.31×", "efficiency is 58 %", "1.82 ms", "1.31 ms compute", "0.22 ms waiting for a core",
                 "0.22 ms exposed communication", "0.07 ms idle", "0.15 ms of communication is hidden",
                 "not counted (slices in shared memory)", "payload is 1.2 MB", "140,800 samples a second",
                 "97 % test accuracy takes 218 ms (120 steps)"):
        assert part in said, part
    figure.get_by_text("The same as a table").click()
    table = figure.locator("table").last
    expect(table.locator("td.chosen").first).to_have_text("2.31×")
    assert table.locator("tbody tr").count() == 12
    figure.get_by_text("The timeline as a table").click()
    expect(figure.locator(".bpkit-timeline table tbody tr")).to_have_count(figure.locator(".event").count())


def test_a_page_without_a_kernel_says_how_to_measure(show: Callable[..., Locator]) -> None:
    figure = show(explorer([samples.measurement()], network=1, data=2, measure=print))
    expect(figure.get_by_role("button", name="Measure on this machine")).to_be_hidden()
    expect(figure.locator(".bpkit-measure")).to_contain_text("make lab")


def test_without_a_measurement_it_says_so(show: Callable[..., Locator]) -> None:
    figure = show(explorer())
    assert "no measurement yet" in words(figure)
    expect(figure.locator(".bpkit-parts")).to_be_hidden()


def test_views_of_one_model_move_together_and_models_do_not(show: Callable[..., Locator]) -> None:
    one, two = (explorer([samples.measurement()], revealed=True) for _ in range(2))
    page = show(one, two, views=2).page
    figures = page.locator(".bpkit-explorer")
    expect(figures).to_have_count(4)
    set_slider(figures.nth(0), 0)
    assert [figures.nth(i).locator("output").inner_text() for i in range(4)] == ["1", "1", "4", "4"]
    ids = page.evaluate("[...document.querySelectorAll('.bpkit-explorer [id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(("dark", "theme", "expected"), [
    (False, "", "light"), (True, "", "dark"), (True, ' data-theme="light"', "light"),
    (False, ' data-theme="dark"', "dark"), (False, ' data-jp-theme-light="false"', "dark"),
])
def test_colours_follow_the_theme(show: Callable[..., Locator], dark: bool, theme: str, expected: str) -> None:
    figure = show(explorer([samples.measurement()]), dark=dark, theme=theme)
    red = int(re.findall(r"\d+", figure.evaluate("figure => getComputedStyle(figure).color"))[0])
    assert (red > 200) == (expected == "dark")


@pytest.mark.parametrize("revealed", [False, True])
def test_nothing_leaves_a_narrow_screen(show: Callable[..., Locator], revealed: bool) -> None:
    figure = show(full_figure(revealed=revealed), width=390, height=800)
    assert figure.evaluate(OVERFLOWING) == []
    assert figure.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_it_is_redrawn_for_a_new_width(show: Callable[..., Locator]) -> None:
    figure = show(full_figure(revealed=True), width=1000)
    before = figure.locator(".bpkit-timeline > svg").get_attribute("width")
    figure.page.set_viewport_size({"width": 500, "height": 800})
    expect(figure.locator(".bpkit-timeline > svg")).not_to_have_attribute("width", before or "")
    assert figure.evaluate(OVERFLOWING) == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("revealed", [False, True])
def test_axe_finds_nothing(show: Callable[..., Locator], revealed: bool, dark: bool) -> None:
    figure = show(full_figure(revealed=revealed), dark=dark)
    for summary in figure.locator("summary:visible").all():
        summary.click()
    found = Axe().run(figure.page)
    assert found.violations_count == 0, found.generate_report()


def test_a_figure_on_a_page_that_is_no_notebook(tmp_path: Path, page: Page) -> None:
    (tmp_path / "loader.js").write_text(samples.LOADER.read_text(encoding="utf-8"), encoding="utf-8")
    figures = fragment(explorer([samples.measurement()], revealed=True), loader="loader.js")
    # The loader named twice must not draw twice.
    text = f'<!doctype html><meta charset="utf-8"><title>t</title><script src="loader.js"></script>{figures}'
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    expect(page.locator(".bpkit-explorer .mark")).to_have_count(3)
    expect(page.locator(".bpkit-explorer")).to_have_count(1)


def test_built_pages_draw_it(book_url: str, pages_with: Find, open_page: Open) -> None:
    for name in pages_with(Explorer):
        page = open_page()
        page.goto(f"{book_url}/{name}")
        for figure in page.locator(".bpkit-explorer:not(.bpkit-merging)").all():
            skip = figure.get_by_role("button", name="Skip the prediction")
            if skip.is_visible():
                skip.click()
            expect(figure.locator(".mark").first).to_be_visible()
            before = (figure.locator(".guide").get_attribute("x1"), words(figure))
            set_slider(figure, 0)
            assert figure.locator(".guide").get_attribute("x1") != before[0]
            assert words(figure) != before[1] and "1 worker " in words(figure)


def test_built_pages_fit_a_narrow_screen(book_url: str, pages_with: Find, open_page: Open) -> None:
    for name in pages_with(Explorer):
        page = open_page(width=390, height=800)
        page.goto(f"{book_url}/{name}")
        figure = page.locator(".bpkit-explorer:not(.bpkit-merging)").first
        figure.get_by_role("button", name="Skip the prediction").click()
        assert figure.evaluate(OVERFLOWING) == []
