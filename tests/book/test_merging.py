"""The merging explorer as a reader meets it: stepped through by mouse and keyboard, in both themes, also narrow."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import explorer_samples as samples
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, expect
from test_explorer import OVERFLOWING

from bpkit.course.figures.merging import Merging, merging

Open = Callable[..., Page]


@pytest.fixture
def show(tmp_path: Path, open_page: Open) -> Callable[..., Locator]:
    """Open a page with the given figures from a file, without any server; return the first figure."""

    def make(*figures: Any, views: int = 1, theme: str = "", **options: Any) -> Locator:
        page = open_page(**options)
        page.goto(samples.write_page(tmp_path, *figures, views=views, theme=theme).as_uri())
        figure = page.locator(".bpkit-merging").first
        expect(figure.locator(".cell").first).to_be_visible()
        return figure

    return make


def words(figure: Locator) -> str:
    """The text equivalent that stands under the figure."""
    return figure.locator(".bpkit-words").inner_text().replace("\u00a0", " ")


def press(figure: Locator, name: str, times: int = 1) -> None:
    """Click a button of the figure."""
    for _ in range(times):
        # Forced, since at the ends a button says that it can do nothing.
        figure.get_by_role("button", name=name, exact=True).click(force=True)


def drawn(figure: Locator) -> list[str]:
    """Who is in each part of each rank, by the places that are filled, a string a rank."""
    held: dict[tuple[int, int], str] = {}
    for cell in figure.locator(".cell").all():
        marks = cell.locator("rect.contribution")
        members = "".join(mark.get_attribute("data-of") or "" for mark in marks.all())
        held[int(cell.get_attribute("data-rank") or 0), int(cell.get_attribute("data-part") or 0)] = members
    ranks = sorted({rank for rank, _ in held})
    return [" ".join(held[key] for key in sorted(held) if key[0] == rank) for rank in ranks]


def frames(figure: Any, name: str, workers: int) -> list[list[str]]:
    """What the plan says is held, before the first step and after each."""
    found = next(film["frames"] for film in figure.films if (film["name"], film["workers"]) == (name, workers))
    return [frame.split("|") for frame in found]


def test_stepping_changes_what_is_drawn(show: Callable[..., Locator]) -> None:
    made = merging("ring", 3, revealed=True)
    figure, wanted = show(made), frames(made, "ring", 3)
    assert drawn(figure) == wanted[0]
    expect(figure.locator(".move")).to_have_count(0)
    for step in range(1, len(wanted)):
        press(figure, "Forward")
        assert drawn(figure) == wanted[step] != wanted[step - 1]
        expect(figure.locator(".move")).to_have_count(3)
        expect(figure.locator(".cell.changed")).to_have_count(3)
    expect(figure.locator(".cell.whole")).to_have_count(9)
    press(figure, "Forward")
    assert drawn(figure) == wanted[-1], "there is no step after the last"
    press(figure, "Back", 3)
    assert drawn(figure) == wanted[1]
    press(figure, "To the start")
    assert drawn(figure) == wanted[0]
    press(figure, "Back")
    assert drawn(figure) == wanted[0]


def test_arrows_run_from_the_sender_to_the_receiver(show: Callable[..., Locator]) -> None:
    figure = show(merging("server", 3, revealed=True))
    press(figure, "Forward", 4)
    move = figure.locator(".move")
    expect(move).to_have_count(1)
    assert [move.get_attribute(f"data-{end}") for end in ("from", "to", "parts")] == ["0", "2", "0:1"]
    top = {rank: float(figure.locator(f".cell[data-rank='{rank}'] .frame").first.get_attribute("y") or 0)
           for rank in (0, 2)}
    shaft = move.locator(".shaft")
    assert top[0] < float(shaft.get_attribute("y1") or 0) < float(shaft.get_attribute("y2") or 0) < top[2]


def test_the_answer_stays_hidden_until_it_is_asked_for(show: Callable[..., Locator]) -> None:
    figure = show(merging("ring", 4))
    expect(figure.locator(".bpkit-stepper")).to_be_hidden()
    assert "6" not in words(figure) and "hidden until you show them" in words(figure)
    press(figure, "Show the steps")
    expect(figure.get_by_role("alert")).to_contain_text("at least one prediction")
    expect(figure.locator(".bpkit-stepper")).to_be_hidden()
    figure.get_by_label("steps", exact=True).fill("7")
    figure.get_by_label("bytes sent by rank 0").fill("5040")
    press(figure, "Show the steps")
    verdict = figure.locator(".bpkit-verdict")
    expect(verdict).to_contain_text("You predicted 7 steps; it takes 6: 1 too many.")
    expect(verdict).to_contain_text("rank 0 sends 5,040 bytes; it sends 5,040: right.")
    expect(figure.locator(".bpkit-stepper")).to_be_visible()
    # Another choice asks anew, and the first one's answer stays.
    figure.get_by_label("Algorithm").select_option("binary tree")
    expect(figure.locator(".bpkit-stepper")).to_be_hidden()
    assert figure.get_by_label("steps", exact=True).input_value() == ""
    figure.get_by_label("Algorithm").select_option("ring")
    expect(verdict).to_contain_text("1 too many")
    press(figure, "Predict again")
    expect(figure.locator(".bpkit-stepper")).to_be_hidden()
    press(figure, "Skip this prediction")
    expect(verdict).to_contain_text("It takes 6 steps, and rank 0 sends 5,040")
    # To skip one prediction spoils no other.
    figure.get_by_label("Algorithm").select_option("star")
    expect(figure.locator(".bpkit-stepper")).to_be_hidden()


def test_by_keyboard_alone(show: Callable[..., Locator]) -> None:
    figure = show(merging("ring", 4))
    keys = figure.page.keyboard
    keys.press("Tab")
    keys.type("ha")
    keys.press("Tab")
    keys.press("ArrowLeft")
    expect(figure.locator(".bpkit-slider output")).to_have_text("3")
    keys.press("Tab")
    keys.type("3")
    ring = figure.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid", "the focus must be seen"
    keys.press("Tab")
    keys.press("Tab")
    keys.press("Enter")
    verdict = figure.locator(".bpkit-verdict")
    expect(verdict).to_be_focused()
    expect(verdict).to_contain_text("You predicted 3 steps; it takes 4: 1 too few.")
    for _ in range(5):  # predict again, to the start, back, play, forward
        keys.press("Tab")
    keys.press("Enter")
    keys.press("Enter")
    expect(figure.locator(".bpkit-stepper output")).to_have_text("2 / 4")
    keys.press("Tab")
    keys.press("End")
    expect(figure.locator(".bpkit-stepper output")).to_have_text("4 / 4")
    expect(figure.locator(".cell.whole")).to_have_count(6)
    keys.press("ArrowLeft")
    slider = figure.locator(".bpkit-stepper input")
    expect(slider).to_be_focused()
    assert slider.get_attribute("aria-valuetext") == "after step 3 of 4"
    for control in figure.locator("input, select").all():
        assert control.get_attribute("data-lm-suppress-shortcuts") == "true"


def test_play_goes_to_the_end_and_pause_stops(show: Callable[..., Locator]) -> None:
    figure = show(merging("tree", 2, revealed=True))
    output = figure.locator(".bpkit-stepper output")
    press(figure, "Play")
    expect(output).to_have_text("1 / 2")
    press(figure, "Pause")
    figure.page.wait_for_timeout(1800)
    expect(output).to_have_text("1 / 2")
    press(figure, "To the start")
    press(figure, "Play")
    expect(output).to_have_text("2 / 2")
    expect(figure.get_by_role("button", name="Play")).to_be_visible()


def test_the_words_and_the_table_say_what_is_drawn(show: Callable[..., Locator]) -> None:
    figure = show(merging("ring", 4, revealed=True))
    press(figure, "Forward", 2)
    said = words(figure)
    for part in ("Step 2 of 6.",
                 "Rank 0 sends part 2 of 4 (840 B) to rank 1, which adds it: now the sum of ranks 0, 1, 3.",
                 "Sent so far: rank 0 1,680 B, rank 1 1,680 B"):
        assert part in said, part
    assert figure.locator(".bpkit-words").get_attribute("role") == "status"
    title = figure.locator(".cell[data-rank='1'][data-part='2'] title").text_content()
    assert title == "rank 1, part 2 of 4: sum of ranks 0, 1, 3"
    figure.get_by_text("The same as a table").click()
    table = figure.locator("table")
    expect(table.locator("th[scope=col]").first).to_have_text("rank")
    for rank, row in enumerate(drawn(figure)):
        said_there = table.locator("tbody tr").nth(rank).locator("td").all_inner_texts()[:-1]
        assert [re.sub(r"\D", "", text) for text in said_there] == row.split()
    press(figure, "Forward", 4)
    assert "Every rank now holds the whole sum." in words(figure) and "keep" not in words(figure)
    assert "puts it in place of its own" in words(figure)


def test_every_algorithm_ends_with_the_whole_sum_everywhere(show: Callable[..., Locator]) -> None:
    made = merging("server", 6, revealed=True)
    figure = show(made)
    select = figure.get_by_label("Algorithm")
    names = select.locator("option").all_inner_texts()
    assert len(names) == 7
    for name in names:
        select.select_option(name)
        expect(figure.locator(".bpkit-slider output")).to_have_text("6")
        figure.locator(".bpkit-stepper input").press("End")
        cells = figure.locator(".cell")
        assert figure.locator(".cell.whole").count() == cells.count() >= 6


def test_a_hierarchy_takes_even_numbers_only(show: Callable[..., Locator]) -> None:
    figure = show(merging("ring", 5, revealed=True))
    figure.get_by_label("Algorithm").select_option("hierarchy of two hosts")
    expect(figure.locator(".bpkit-stops span")).to_have_count(4)
    expect(figure.locator(".bpkit-slider output")).to_have_text("4")


def test_views_of_one_model_move_together_and_models_do_not(show: Callable[..., Locator]) -> None:
    page = show(*(merging("ring", 3, revealed=True) for _ in range(2)), views=2).page
    figures = page.locator(".bpkit-merging")
    press(figures.nth(0), "Forward")
    shown = [figures.nth(i).locator(".bpkit-stepper output").inner_text() for i in range(4)]
    assert shown == ["1 / 4", "1 / 4", "0 / 4", "0 / 4"]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("revealed", [False, True])
def test_axe_finds_nothing(show: Callable[..., Locator], revealed: bool, dark: bool) -> None:
    figure = show(merging("ring", 4, revealed=revealed), dark=dark)
    if revealed:
        press(figure, "Forward", 2)
    figure.get_by_text("The same as a table").click()
    red = int(re.findall(r"\d+", figure.evaluate("figure => getComputedStyle(figure).color"))[0])
    assert (red > 200) == dark
    found = Axe().run(figure.page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("revealed", [False, True])
def test_nothing_leaves_a_narrow_screen(show: Callable[..., Locator], revealed: bool) -> None:
    figure = show(merging("ring", 8, revealed=revealed), width=390, height=800)
    if revealed:
        press(figure, "Forward", 9)
        figure.get_by_text("The same as a table").click()
    assert figure.evaluate(OVERFLOWING) == []
    assert figure.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_built_pages_step_through_it(book_url: str, pages_with: Callable[[type], list[str]], open_page: Open) -> None:
    for name in pages_with(Merging):
        for width in (1280, 390):
            page = open_page(width=width)
            page.goto(f"{book_url}/{name}")
            figure = page.locator(".bpkit-merging").first
            expect(figure.locator(".bpkit-stepper")).to_be_hidden()
            press(figure, "Skip this prediction")
            before = (drawn(figure), words(figure))
            press(figure, "Forward")
            assert drawn(figure) != before[0] and words(figure) != before[1]
            assert figure.evaluate(OVERFLOWING) == []
