"""``say``: a sentence that a cell wrote from its numbers."""

from __future__ import annotations

from textwrap import dedent


def say(sentence: str) -> None:
    """Show a sentence whose numbers were measured; the built page sets it like the text around it.

    The output is Markdown (CommonMark: no formulas).  As it differs from run to run, a cell that says what was
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
