"""A plugin of pytest that runs a notebook once: nbval compares its outputs, and then its widget states are compared.

    python -m pytest -p nbval_widgets chapters/NAME.ipynb ...

nbval does not look at widgets.  Here each notebook has a last test, `widgets`: every widget that an output shows has a
saved state, and the saved states are those of this run.  A field that holds a measurement is left out of the
comparison where the notebook names it: its metadata holds {"bpkit": {"measured": ["field", ...]}}.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nbclient import NotebookClient
from nbval.plugin import IPyNbFile

import notebooks


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Every notebook that is named; nbval's own collector stays out as long as nobody asks for --nbval."""
    return Notebook.from_parent(parent, path=file_path) if file_path.suffix == ".ipynb" else None


class Notebook(IPyNbFile):  # type: ignore[misc]
    """A notebook whose kernel's messages about widgets are kept."""

    def collect(self) -> Iterator[pytest.Item]:
        """The cells, then the widgets."""
        self.cells = list(super().collect())
        self.client = NotebookClient(copy.deepcopy(self.nb))
        yield from self.cells
        yield Widgets.from_parent(self, name="widgets")

    def get_kernel_message(self, timeout: float | None = None, stream: str = "iopub") -> Any:
        """The next message, as nbval wants it."""
        message = super().get_kernel_message(timeout, stream)
        if message["msg_type"].startswith("comm"):
            self.client.handle_comm_msg([], message, 0)
        return message

    def fresh(self) -> Any:
        """The notebook as this run would save it."""
        fresh = self.client.nb
        for cell, item in zip((cell for cell in fresh.cells if cell.cell_type == "code"), self.cells, strict=True):
            cell.outputs = getattr(item, "test_outputs", [])
        fresh.metadata.pop("widgets", None)
        self.client.set_widgets_metadata()
        return notebooks.normalise(fresh)


class Widgets(pytest.Item):
    """The comparison of a notebook's widget states."""

    parent: Notebook

    def runtest(self) -> None:
        """Fail with a sentence for each fault."""
        found = faults(notebooks.normalise(notebooks.read(self.path)), self.parent.fresh())
        if found:
            pytest.fail("\n".join(found), pytrace=False)


def faults(committed: Any, fresh: Any) -> list[str]:
    """What is wrong with the committed widget states, a sentence each."""
    saved, seen = notebooks.states(committed), notebooks.states(fresh)
    found = [f"an output shows widget {name}, whose state is not saved: run `make execute`, never save from JupyterLab"
             for name in notebooks.views(committed) if name not in saved]
    if notebooks.views(committed) != notebooks.views(fresh):
        found.append(f"{len(notebooks.views(committed))} widgets are shown in the committed notebook, "
                     f"{len(notebooks.views(fresh))} in a fresh run")
    measured = set(committed.metadata.get("bpkit", {}).get("measured", []))
    for name in sorted(saved.keys() & seen.keys()):
        old, new = saved[name]["state"], seen[name]["state"]
        differ = sorted(key for key in old.keys() | new.keys()
                        if key not in measured and old.get(key) != new.get(key))
        found += [f"{new.get('_anywidget_id') or saved[name]['model_name']} {int(name, 16)}: "
                  f"field {key} is {brief(old.get(key))}, in a fresh run {brief(new.get(key))}" for key in differ]
    return found + [f"widget {name} is saved on one side only" for name in sorted(saved.keys() ^ seen.keys())]


def brief(value: Any) -> str:
    """The first characters of a value."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}... ({len(text)} characters)"
