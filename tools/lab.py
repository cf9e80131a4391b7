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
    """The arguments of JupyterLab; what may be given again, such as a port, stands in lab_config/ as a default."""
    return [
        f"--ServerApp.root_dir={ROOT}", f"--LabApp.default_url={MAP}",
        # Show Markdown rendered, and ask no other host for news.
        f"--LabApp.app_settings_dir={ROOT / 'tools' / 'lab_settings'}",
        *(["--allow-root"] if root else []), *given,
    ]


def main(given: list[str]) -> None:
    """Become JupyterLab."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    searched = [str(ROOT / "tools" / "lab_config"), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, searched))
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    print("JupyterLab starts. Its address follows; Ctrl+C twice ends it.", flush=True)
    command = [sys.executable, "-m", "jupyterlab", *arguments(given, root)]
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
