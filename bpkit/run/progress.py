"""A progress bar for long runs, where somebody looks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any


def somebody_looks() -> bool:
    """Whether a person is likely to see a bar: a terminal or a notebook, not a test or a build.

    ``BPKIT_PROGRESS=0`` turns bars off, as does ``CI``.
    """
    if os.environ.get("BPKIT_PROGRESS") == "0" or os.environ.get("CI"):
        return False
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class Progress:
    """Steps done, told to a callback or drawn by tqdm once a run takes more than two seconds."""

    def __init__(self, steps: int, callback: Callable[[float, str], None] | None) -> None:
        self._steps, self._callback = steps, callback
        self._bar: Any = None
        if callback is None and somebody_looks():
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=steps, unit="step", delay=2, leave=False)

    def watch(self, marks: Any) -> None:
        """Take the marks (step, action) of all ranks."""
        done = int(min(mark[0] for mark in marks))
        if self._callback is not None:
            self._callback(min(1.0, done / self._steps), f"step {done} of {self._steps}")
        elif self._bar is not None:
            self._bar.update(done - self._bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if self._bar is not None:
            self._bar.close()
