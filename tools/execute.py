"""Run chapters anew and save their outputs and the states of their widgets.

    python tools/execute.py [chapters/NAME.ipynb ...]     (all, when none is named)
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from nbclient.exceptions import CellExecutionError

import notebooks


def main(names: list[str]) -> int:
    """Execute the named notebooks; return the exit code."""
    os.environ |= {"OMP_NUM_THREADS": "1", "BPKIT_PROGRESS": "0"}  # as `make test` runs them: nobody looks at a bar
    paths = [Path(name).resolve() for name in names] or notebooks.chapters()
    failed = False
    for path in paths:
        if not path.is_file():
            print(f"no such notebook: {path}")
            failed = True
            continue
        start = time.monotonic()
        try:
            changed = notebooks.write(notebooks.execute(path), path)
        except CellExecutionError as error:
            print(f"{path.name}: a cell failed, nothing was saved\n{error}")
            failed = True
        else:
            print(f"{path.name}: {'saved' if changed else 'unchanged'} ({time.monotonic() - start:.0f} s)")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
