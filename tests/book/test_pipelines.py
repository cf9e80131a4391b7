"""The pipeline explorer as a reader meets it: predicted, walked through, in both themes, on a narrow screen."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import explorer_samples as samples
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, expect
from test_explorer import OVERFLOWING, colours

from bpkit.course.figures.pipelines import Pipelines, pipelines
from bpkit.plan.action import LOOKS, VERBS

Open = Callable[..., Page]
MEASUREMENTS = samples.ROOT / "book" / "measurements"


@cache
def films() -> list[dict[str, Any]]:
    """What is simulated, once for all tests."""
    return pipelines().films


def made(schedule: str = "gpipe", workers: int = 4, microbatches: int = 8, *, revealed: bool = True,
         recorded: bool = True, **traits: Any) -> Pipelines:
    """A figure as `pipelines` makes it, without simulating all again."""
    runs = [samples.json.loads((MEASUREMENTS / "pipelines-two-core-cpu.json").read_text())] if recorded else []
    return Pipelines(print, films=films(), schedule=schedule, workers=workers, microbatches=microbatches, recorded=runs,
                     skipped=revealed, **traits)


@pytest.fixture
def show(tmp_path: Path, open_page: Open) -> Callable[..., Locator]:
    """Open a page with the given figures from a file, without any server; return the first figure."""

    def make(*figures: Any, views: int = 1, theme: str = "", **options: Any) -> Locator:
        page = open_page(**options)
        page.goto(samples.write_page(tmp_path, *figures, views=views, theme=theme).as_uri())
        figure = page.locator(".bpkit-pipelines").first
        expect(figure.locator(".bpkit-words p").first).to_be_visible()
        return figure

    return make


def said(figure: Locator, part: str = ".bpkit-words") -> str:
    """The words in a part of the figure."""
    return figure.locator(part).inner_text().replace("\u00a0", " ")


def of(schedule: str, p: int, m: int) -> dict[str, Any]:
    """One schedule of the figure."""
    return next(one for one in films() if (one["name"], one["p"], one["m"]) == (schedule, p, m))


def drawn(figure: Locator, kind: str = "simulated") -> list[tuple[str, str, float, float]]:
    """Rank, cell, left edge and width of each drawn pass."""
    return [tuple(row) for row in figure.locator(f".pass.{kind}").evaluate_all(
        "all => all.map(g => [g.dataset.rank, g.dataset.cell, +g.firstChild.getAttribute('x'), "
        "+g.firstChild.getAttribute('width')])")]


@pytest.mark.parametrize("schedule", ["gpipe", "zero_bubble_h1"])
def test_passes_have_the_colours_of_their_legend(show: Callable[..., Locator], schedule: str) -> None:
    """I and W have colours of their own, those of every other figure."""
    found = colours(show(made(schedule)).locator(".bpkit-lanes"), ".pass.* .body")
    assert {*found} - {"UPDATE"} == ({"F", "B"} if schedule == "gpipe" else {"F", "I", "W"})
    for kind, (swatch, drawn) in found.items():
        red, green, blue = (int(LOOKS[VERBS[kind].look][0][at : at + 2], 16) for at in (1, 3, 5))
        assert swatch == drawn == f"rgb({red}, {green}, {blue})", kind
    assert len({drawn for _, drawn in found.values()}) == len(found)


def test_passes_are_drawn_where_the_simulation_puts_them(show: Callable[..., Locator]) -> None:
    figure = show(made("zero_bubble_h1", 3, 4, recorded=False))
    names = [*dict.fromkeys(one["name"] for one in films())]
    for schedule, p, m in (("zero_bubble_h1", 3, 4), ("interleaved", 3, 4), ("naive", 3, 4)):
        figure.locator("select").select_option(index=names.index(schedule))
        one, cells = of(schedule, p, m), drawn(figure)
        wanted = [(str(rank), cell, one["unit"] * begin, one["unit"] * (2 if "B" in cell else 1))
                  for rank, row in enumerate(one["rows"])
                  for cell, begin in zip(row.split(), one["begin"][rank], strict=True)]
        assert [cell[:2] for cell in cells] == [cell[:2] for cell in wanted]
        scale = cells[0][3] / wanted[0][3]
        for have, want in zip(cells, wanted, strict=True):
            assert have[2] - cells[0][2] == pytest.approx(scale * want[2], abs=0.1)
            assert have[3] == pytest.approx(scale * want[3], abs=0.1)


def test_the_sliders_choose_ranks_and_microbatches(show: Callable[..., Locator]) -> None:
    figure = show(made("gpipe"))
    ranks, cuts = figure.locator("input[type=range]").all()
    ranks.fill("1")
    cuts.fill("2")
    assert [slider.get_attribute("aria-valuetext") for slider in (ranks, cuts)] == ["2 ranks", "3 microbatches"]
    expect(figure.locator(".pass.simulated")).to_have_count(12)
    assert "GPipe, 2 ranks, 3 microbatches, simulated: a step takes 12 units" in said(figure)
    assert "(p − 1)(F + B), gives 3 units" in said(figure)


def test_the_answer_stays_hidden_until_it_is_asked_for(show: Callable[..., Locator]) -> None:
    figure = show(made("gpipe", revealed=False))
    expect(figure.locator(".pass")).to_have_count(0)
    expect(figure.locator("table")).to_have_count(0)
    assert "33" not in figure.inner_text() and "hidden until you show it" in said(figure)
    figure.get_by_role("button", name="Show the timeline").click()
    expect(figure.get_by_role("alert").first).to_contain_text("at least one prediction")
    figure.get_by_label("units a step").fill("36")
    figure.get_by_label("bubble, %").fill("27")
    figure.get_by_role("button", name="Show the timeline").click()
    verdict = said(figure, ".bpkit-verdict")
    assert "You predicted 36 units; a step takes 33 units: 3 units too many." in verdict
    assert "You predicted 27 % of bubble; it is 27 %: right." in verdict
    expect(figure.locator(".pass.simulated")).to_have_count(64)
    expect(figure.locator(".bpkit-compare .beside rect.work").first).to_be_visible()
    assert figure.locator(".bpkit-compare").get_by_text("predict first").count() == 6
    # Another schedule asks anew, and the first one's answer stays.
    figure.locator("select").select_option("1F1B")
    expect(figure.locator(".bpkit-lanes")).to_be_hidden()
    assert figure.get_by_label("units a step").input_value() == ""
    figure.locator("select").select_option("GPipe")
    assert "3 units too many" in said(figure, ".bpkit-verdict")
    figure.get_by_role("button", name="Predict again").click()
    expect(figure.locator(".bpkit-lanes")).to_be_hidden()
    figure.get_by_role("button", name="Skip the predictions").click()
    figure.locator("select").select_option("naive split")
    expect(figure.locator(".bpkit-lanes")).to_be_visible()


def test_pointing_says_what_a_pass_waits_for(show: Callable[..., Locator]) -> None:
    figure = show(made("gpipe", 2, 3))
    readout = figure.locator(".bpkit-readout")
    assert readout.get_attribute("role") == "status"
    expect(readout).to_contain_text("Point at a pass")
    figure.locator(".pass.simulated[data-cell='0B0']").hover()
    expect(readout).to_have_text(
        "0B0 on rank 0: backward, whole, of microbatch 0 on stage 0. Simulated from 6 to 8. It waited for the message "
        "of 1B0 on rank 1, which ended at 6; its rank had nothing to do for 3 units.")
    expect(figure.locator(".frame.need")).to_have_attribute("data-cell", "1B0")
    expect(figure.locator(".message")).to_have_count(1)
    figure.locator(".pass.simulated[data-cell='1F1']").hover()
    expect(readout).to_contain_text("its own rank, busy with 1F0 until 2. The message that it needs, of 0F1 on rank 0")
    expect(figure.locator(".frame.before")).to_have_attribute("data-cell", "1F0")
    figure.locator(".pass.simulated[data-cell='0F0']").click()
    expect(readout).to_contain_text("the rank's first pass and waits for nothing")
    expect(figure.locator(".frame.need")).to_have_count(0)


def test_a_measured_pass_answers_a_click_in_milliseconds_and_units(show: Callable[..., Locator]) -> None:
    figure = show(made("one_f_one_b", 2, 4))
    run = samples.json.loads((MEASUREMENTS / "pipelines-two-core-cpu.json").read_text())
    point = next(one for one in run["points"] if one["plan"] == "one_f_one_b(2, 4)")
    rank, _, begin, end, _ = next(event for event in point["timeline"] if event[1] == "1B0")
    figure.locator(".pass.measured[data-cell='1B0']").click()
    answer = said(figure, ".bpkit-readout")
    assert answer.startswith(f"1B0 on rank {rank}, measured: from {begin / 1e3:.3g}")
    assert f"to {end / 1e3:.3g}" in answer and "Simulated from 2 to 4." in answer
    expect(figure.locator(".frame.looked")).to_have_attribute("data-cell", "1B0")
    looked, twin = (figure.locator(f".frame.{name}").bounding_box() for name in ("looked", "twin"))
    assert looked and twin and looked["y"] > twin["y"], "the measured one lies under the simulated one"
    expect(figure.locator(".bpkit-lanes svg text").last).to_contain_text("1 unit is")


def test_memory_messages_and_milliseconds_stand_side_by_side(show: Callable[..., Locator]) -> None:
    figure = show(made("gpipe", 4, 8))
    rows = [row.split("\t") for row in said(figure, ".bpkit-compare tbody").split("\n")]
    assert [row[0].strip() for row in rows][:3] == ["naive split", "GPipe", "1F1B"]
    by = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    sends = {one["name"]: one["messages"] for one in films() if (one["p"], one["m"]) == (4, 8)}
    assert by["GPipe"][-2:] == ["8", "48"] and by["1F1B"][-2:] == ["4", "48"]
    assert by["interleaved 1F1"[:15] + "B"][-1] == str(sends["interleaved"]) and sends["interleaved"] == 2 * 7 * 8
    run = samples.json.loads((MEASUREMENTS / "pipelines-two-core-cpu.json").read_text())
    point = next((one for one in run["points"] if one["plan"] == "gpipe(4, 8)"), None)
    assert by["GPipe"][1] == ("–" if point is None else f"{1e3 * point['step_s']['median']:.3g} ms")
    assert "All ranks together send 48 messages a step." in said(figure)


def test_which_measurements_exist_is_said(show: Callable[..., Locator]) -> None:
    figure = show(made("gpipe", 3, 3))
    about = said(figure, ".bpkit-choices .bpkit-about")
    run = samples.json.loads((MEASUREMENTS / "pipelines-two-core-cpu.json").read_text())
    plans = {one["plan"] for one in run["points"]}
    for p in range(1, 5):
        cuts = [str(m) for m in range(1, 9) if f"gpipe({p}, {m})" in plans]
        wanted = f"{p} rank{'s' * (p > 1)} with {', '.join(cuts)} microbatches"
        assert (wanted in about) == bool(cuts)
    assert "no measurement of this schedule" in said(show(made(recorded=False)), ".bpkit-choices .bpkit-about")


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("schedule", ["interleaved", "gpipe"])
def test_nothing_is_cut_off_and_no_text_is_under_nine_pixels(
    show: Callable[..., Locator], schedule: str, width: int
) -> None:
    """Neither the simulated step nor the columns of the tables, which have no sideways scroll at 1440."""
    figure = show(made(schedule, 4, 8), width=width)
    lanes = figure.locator(".bpkit-lanes .bpkit-scroll")
    assert lanes.evaluate("box => box.scrollWidth <= box.clientWidth")
    if width == 1440:
        boxes = figure.locator(".bpkit-facts .bpkit-scroll, .bpkit-compare .bpkit-scroll")
        assert boxes.evaluate_all("all => all.every(box => box.scrollWidth <= box.clientWidth)")
    assert figure.evaluate(samples.SMALL) == [] and figure.evaluate(OVERFLOWING) == []


def test_by_keyboard_alone(show: Callable[..., Locator]) -> None:
    figure = show(made("gpipe", 2, 3, revealed=False))
    keys = figure.page.keyboard
    for _ in range(3):  # schedule, ranks, microbatches
        keys.press("Tab")
    keys.press("ArrowLeft")
    expect(figure.locator(".bpkit-slider output").nth(1)).to_have_text("2")
    keys.press("Tab")
    keys.type("9")
    ring = figure.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid", "the focus must be seen"
    keys.press("Tab")
    keys.press("Tab")
    keys.press("Enter")
    verdict = figure.locator(".bpkit-verdict")
    expect(verdict).to_be_focused()
    expect(verdict).to_contain_text("You predicted 9 units; a step takes 9 units: right.")
    for _ in range(3):  # predict again, the next step, the timeline
        keys.press("Tab")
    box, readout = figure.locator(".bpkit-lanes .bpkit-scroll"), figure.locator(".bpkit-readout")
    expect(box).to_be_focused()
    walk = [("ArrowRight", "0F0"), ("ArrowRight", "0F1"), ("ArrowDown", "1F0"), ("End", "1B1"), ("ArrowRight", "1B1"),
            ("ArrowLeft", "1B0"), ("ArrowUp", "0B0"), ("Home", "0F0"), ("ArrowUp", "0F0")]
    for key, cell in walk:
        keys.press(key)
        expect(figure.locator(".frame.looked")).to_have_attribute("data-cell", cell)
        assert said(figure, ".bpkit-readout").startswith(f"{cell} on rank ")
    keys.press("Escape")
    expect(figure.locator(".frame")).to_have_count(0)
    expect(readout).to_contain_text("Point at a pass")
    for control in figure.locator("input, select, .bpkit-lanes .bpkit-scroll").all():
        assert control.get_attribute("data-lm-suppress-shortcuts") == "true"


def test_the_measured_step_lies_under_the_simulated_one(show: Callable[..., Locator]) -> None:
    figure = show(made("one_f_one_b", 2, 4))
    run = samples.json.loads((MEASUREMENTS / "pipelines-two-core-cpu.json").read_text())
    point = next(one for one in run["points"] if one["plan"] == "one_f_one_b(2, 4)")
    simulated, measured = drawn(figure), drawn(figure, "measured")
    assert len(measured) == len(point["timeline"])
    unit = simulated[0][3]  # pixels of a forward
    for have, (rank, cell, begin, end, _) in zip(measured, point["timeline"], strict=True):
        assert have[:2] == (str(rank), cell)
        assert have[2] - simulated[0][2] == pytest.approx(unit * begin / 1e6 / point["unit_s"], abs=0.5)
        assert have[3] == pytest.approx(max(0.8, unit * (end - begin) / 1e6 / point["unit_s"]), abs=0.5)
    words = said(figure)
    assert f"{1e3 * point['step_s']['median']:.3g} ms" in words and run["machine"]["name"] in words
    assert "waiting for a core" in words and "with a core for each rank" in words
    assert f"torch {run['machine']['torch']}" in said(figure, ".bpkit-facts")
    figure.locator("input[type=range]").first.fill("2")
    expect(figure.locator(".pass.measured")).to_have_count(0)
    assert "There is no measurement of this plan." in said(figure)


def test_with_more_ranks_than_cores_the_wait_for_a_core_is_drawn(show: Callable[..., Locator]) -> None:
    figure = show(made("one_f_one_b", 4, 8))
    assert figure.locator(".pass.measured .core").count() > 0
    expect(figure.locator(".bpkit-lanes .bpkit-legend")).to_contain_text("waiting for a core")
    expect(figure.locator(".bpkit-compare .beside.chosen rect.core")).to_have_count(1)


def test_a_run_of_the_readers_own_takes_the_place_of_the_recorded_one(show: Callable[..., Locator]) -> None:
    own = samples.json.loads((MEASUREMENTS / "pipelines-two-core-cpu.json").read_text())
    own["machine"]["name"] = "this laptop"
    figure = show(made("one_f_one_b", 2, 4, own=[own]))
    assert "yours, on this laptop" in said(figure)
    expect(figure.locator(".caption").nth(1)).to_contain_text("yours, on this laptop")


def test_the_next_step_follows_without_a_gap(show: Callable[..., Locator]) -> None:
    figure = show(made("zero_bubble_h2", 3, 6, recorded=False))
    expect(figure.locator(".pass.next")).to_have_count(0)
    figure.get_by_label("Show the next step too").check()
    expect(figure.locator(".pass.next")).to_have_count(54)
    expect(figure.locator(".pass.simulated")).to_have_count(54)


def test_the_words_and_the_tables_say_what_is_drawn(show: Callable[..., Locator]) -> None:
    figure = show(made("zb_v", 2, 4))
    one = of("zb_v", 2, 4)
    words = said(figure)
    for part in ("a step takes 12 units", "of which 12 are work and 0 are bubble", "by rank: 2, 2"):
        assert part in words, part
    rows = [[cell.strip() for cell in row.split("\t")] for row in said(figure, ".bpkit-facts tbody").split("\n")]
    assert rows[0][:3] == ["a step of many, units", "12", "12"]
    figure.get_by_text("The timeline as a table").click()
    table = figure.locator("details table tbody tr")
    expect(table).to_have_count(sum(len(row.split()) for row in one["rows"]))
    first = table.nth(len(one["rows"][0].split())).inner_text().split("\t")
    assert [text.strip() for text in first[:6]] == ["1F0", "1", "0.5", "1", "0F0 on rank 0", "0.5"]


def test_views_of_one_model_move_together_and_models_do_not(show: Callable[..., Locator]) -> None:
    page = show(made("gpipe", 2, 3), made("gpipe", 2, 3), views=2).page
    figures = page.locator(".bpkit-pipelines")
    figures.nth(0).locator("input[type=range]").nth(1).fill("0")
    outputs = [figures.nth(i).locator(".bpkit-slider output").nth(1).inner_text() for i in range(4)]
    assert outputs == ["1", "1", "3", "3"]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("revealed", [False, True])
def test_axe_finds_nothing(show: Callable[..., Locator], revealed: bool, dark: bool) -> None:
    figure = show(made("interleaved", 4, 4, revealed=revealed, ahead=True), dark=dark)
    if revealed:
        figure.get_by_text("The timeline as a table").click()
        figure.locator(".pass.simulated").nth(9).hover()
    red = int(re.findall(r"\d+", figure.evaluate("figure => getComputedStyle(figure).color"))[0])
    assert (red > 200) == dark
    found = Axe().run(figure.page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("revealed", [False, True])
def test_nothing_leaves_a_narrow_screen(show: Callable[..., Locator], revealed: bool) -> None:
    figure = show(made("zb_v", 4, 8, revealed=revealed), width=390, height=800)
    if revealed:
        figure.get_by_text("The timeline as a table").click()
        box = figure.locator(".bpkit-lanes .bpkit-scroll")
        box.press("ArrowDown")
        box.press("End")
        looked, around = figure.locator(".frame.looked").bounding_box(), box.bounding_box()
        assert looked and around
        assert around["x"] <= looked["x"] < around["x"] + around["width"], "scrolled to where it is"
    assert figure.evaluate(OVERFLOWING) == []
    assert figure.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_page_without_a_kernel_says_how_to_measure(show: Callable[..., Locator]) -> None:
    figure = show(made())
    expect(figure.get_by_role("button", name="Measure on this machine")).to_be_hidden()
    expect(figure.locator(".bpkit-measure")).to_contain_text("make lab")


def test_built_pages_draw_it(book_url: str, pages_with: Callable[[type], list[str]], open_page: Open) -> None:
    for name in pages_with(Pipelines):
        for width in (1280, 390):
            page = open_page(width=width)
            page.goto(f"{book_url}/{name}")
            figure = page.locator(".bpkit-pipelines").first
            skip = figure.get_by_role("button", name="Skip the predictions")
            if skip.is_visible():
                skip.click()
            before = (len(drawn(figure)), said(figure))
            assert before[0] > 0
            figure.locator("input[type=range]").nth(1).fill("0")
            assert (len(drawn(figure)), said(figure)) != before
            assert figure.evaluate(OVERFLOWING) == []
