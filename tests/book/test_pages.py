"""What must hold on every page of the built book."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[2]
# Pages by name: the built ones are known only after the build, and a test needs its name before.
PAGES = sorted(
    str(path.relative_to(ROOT).with_suffix(".html"))
    for pattern in ("book/*.md", "book/*.ipynb", "chapters/*.ipynb")
    for path in ROOT.glob(pattern)
) + ["search.html", "genindex.html"]
# The rule is experimental, hence off by default. `preload` would ask for style sheets by wrong addresses.
AXE = {"preload": False, "rules": {"label-content-name-mismatch": {"enabled": True}}}


def visit(page: Page, url: str) -> None:
    """Open a page and wait until its scripts have settled."""
    response = page.goto(url)
    assert response is None or response.ok, f"{url}: {response.status}"
    page.wait_for_load_state("load")


def test_every_built_page_is_known(book: Path) -> None:
    built = {str(path.relative_to(book)) for path in book.rglob("*.html") if "_static" not in path.parts}
    assert built - {"index.html"} == set(PAGES)


def test_the_top_leads_to_the_map(page: Page, book_url: str) -> None:
    page.goto(f"{book_url}/index.html")
    page.wait_for_url("**/book/index.html")
    assert page.locator("table").count() >= 1


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["http", "file"])
def test_page_is_whole(page: Page, book: Path, book_url: str, name: str, scheme: str) -> None:
    visit(page, f"{book_url}/{name}" if scheme == "http" else (book / name).as_uri())
    assert page.locator("main h1, article h1").count() >= 1
    # Formulas: each one became MathML with something to see, none is left as source.
    wanted = page.locator(".math").count()
    assert page.locator(".math > math").count() == wanted
    assert page.evaluate("() => [...document.querySelectorAll('math')].every(m => m.getBoundingClientRect().width)")
    assert page.locator(".math").filter(has_text="\\").count() == 0
    # Tables: none is left as source, in what cells say either; nor did code get among the sentences.
    source = re.compile(r"^\s*\||\bassert .* (==|<|>) ")
    assert page.locator("article p").filter(has_text=source).count() == 0
    # Late pictures come when the reader does.
    page.evaluate("() => [...document.images].forEach(i => i.loading = 'eager')")
    page.wait_for_function("() => [...document.images].every(i => i.complete)")
    # Pictures: each one loaded and has a text.
    broken = page.evaluate("() => [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)")
    assert broken == []
    assert page.evaluate("() => [...document.images].filter(i => !i.hasAttribute('alt')).map(i => i.src)") == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_page_is_accessible(open_page: Callable[..., Page], book_url: str, name: str, dark: bool) -> None:
    page = open_page(dark=dark)
    visit(page, f"{book_url}/{name}")
    assert page.evaluate("() => document.documentElement.dataset.theme") == ("dark" if dark else "light")
    # Buttons fade for 0.15 s into the colours of the theme, which is set while the page loads: their contrast is
    # that at rest.
    page.add_style_tag(content="*, *::before, *::after { transition: none !important; animation: none !important }")
    found = [f"{fault['id']} ({fault['impact']}): {node['html'][:200]}"
             for fault in Axe().run(page, options=AXE).response["violations"] for node in fault["nodes"]]
    assert found == []


@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_telephone(open_page: Callable[..., Page], book_url: str, name: str) -> None:
    page = open_page(width=390, height=844)
    visit(page, f"{book_url}/{name}")
    width = page.evaluate("() => document.scrollingElement.scrollWidth")
    assert width <= 390, f"{name} is {width} pixels wide"


@pytest.mark.parametrize("name", PAGES)
def test_links_resolve(page: Page, book: Path, book_url: str, name: str) -> None:
    """Every link within the book leads to a file that is there, and to a place in it that is there."""
    visit(page, f"{book_url}/{name}")
    dead = []
    for link in page.evaluate("() => [...document.querySelectorAll('a[href]')].map(a => a.href)"):
        address, fragment = urldefrag(link)
        if not address.startswith(book_url):
            continue
        target = book / unquote(urlsplit(address).path).lstrip("/")
        target = target / "index.html" if target.is_dir() else target
        if not target.is_file() or (fragment and target.suffix == ".html" and not has_place(target, unquote(fragment))):
            dead.append(link)
    assert dead == []


def has_place(path: Path, fragment: str) -> bool:
    """Whether the page holds an element of that id."""
    text = path.read_text()
    return f'id="{fragment}"' in text or f'name="{fragment}"' in text


def test_search_finds_offline(page: Page, book_url: str) -> None:
    visit(page, f"{book_url}/search.html?q=gradient")
    page.wait_for_selector("#search-results li a")
    assert "glossary" in " ".join(page.locator("#search-results li a").all_inner_texts()).lower()


def test_the_keyboard_reaches_the_tools(page: Page, book_url: str) -> None:
    """Tab goes through the page, and what has the focus shows it."""
    visit(page, f"{book_url}/book/howto.html")
    bare = []
    for _ in range(25):
        page.keyboard.press("Tab")
        seen = page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e);
            return [e.outerHTML.slice(0, 120), s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 0
                    || s.boxShadow !== 'none' || e === document.body]; }"""
        )
        if not seen[1]:
            bare.append(seen[0])
    assert bare == []
