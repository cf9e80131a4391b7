"""Sentences that a cell writes."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

from bpkit.course import say


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
