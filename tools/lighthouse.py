"""Measure the built pages as a telephone gets them: Lighthouse (from npm, mobile settings), the median of five runs.

    python tools/lighthouse.py [--runs 5] [PAGE ...]     (the landing page and the heaviest chapter, if none is named)

Needs node and npm; Lighthouse itself goes into build/lighthouse.  The pages are served on loopback, compressed, as web
servers do.  Fails where a score is below what the book promises.
"""

from __future__ import annotations

import argparse
import gzip
import http.server
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
from functools import cache, partial
from pathlib import Path

import book
import find_browser

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "lighthouse"
#: What each category must reach, of 100; and what a page may weigh in all, in bytes sent.
WANTED = {"performance": 90, "accessibility": 100, "best-practices": 95, "seo": 95}
HEAVIEST = 1_000_000
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking " \
        "--disable-component-update --disable-sync"


@cache
def compressed(path: Path) -> bytes:
    """A file as it travels."""
    return gzip.compress(path.read_bytes(), 6)


class Compressing(http.server.SimpleHTTPRequestHandler):
    """A server of files that compresses text, and lets the browser keep what it has."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with the file, compressed where that helps."""
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() else path
        if not path.is_file():
            self.send_error(404)
            return
        packs = path.suffix in (".html", ".css", ".js", ".svg", ".json")
        body = compressed(path) if packs else path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)) + "; charset=utf-8" * packs)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "max-age=31536000")
        if packs:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def command() -> list[str]:
    """How Lighthouse is called; installed first where it is not there."""
    if not shutil.which("npm"):
        raise SystemExit("Lighthouse needs node and npm (on Debian and Ubuntu: apt install nodejs npm)")
    if not (PLACE / "node_modules" / "lighthouse").is_dir():
        PLACE.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "--prefix", str(PLACE), "lighthouse@12"], check=True)
    return ["node", str(PLACE / "node_modules" / "lighthouse" / "cli" / "index.js")]


def once(url: str, browser: str) -> dict[str, float]:
    """The scores of one run, and what the page weighed."""
    made = PLACE / "run.json"
    subprocess.run([*command(), url, "--quiet", "--output=json", f"--output-path={made}", f"--chrome-flags={FLAGS}",
                    f"--only-categories={','.join(WANTED)}"], check=True, env=dict(os.environ, CHROME_PATH=browser))
    found = json.loads(made.read_text())
    scores = {name: 100 * found["categories"][name]["score"] for name in WANTED}
    faults = [name for name, audit in found["audits"].items() if audit["score"] == 0]
    print(f"  {scores} {', '.join(faults)}", flush=True)
    return scores | {"bytes": found["audits"]["total-byte-weight"]["numericValue"]}


def heaviest() -> str:
    """The chapter whose page is the largest."""
    pages = (book.HTML / "chapters").glob("*.html")
    return max(pages, key=lambda path: path.stat().st_size).relative_to(book.HTML).as_posix()


def main() -> int:
    """Measure the pages; the exit code says whether all is as promised."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("pages", nargs="*")
    options = parser.parse_args()
    if not book.build():
        return 1
    browser, missed = find_browser.find_or_install(), False
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Compressing, directory=str(book.HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for page in options.pages or ["book/index.html", heaviest()]:
        print(page)
        runs = [once(f"http://127.0.0.1:{server.server_port}/{page}", browser) for _ in range(options.runs)]
        median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        print(f"  median of {len(runs)}: {', '.join(f'{name} {value:,.0f}' for name, value in median.items())}")
        missed |= median["bytes"] > HEAVIEST or any(median[name] < least for name, least in WANTED.items())
    server.shutdown()
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
