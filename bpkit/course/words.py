"""``say`` and ``how_long``: sentences that a cell writes from its numbers."""

from __future__ import annotations

from textwrap import dedent
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bpkit.measure.comparison import Ratio


def say(sentence: str) -> None:
    """Show a sentence whose numbers were measured; the built page sets it like the text around it.

    The output is Markdown (GitHub's: tables, no formulas).  As it differs from run to run, a cell that says what was
    measured has the tag ``nbval-ignore-output``.  Outside a notebook the sentence is printed.

    Parameters
    ----------
    sentence : str
        Markdown; its common indentation is taken off.

    Examples
    --------
    >>> say(f"The ring takes {1.42:.2f} times as long.")
    The ring takes 1.42 times as long.
    """
    text = dedent(sentence).strip()
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import display
    except ImportError:
        print(text)
        return
    if get_ipython() is None:
        print(text)
    else:
        display({"text/markdown": text, "text/plain": text}, raw=True)


def how_long(one: str, ratio: Ratio, other: str) -> str:
    """Say of two times how they compare, also where the measurement does not tell them apart.

    Parameters
    ----------
    one, other : str
        What was timed.
    ratio : Ratio
        The time of ``one``, divided by that of ``other``.

    Returns
    -------
    str
        A clause without a full stop.

    Examples
    --------
    >>> from bpkit.measure.comparison import Ratio
    >>> how_long("the ring", Ratio(1.42, 1.31, 1.52), "the tree")
    'the ring takes 1.42 [1.31, 1.52] times as long as the tree'
    >>> how_long("the ring", Ratio(1.02, 0.95, 1.08), "the tree")
    'the times of the ring and the tree are not resolved (ratio 1.02 [0.95, 1.08]: 1 lies in the 95 % interval)'
    """
    if ratio.resolved:
        return f"{one} takes {ratio.text} times as long as {other}"
    return f"the times of {one} and {other} are not resolved (ratio {ratio.text}: 1 lies in the 95 % interval)"
