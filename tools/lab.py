"""Start JupyterLab on the map of the course.

    python tools/lab.py [arguments for JupyterLab]

It listens on the loopback interface and keeps its token. As root (in a container) Jupyter asks for --allow-root.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAP = "/lab/tree/chapters/README.md"


def arguments(given: list[str], root: bool) -> list[str]:
    """The arguments of JupyterLab; what the user gives comes last, so it wins."""
    return [
        f"--ServerApp.root_dir={ROOT}", f"--LabApp.default_url={MAP}", "--ServerApp.ip=127.0.0.1", "--port=8888",
        # Of the server's log, the address and what is wrong.
        "--Application.log_level=WARN",
        # Show Markdown rendered, and ask no other host for news.
        f"--LabApp.app_settings_dir={ROOT / 'tools' / 'lab_settings'}",
        *(["--allow-root"] if root else []), *given,
    ]


def main(given: list[str]) -> None:
    """Become JupyterLab."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    print("JupyterLab starts. Its address follows; Ctrl+C twice ends it.", flush=True)
    command = [sys.executable, "-m", "jupyterlab", *arguments(given, root)]
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
