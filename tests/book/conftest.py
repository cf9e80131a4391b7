"""The built book, served on loopback to a Chromium that can reach nothing else.

Fixtures
--------
book : Path
    The folder of the built pages; built first where it is not up to date.
book_url : str
    The address of that folder on a free loopback port, without a slash at the end.
browser : playwright.sync_api.Browser
    One Chromium for the session.
page : playwright.sync_api.Page
    A fresh page for one test, with two lists on it: `page.outside` (addresses asked of other hosts; each was
    refused) and `page.problems` (console errors and uncaught exceptions). The test fails at its end when
    either holds something.
open_page : Callable
    `open_page(width=..., height=..., dark=False)` makes more such pages, for other sizes and schemes.
"""

from __future__ import annotations

import http.server
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import book as book_tool  # noqa: E402
import find_browser  # noqa: E402

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
LOCAL = ("127.0.0.1", "localhost", "::1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, so that `-m "not browser"` leaves them out."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """A file server that logs nothing."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="session")
def book() -> Path:
    """The folder of the built pages."""
    assert book_tool.build(), "the book does not build; see build/book/log.txt"
    return book_tool.HTML


@pytest.fixture(scope="session")
def pages_with(book: Path) -> Callable[[type], list[str]]:
    """Which built pages hold a figure of a class; there must be some."""

    def find(figure: type) -> list[str]:
        name = f"{figure.__module__}.{figure.__qualname__}"
        found = [str(path.relative_to(book)) for path in sorted(book.rglob("*.html"))
                 if name in path.read_text(encoding="utf-8")]
        assert found, f"no page of the book shows {name}"
        return found

    return find


@pytest.fixture(scope="session")
def book_url(book: Path) -> Iterator[str]:
    """Serve the pages on a free port of the loopback interface."""
    handler = partial(QuietHandler, directory=str(book))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One headless Chromium; each page gets a context of its own."""
    if os.environ.get("BPKIT_NO_BROWSER") == "1":
        pytest.skip("BPKIT_NO_BROWSER=1")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_browser.find_or_install(), args=FLAGS)
        yield chromium
        chromium.close()


def watch(page: Page) -> Page:
    """Record and refuse what leaves this machine; record console errors and uncaught exceptions."""
    page.outside, page.problems = [], []

    def decide(route: Route) -> None:
        parts = urlsplit(route.request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in LOCAL:
            page.outside.append(route.request.url)
            route.abort()
        else:
            route.continue_()

    page.route("**/*", decide)
    page.on("websocket", lambda socket: urlsplit(socket.url).hostname in LOCAL
            or page.outside.append(socket.url))
    page.on("console", lambda message: message.type == "error"
            and page.problems.append(f"{message.text} ({message.location.get('url', '')})"))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    return page


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Make watched pages; check at the end that none asked another host and none reported an error."""
    pages: list[Page] = []

    def make(width: int = 1280, height: int = 900, dark: bool = False, **options: object) -> Page:
        scheme = "dark" if dark else "light"
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
        context.set_default_timeout(20_000)
        pages.append(watch(context.new_page()))
        return pages[-1]

    yield make
    for page in pages:
        page.context.close()
    assert [url for page in pages for url in page.outside] == [], "a page asked another host"
    assert [text for page in pages for text in page.problems] == [], "errors on the console"


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    """A watched page of the usual size."""
    return open_page()
