"""Make the built pages light: what a reader's browser need not fetch, parse or compute is taken out after the build.

- Formulas are MathML, made here, in place of a script that renders them in the browser.
- Icons are drawings in the page, in place of a script with thousands of them.
- The style sheets become one, without the rules that no page can use.
- Scripts wait until the page is read (``defer``); those of the search come with the search page alone.
- Pictures have their size, so that nothing jumps, and load when they come near.
- Each page has a description, and the book an icon.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import tinycss2
from bs4 import BeautifulSoup
from latex2mathml.converter import convert

#: A page, or an element of one; what BeautifulSoup says of the types of attributes is of no help here.
Element = Any
SEARCH = ("searchtools.js", "language_data.js", "searchindex.js")
#: Scripts without which a page does all that it did: icons (drawn here), formulas (made here), tabs (no page has any).
NEEDLESS = ("fontawesome.js", "formulas-are-made-when-the-book-is-built.js", "design-tabs.js")
#: What is copied into every build and no page asks for any more.
DROPPED = ("vendor", "scripts/fontawesome.js", "styles/pydata-sphinx-theme.css")


def lighten(folder: Path) -> None:
    """Rewrite all pages of a build, in place."""
    static = folder / "_static"
    files = [path for path in sorted(folder.rglob("*.html")) if static not in path.parents]
    read: list[Element] = [BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in files]
    pages = {path: page for path, page in zip(files, read, strict=True) if page.head}  # the top only leads on
    draw = icons((static / "scripts" / "fontawesome.js").read_text(encoding="utf-8"))
    for path, page in pages.items():
        formulas(page)
        for icon in page.select(".fa-solid, .fas, .far, .fab"):
            icon.replace_with(draw(icon))
        scripts(page, static, path.name == "search.html")
        pictures(page, path)
        describe(page, posixpath.relpath((static / "favicon.svg").as_posix(), path.parent.as_posix()))
    name = styles(folder, pages)
    for path, page in pages.items():
        one_sheet(page, posixpath.relpath((static / name).as_posix(), path.parent.as_posix()))
        path.write_text(str(page), encoding="utf-8")
    for name in (*DROPPED, *(path.relative_to(static).as_posix() for path in static.rglob("*.map"))):
        gone = static / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)


def formulas(page: Element) -> None:
    """Each formula as MathML, with its source as the text for those who copy it."""
    for place in page.select(".math"):
        source = place.get_text().strip()
        display = source.startswith("\\[")
        source = source.removeprefix("\\[").removesuffix("\\]").removeprefix("\\(").removesuffix("\\)").strip()
        made: Element = BeautifulSoup(convert(source, display="block" if display else "inline"), "html.parser").math
        made["alttext"] = source
        place.clear()
        place.append(made)


def icons(script: str) -> Callable[[Element], Element]:
    """What draws the icon that a tag of the theme names, from the theme's own script of icons."""

    @cache
    def drawing(name: str) -> str:
        # The script holds the outlined form before the solid one.
        found = re.findall(rf'(?:"{name}"|\b{name}):\[(\d+),(\d+),\[[^\]]*\],"\w+","([^"]+)"', script)
        return '<svg viewBox="0 0 {} {}" aria-hidden="true"><path d="{}"/></svg>'.format(*found[-1]) if found else ""

    def draw(tag: Element) -> Element:
        names = [name.removeprefix("fa-") for name in tag["class"] if name.startswith("fa-")]
        svg: Element = BeautifulSoup(next(filter(None, map(drawing, names)), ""), "html.parser").svg
        if svg is None:
            raise ValueError(f"no icon of the theme is called {' or '.join(names)}")
        svg.attrs |= {key: value for key, value in tag.attrs.items() if key.startswith("data-")}
        svg["class"] = ["icon", *(name for name in tag["class"] if not name.startswith("fa"))]
        return svg

    return draw


def scripts(page: Element, static: Path, searches: bool) -> None:
    """Scripts run once the page is read, in their order; the needless ones go."""
    for script in page.find_all("script", src=True):
        name = script["src"].split("?")[0].rsplit("/", 1)[-1]
        if name in NEEDLESS or (name in SEARCH and not searches):
            script.decompose()
        elif name == "documentation_options.js":  # what stands in the page changes it at once
            script.string = (static / name).read_text(encoding="utf-8")
            del script["src"]
        else:
            script["defer"] = ""
    for script in page.find_all("script", src=False):
        if "window.MathJax" in script.get_text():
            script.decompose()
    for link in page.select("link[rel=preload]"):
        link.decompose()


def pictures(page: Element, path: Path) -> None:
    """The size of each picture, and late loading for all."""
    for image in page.select("article img[src]"):
        image["loading"], image["decoding"] = "lazy", "async"
        file = (path.parent / image["src"]).resolve()
        if file.suffix == ".svg" and not image.get("width"):
            head = file.read_text(encoding="utf-8").split("<svg", 1)[-1].split(">", 1)[0]
            size = {name: float(points) for name, points in re.findall(r'\b(width|height)="([\d.]+)pt"', head)}
            image.attrs |= {name: str(round(points * 4 / 3)) for name, points in size.items()}


def describe(page: Element, icon: str) -> None:
    """A description, from the first paragraph of the page, and the icon of the book."""
    first = page.select_one("article p")
    text = " ".join((first or page.head).get_text().split())[:300]
    if not page.select_one("meta[name=description]"):
        page.head.append(page.new_tag("meta", attrs={"name": "description", "content": text}))
    page.head.append(page.new_tag("link", rel="icon", href=icon, type="image/svg+xml"))


# -- style sheets --------------------------------------------------------------------------------------------------


def styles(folder: Path, pages: dict[Path, Element]) -> str:
    """One style sheet of all that any page can use; its name in _static."""
    sheets = dict.fromkeys((path.parent / link["href"].split("?")[0]).resolve() for path, page in pages.items()
                           for link in page.select("link[rel=stylesheet]"))  # fmt: skip
    tags = [tag for page in pages.values() for tag in page.find_all(True)]
    words = {name for tag in tags for name in [*tag.get("class", []), tag.get("id")]}
    codes = [path.read_text(encoding="utf-8") for path in (folder / "_static").rglob("*.js")
             if path.name not in NEEDLESS and "vendor" not in path.parts]  # fmt: skip
    codes += [script.get_text() for page in pages.values() for script in page.select("script:not([src])")]
    words |= {word for code in codes for word in re.findall(r"[\w-]+", code)}
    text = "\n".join(rule for sheet in sheets for rule in _used(_read(sheet, folder / "_static"), words))
    name = f"book-{hashlib.sha256(text.encode()).hexdigest()[:8]}.css"
    (folder / "_static" / name).write_text(text, encoding="utf-8")
    return name


def _read(sheet: Path, static: Path) -> list[Any]:
    """The rules of a style sheet, with the addresses in it as they are from _static."""

    def moved(match: re.Match[str]) -> str:
        address = match[2]
        if address.startswith(("data:", "#")):
            return match[0]
        there = posixpath.relpath((sheet.parent / address).resolve().as_posix(), static.as_posix())
        return f"url({match[1]}{there}{match[1]})"

    text = sheet.read_text(encoding="utf-8")
    brought = [rule for name in re.findall(r"@import\s+(?:url\()?[\"']([^\"']+)[\"']", text)
               for rule in _read((sheet.parent / name.split("?")[0]).resolve(), static)]  # fmt: skip
    text = re.sub(r"url\((['\"]?)([^)'\"]+)\1\)", moved, text)
    return brought + tinycss2.parse_stylesheet(text, skip_comments=True, skip_whitespace=True)


def _used(rules: Iterable[Any], words: set[str]) -> Iterator[str]:
    """The rules that may apply to something, as text."""
    for rule in rules:
        if rule.type == "qualified-rule":
            chosen = [part for part in _parts(tinycss2.serialize(rule.prelude)) if _may_apply(part, words)]
            if chosen:
                yield f"{','.join(chosen)}{{{tinycss2.serialize(rule.content).strip()}}}"
        elif rule.type == "at-rule" and rule.at_keyword in ("media", "supports", "layer") and rule.content is not None:
            rules = tinycss2.parse_rule_list(rule.content, skip_comments=True, skip_whitespace=True)
            inner = "".join(_used(rules, words))
            if inner:
                yield f"@{rule.at_keyword}{tinycss2.serialize(rule.prelude)}{{{inner}}}"
        elif rule.type == "at-rule" and rule.at_keyword not in ("charset", "import"):
            text = rule.serialize()
            if "Font Awesome" not in text:
                yield text


def _parts(selector: str) -> list[str]:
    """The selectors of a list, cut at the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in selector:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _may_apply(selector: str, words: set[str]) -> bool:
    """Whether all classes and ids that a selector wants occur somewhere in the pages or their scripts."""
    wanted = re.sub(r":(?:not|is|where|has)\((?:[^()]|\([^()]*\))*\)", "", selector)
    return all(name.replace("\\", "") in words for name in re.findall(r"[.#]((?:[\w-]|\\.)+)", wanted))


def one_sheet(page: Element, name: str) -> None:
    """The one style sheet in place of all."""
    first, *others = page.select("link[rel=stylesheet]")
    for link in others:
        link.decompose()
    first.attrs = {"rel": "stylesheet", "href": name}
