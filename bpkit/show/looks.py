"""How everything in a figure looks: one set of colours for figures by matplotlib and, as a style sheet, on the page."""

from __future__ import annotations

from typing import Final

from bpkit.plan.action import LOOKS, VERBS

#: Fill and colour of the text on it.  Mid-tones, which stand out from a light and from a dark page.
FILLS: Final = {
    **LOOKS,
    "compute": ("#3a73ad", "#ffffff"),
    "waiting_for_core": ("#c9932f", "#101418"),
    "exposed_communication": ("#d0622f", "#ffffff"),
    "idle": ("#9aa1a9", "#101418"),
    "hidden_communication": ("#f3b394", "#101418"),
}


def css() -> str:
    """Rules that give ``.part.forward``, ``.pass.F .body`` and their swatches the colours of the table."""
    properties = "".join(f"--bp-{_dashed(name)}: {fill}; --bp-{_dashed(name)}-ink: {ink};\n  "
                         for name, (fill, ink) in FILLS.items())  # fmt: skip
    rules = [f".bpkit-explorer {{\n  {properties.rstrip()}\n}}"]
    for name in FILLS:
        rules += [f".bpkit-explorer .part.{name} {{ fill: var(--bp-{_dashed(name)}); }}",
                  f".bpkit-explorer .{name} text.inside {{ fill: var(--bp-{_dashed(name)}-ink); }}",
                  f".bpkit-swatch.{name} {{ background: var(--bp-{_dashed(name)}); }}"]  # fmt: skip
    for kind, verb in VERBS.items():
        if verb.stream == "compute":
            look = _dashed(verb.look)
            rules += [f".bpkit-explorer .pass.{kind} .body {{ fill: var(--bp-{look}); }}",
                      f".bpkit-explorer .pass.{kind} text.inside {{ fill: var(--bp-{look}-ink); }}",
                      f".bpkit-swatch.{kind} {{ background: var(--bp-{look}); }}"]  # fmt: skip
    return "\n".join(rules) + "\n"


def _dashed(name: str) -> str:
    return name.replace("_", "-")
