"""A progress bar for long runs, where somebody looks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

Tell = Callable[[float, str], None]  # takes the fraction done and a text


def somebody_looks() -> bool:
    """Whether a person is likely to see a bar: a terminal or a notebook, not a test or a build.

    ``BPKIT_PROGRESS=0`` turns bars off, as does ``CI``.
    """
    if os.environ.get("BPKIT_PROGRESS") == "0" or os.environ.get("CI"):
        return False
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class Bar(contextlib.AbstractContextManager["Bar"]):
    """Takes a long run's (fraction done, text): to a callback, or to tqdm once it takes more than two seconds."""

    def __init__(self, callback: Tell | None) -> None:
        self._callback, self._bar = callback, None
        if callback is None and somebody_looks():
            with contextlib.suppress(ImportError):
                from tqdm.auto import tqdm

                self._bar = tqdm(total=100, unit="%", delay=2, leave=False)

    def __call__(self, fraction: float, text: str) -> None:
        if self._callback is not None:
            self._callback(fraction, text)
        elif self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(int(100 * fraction) - self._bar.n)

    def part(self, index: int, of: int, what: str) -> Tell:
        """What takes the progress of run `index` of so many."""
        return lambda fraction, text: self((index + fraction) / of, f"{what}: {text}" if text else what)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
