"""Build the book, with warnings as errors, into build/book; do nothing when nothing changed.

    python tools/book.py [--force]
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lighten import lighten

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "book"
HTML = OUTPUT / "_build" / "html"
SOURCES = ("_config.yml", "constraints.txt", "pyproject.toml", "book", "chapters", "tools/book.py", "tools/lighten.py")


def sources() -> Iterator[Path]:
    """Every file from which the book is made, in a fixed order."""
    for name in SOURCES:
        path = ROOT / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (file for file in files if file.is_file() and ".ipynb_checkpoints" not in file.parts)


def digest() -> str:
    """A digest of the names and contents of all sources."""
    seen = hashlib.sha256()
    for path in sources():
        seen.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode())
        seen.update(path.read_bytes())
    return seen.hexdigest()


def build(force: bool = False) -> bool:
    """Build where needed, one build at a time; return whether the book stands."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build_alone(force)


def build_alone(force: bool) -> bool:
    """Build where needed, with nobody else building."""
    stamp = OUTPUT / "digest"
    wanted = digest()
    if not force and (HTML / "index.html").exists() and stamp.exists() and stamp.read_text() == wanted:
        return True
    stamp.unlink(missing_ok=True)
    start = time.time() - 1
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", ".",
               "-W", "-n", "--all", "--toc", "book/_toc.yml", "--path-output", str(OUTPUT)]
    log = OUTPUT / "log.txt"
    with log.open("w") as out:
        code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT).returncode
    if code:
        lines = log.read_text(errors="replace").splitlines()
        warned = [line for line in lines if "WARNING" in line or "ERROR" in line or "Warning, treated" in line]
        start = next((i for i, line in enumerate(lines) if "treated as error" in line), max(0, len(lines) - 30))
        print("\n".join(warned + lines[start : start + 4]))
        print(f"The book was not built. Log: {log.relative_to(ROOT)}")
        return False
    for page in HTML.rglob("*.html"):  # all pages were written anew; what is older is of a chapter that is gone
        if page.stat().st_mtime < start and "_static" not in page.parts:
            page.unlink()
    lighten(HTML)
    stamp.write_text(wanted)
    print(f"The book: {(HTML / 'index.html').relative_to(ROOT)}")
    return True


if __name__ == "__main__":
    sys.exit(0 if build("--force" in sys.argv[1:]) else 1)
