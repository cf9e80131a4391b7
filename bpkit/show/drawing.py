"""What all figures share: their ground, their colours, their words, and how a notebook shows them."""

from __future__ import annotations

import io
from html import escape
from typing import Any, Final

from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure

from bpkit.show.looks import FILLS

#: Every word in a figure stands here: a translation is one more catalogue.
TEXT: Final = {
    "rank": "rank {0}",
    "time": "one step, number {0}; {1}",
    "time_simulated": "simulated time, {0}",
    "units": "units",
    "number": "a number alone: its microbatch",
    "workers": "workers",
    "speedup": "speedup",
    "ideal": "ideal",
    "serial": "{0} (serial)",
    "mean": "mean of ranks",
    "row": "row {0}",
    "order": "order in the row",
    "step_time": "time of a step, {0}; median of {1} steps",
    "simulated": "simulated",
    "forward": "forward (F)",
    "backward": "backward (B)",
    "input_half": "input half (I)",
    "weight_half": "weight half (W)",
    "communication": "communication",
    "update": "update",
    "other": "loss and other",
    "wait": "blocked by communication",
    "compute": "compute",
    "waiting_for_core": "waiting for a core",
    "exposed_communication": "exposed communication",
    "idle": "idle",
    "hidden_communication": "hidden communication",
    "timeline_alt": "Timeline of step {0}, {1} ranks, {2}.",
    "timeline_rank": "Rank {0}: {1}; blocked for {2}{3}.",
    "timeline_core": ", waiting for a core for {0}",
    "breakdown_bar": "{0}: {1}, of it {2}",
    "speedup_point": "{0:.2f} with {1}",
    "breakdown_alt": "Where the time of a step goes. {0}",
    "speedup_alt": "Speedup by number of workers. {0}",
    "plan_alt": "Plan {0}, in the order of its rows. {1}",
}

INK: Final = "#777777"  # 4.5:1 on white, 4:1 on the theme's dark ground

#: No date, no random ids, text that stays text: the same figure is the same file.
STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bpkit",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.transparent": True,
    "font.size": 9.5,
    "font.family": "sans-serif",
    "hatch.linewidth": 0.8,
    "hatch.color": FILLS["exposed_communication"][0],
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_SVG: Final[dict[str, Any]] = {"format": "svg", "metadata": {"Date": None}, "transparent": True}


class Drawing(Figure):
    """A matplotlib figure that a notebook shows as SVG, and that says in words what it shows.

    Attributes
    ----------
    alt : str
        The figure in words.
    """

    alt = ""

    def svg(self) -> str:
        """The figure as SVG, its words as the title that screen readers and tooltips give."""
        out = io.StringIO()
        with rc_context(STYLE):
            self.savefig(out, **_SVG, bbox_inches="tight")
        drawn = out.getvalue()
        at = drawn.index(">", drawn.index("<svg")) + 1
        return f'{drawn[: at - 1]} role="img"><title>{escape(self.alt, quote=False)}</title>{drawn[at:]}'

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        # A fixed text: what a measured figure says in words differs from run to run.
        data = {"image/svg+xml": self.svg(), "text/plain": repr(self)}
        return data, {"image/svg+xml": {"alt": self.alt}}

    def __repr__(self) -> str:
        return "<Drawing>"


def alt_text(figure: Figure) -> str:
    """What a figure shows, in words, for the alternative text of an image."""
    return str(getattr(figure, "alt", ""))


def setup() -> None:
    """Make all of matplotlib draw like our figures: reproducible SVG with a transparent ground.

    In a notebook, figures of ``pyplot`` become SVG too.  Our own figures need no setup.
    """
    rcParams.update(STYLE)
    try:
        from IPython.core.getipython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None:
        set_matplotlib_formats("svg", metadata={"Date": None})
