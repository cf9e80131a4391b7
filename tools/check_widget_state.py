"""Compare the saved widget states of the chapters with those of a fresh run; nbval does not look at them.

    python tools/check_widget_state.py [chapters/NAME.ipynb ...]     (all, when none is named)

Also: every widget that an output shows has a saved state. A field that holds a measurement is left out of the
comparison where the notebook names it: its metadata holds {"bpkit": {"measured": ["field", ...]}}.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from nbclient.exceptions import CellExecutionError

import notebooks


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


def check(path: Path) -> list[str]:
    """The faults of one notebook; it runs only where it shows widgets or has saved any."""
    committed = notebooks.normalise(notebooks.read(path))
    if not notebooks.views(committed) and not notebooks.states(committed):
        return []
    try:
        return faults(committed, notebooks.execute(path))
    except CellExecutionError as error:
        return [f"a cell failed: {error}"]


def main(names: list[str]) -> int:
    """Check the named notebooks; return the exit code."""
    os.environ |= {"OMP_NUM_THREADS": "1", "BPKIT_PROGRESS": "0"}  # nobody looks at a bar
    failed = 0
    paths = [Path(name).resolve() for name in names] or notebooks.chapters()
    for path in paths:
        found = check(path)
        failed += bool(found)
        print("\n".join(f"{path.name}: {fault}" for fault in found) or f"{path.name}: widget states agree")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
