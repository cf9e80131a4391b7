"""Sentences that a cell writes."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

from bpkit.course import how_long, say
from bpkit.measure.comparison import Ratio


def test_outside_a_notebook_a_sentence_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    say("""
        The ring takes *1.42* times as long.
        So be it.
    """)
    assert capsys.readouterr().out == "The ring takes *1.42* times as long.\nSo be it.\n"


def test_in_a_notebook_a_sentence_is_markdown() -> None:
    cell = nbformat.v4.new_code_cell("import bpkit as bp\nbp.course.say(f'It takes **{1 + 1}** steps.')")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data"
    assert output.data == {"text/markdown": "It takes **2** steps.", "text/plain": "It takes **2** steps."}


def test_two_times_are_compared_in_words_also_where_they_are_not_resolved() -> None:
    assert how_long("a", Ratio(1.5, 1.25, 1.75), "b") == "a takes 1.50 [1.25, 1.75] times as long as b"
    unresolved = how_long("a", Ratio(1.1, 0.75, 1.25), "b")
    assert unresolved.startswith("the times of a and b are not resolved (ratio 1.10 [0.75, 1.25]")
    assert "takes" not in unresolved
