"""Comparisons with an interval: interleaved repetitions, the ratio of two of them, the noise of the machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bpkit.given import integers

#: Pairs under which an interval of a median says nothing.
FEWEST = 10
_RESAMPLES = 4000


@dataclass(frozen=True)
class Ratio:
    """The ratio of two paired measurements, a / b, with its 95 % interval; made by `ratio`.

    Parameters
    ----------
    median : float
        Of the ratios of the pairs.
    low, high : float
        Ends of the interval.
    """

    median: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether the two differ: 1 lies outside the interval."""
        return not self.low <= 1 <= self.high

    @property
    def text(self) -> str:
        """Its three numbers."""
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def __str__(self) -> str:
        return self.text if self.resolved else f"not resolved ({self.text})"


def interleave(runs: Mapping[str, Callable[[], float | None]], repetitions: int = 20, *,
               warmup: int = 1) -> dict[str, list[float]]:  # fmt: skip
    """Call each run once a turn, in an order shuffled anew, so that what the machine does meanwhile hits all alike.

    Parameters
    ----------
    runs : mapping of str to callable
        Each is called without arguments and returns the seconds that it measured itself.  Where it returns None, the
        call as a whole is timed.
    repetitions : int
        Turns.
    warmup : int
        Turns before them that are not kept.

    Returns
    -------
    dict of str to list of float
        Seconds, by name in the order of `runs`: `repetitions` of each, and the i-th of all are of one turn.

    Raises
    ------
    ValueError
        If there are no runs, or fewer than one repetition.
    """
    repetitions, warmup = *integers("interleave", repetitions=repetitions), *integers("interleave", 0, warmup=warmup)
    if not runs:
        raise ValueError('interleave needs at least one run, for example {"ring": lambda: ...}')
    names, order = list(runs), random.Random(0)
    turns = []
    for _ in range(warmup + repetitions):
        turn = {name: _seconds(runs[name]) for name in order.sample(names, len(names))}
        turns.append(turn)
    return {name: [turn[name] for turn in turns[warmup:]] for name in names}


def _seconds(run: Callable[[], float | None]) -> float:
    begin = time.perf_counter()
    found = run()
    return time.perf_counter() - begin if found is None else float(found)


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """Median of the ratios a / b of paired samples, with a bootstrap interval: above 1, `a` takes longer.

    The interval holds the middle 95 % of the medians of 4,000 samples of as many pairs, drawn from the pairs with
    replacement (percentile bootstrap: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13).  The
    draws have a fixed seed: the same samples give the same interval.

    It covers the true median ratio in about 95 of 100 measurements where the pairs are alike and independent of each
    other: the i-th of `a` and of `b` are taken one right after the other, in turns (`interleave`), and there are at
    least 10 of them, better 20.  It says nothing of other machines, nor of this one at another hour.

    Parameters
    ----------
    a, b : sequence of float, same length
        Seconds, above 0.

    Raises
    ------
    ValueError
        If there are fewer than 10 pairs, if the samples do not pair, or if one is not above 0.
    """
    over, under = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if over.shape != under.shape or over.ndim != 1:
        raise ValueError(f"a ratio needs pairs of samples, not {over.size} and {under.size}")
    if len(over) < FEWEST:
        raise ValueError(f"an interval needs at least {FEWEST} pairs of samples, better 20, not {len(over)}")
    if not (np.isfinite(over) & np.isfinite(under) & (over > 0) & (under > 0)).all():
        raise ValueError("a ratio needs samples above 0")
    logs = np.sort(np.log(over / under))  # sorted: the order of the pairs does not change the interval
    drawn = np.random.default_rng(0).integers(len(logs), size=(_RESAMPLES, len(logs)))
    low, high = np.quantile(np.median(logs[drawn], axis=1), [0.025, 0.975])
    return Ratio(*(float(np.exp(value)) for value in (np.median(logs), low, high)))


def noise(run: Callable[[], float | None], repetitions: int = 20) -> Ratio:
    """The same work against itself, interleaved like two works that are compared.

    What it gives is 1 but for chance: two works whose ratio lies within its interval cannot be told apart here.

    Parameters
    ----------
    run, repetitions
        As for `interleave`; at least 10 repetitions.
    """
    times = interleave({"once": run, "again": run}, repetitions)
    return ratio(times["once"], times["again"])


def said(noise: Ratio | None, steal: float | None = None) -> str:
    """What the machine did to a measurement, for its caption; nothing where it is not known."""
    words = "" if noise is None else f"; the same work against itself: {noise.text}"
    return words + ("" if steal is None else f"; stolen CPU time: {100 * steal:.1f} %")
