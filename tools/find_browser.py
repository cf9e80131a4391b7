"""Find a Chromium or Chrome, or install one; print its path.

In this order: BPKIT_BROWSER, one on the path, one that Playwright has, Debian's package where we are root,
Playwright's own download. A browser counts only when it answers `--version`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
MAC_APPLICATIONS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
ADVICE = (
    "No Chromium or Chrome was found, and none could be installed. Install one (Debian: apt install chromium; "
    "elsewhere: .venv/bin/playwright install --with-deps chromium), or name one: BPKIT_BROWSER=/path/to/chrome, "
    "or leave the browser tests out: BPKIT_NO_BROWSER=1."
)


def answers(path: str | None) -> bool:
    """Whether the program at `path` starts (Ubuntu's chromium-browser may be a stub that does not)."""
    if not path or not os.path.exists(path):
        return False
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def candidates() -> Iterator[str | None]:
    """Paths where a browser may be, best first."""
    yield from (shutil.which(name) for name in NAMES)
    yield from MAC_APPLICATIONS
    yield playwright_path()


def playwright_path() -> str | None:
    """Where Playwright keeps its own Chromium, whether it is there or not."""
    try:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            return playwright.chromium.executable_path
    except Exception:
        return None


def quietly(*command: str) -> bool:
    """Run a command; return whether it succeeded."""
    try:
        return subprocess.run(command, capture_output=True, timeout=900, stdin=subprocess.DEVNULL).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def install() -> None:
    """Try Debian's package as root, then Playwright's download."""
    print("Installing a browser for the browser tests (once).", file=sys.stderr, flush=True)
    if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        os.environ.setdefault("DEBIAN_FRONTEND", "noninteractive")
        quietly("apt-get", "update", "-q")
        quietly("apt-get", "install", "-q", "-y", "--no-install-recommends", "chromium")
        if any(answers(path) for path in candidates()):
            return
    quietly(sys.executable, "-m", "playwright", "install", "chromium")


def find_or_install() -> str:
    """Return the path of a browser that runs.

    Raises
    ------
    RuntimeError
        When there is none and none can be installed; the text says what to do.
    """
    named = os.environ.get("BPKIT_BROWSER")
    if named:
        if answers(shutil.which(named) or named):
            return shutil.which(named) or named
        raise RuntimeError(f"BPKIT_BROWSER is {named!r}, which does not start. {ADVICE}")
    for attempt in (0, 1):
        for path in candidates():
            if path and answers(path):
                return path
        if attempt == 0:
            install()
    raise RuntimeError(ADVICE)


if __name__ == "__main__":
    try:
        print(find_or_install())
    except RuntimeError as problem:
        sys.exit(str(problem))
