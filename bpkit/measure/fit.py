"""Models of the time of a message, fitted to measurements."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bpkit.measure import table
from bpkit.measure.comparison import FEWEST
from bpkit.measure.messages import messages
from bpkit.plan import Plan
from bpkit.plan.program import compile_collective


@dataclass(frozen=True)
class AlphaBeta:
    """The time of a message of S bytes: alpha + beta S (Hockney 1994, Parallel Computing 20(3), 389-398).

    Parameters
    ----------
    alpha_s : float
        Latency, seconds: what a message costs whatever its size.
    beta_s_per_byte : float
        Inverse bandwidth, seconds a byte.
    worst : float
        Largest |predicted - measured| / measured over the points of the fit.
    sizes_bytes, seconds : tuple of float
        The points: medians, where there were several repetitions.
    alpha_interval_s, beta_interval_s_per_byte : (float, float) or None
        95 % bootstrap intervals; see `alpha_beta`.
    """

    alpha_s: float
    beta_s_per_byte: float
    worst: float = 0.0
    sizes_bytes: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    alpha_interval_s: tuple[float, float] | None = None
    beta_interval_s_per_byte: tuple[float, float] | None = None

    @property
    def residuals(self) -> tuple[float, ...]:
        """(predicted - measured) / measured at each size of the fit."""
        return tuple(self.predicted(s) / t - 1 for s, t in zip(self.sizes_bytes, self.seconds, strict=True))

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth, 1 / beta."""
        return 1.0 / self.beta_s_per_byte if self.beta_s_per_byte else float("inf")

    def predicted(self, size_bytes: float) -> float:
        """Seconds for a message of `size_bytes`."""
        return self.alpha_s + self.beta_s_per_byte * size_bytes

    def __repr__(self) -> str:
        alpha = f"alpha {self.alpha_s * 1e6:.3g} us{_between(self.alpha_interval_s, 1e6)}"
        rate = self.beta_interval_s_per_byte
        inverse = None if rate is None or rate[0] <= 0 else (1 / rate[1], 1 / rate[0])
        return f"<AlphaBeta: {alpha}, {self.bytes_per_s / 1e9:.3g} GB/s{_between(inverse, 1e-9)}>"

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        rows = [[f"{size:,.0f}", table.seconds(time), table.seconds(self.predicted(size)), f"{100 * off:+.0f} %"]
                for size, time, off in zip(self.sizes_bytes, self.seconds, self.residuals, strict=True)]  # fmt: skip
        return repr(self)[1:-1], ["bytes", "measured", "alpha + beta S", "residual"], rows

    def _repr_html_(self) -> str:
        return table.html(*self._table())


def _between(interval: tuple[float, float] | None, scale: float) -> str:
    return "" if interval is None else f" [{interval[0] * scale:.3g}, {interval[1] * scale:.3g}]"


def alpha_beta(sizes_bytes: Sequence[float], seconds: Sequence[float] | Sequence[Sequence[float]]) -> AlphaBeta:
    """Fit alpha and beta to times of messages.

    Two points are met exactly, so they say nothing of whether a line fits: take at least eight sizes, and look at the
    residuals.  Points are fitted by least squares on the relative error, that is with weights 1/t^2: otherwise the
    largest message alone would decide and alpha would be noise.

    Parameters
    ----------
    sizes_bytes : sequence of float
        At least two different sizes.
    seconds : sequence of float, or of sequences of float
        A time above 0 for each size, or for each size its repetitions, as many for all, of which the medians are
        fitted.  With at least eight sizes and ten repetitions, whose i-th were measured in one turn, alpha and beta
        have 95 % intervals: the middle of 1,000 fits to turns that are drawn with replacement (a seeded percentile
        bootstrap).  They say how far the turns scatter, not how far a line is from the truth: the residuals do.

    Raises
    ------
    ValueError
        If there are too few points, or a time is not above 0.
    """
    sizes, times = np.asarray(sizes_bytes, dtype=float), np.asarray(seconds, dtype=float)
    if sizes.ndim != 1 or times.ndim not in (1, 2) or len(times) != len(sizes) or not times.size:
        raise ValueError(f"a fit needs one time for each size, not {sizes.size} sizes and {len(times)} times")
    if len(np.unique(sizes)) < 2:
        raise ValueError("a fit of alpha and beta needs messages of at least two different sizes")
    if not (times > 0).all():
        raise ValueError("a fit needs times above 0 seconds")
    turns = times.reshape(len(sizes), -1).T
    points = np.median(turns, axis=0)
    alpha, beta = _line(sizes, points)
    intervals: tuple[tuple[float, float] | None, ...] = (None, None)
    if len(np.unique(sizes)) >= 8 and len(turns) >= FEWEST:
        random = np.random.default_rng(0)
        fits = [_line(sizes, np.median(turns[random.integers(len(turns), size=len(turns))], axis=0))
                for _ in range(1000)]  # fmt: skip
        intervals = tuple((float(a), float(b)) for a, b in np.quantile(fits, [0.025, 0.975], axis=0).T)
    worst = float(np.abs((alpha + beta * sizes) / points - 1).max())
    return AlphaBeta(alpha, beta, worst, tuple(sizes.tolist()), tuple(points.tolist()), *intervals)


def _line(sizes: NDArray[np.float64], times: NDArray[np.float64]) -> tuple[float, float]:
    # Scaled to the largest size, so that both columns are of one magnitude.
    unit = sizes.max()
    (alpha, beta), *_ = np.linalg.lstsq(np.column_stack([1 / times, sizes / unit / times]), np.ones_like(times))
    return float(alpha), float(beta / unit)


def collective_time(plan: Plan, size_bytes: int, fit: AlphaBeta, gamma_s_per_byte: float = 0.0) -> float:
    """Seconds of a collective on a buffer of `size_bytes`, each message by the fit, each addition by gamma.

    The longest chain of messages that must follow each other: for a ring on n ranks 2(n-1) messages of S/n bytes, of
    which the first n-1 are added, hence 2(n-1) (alpha + beta S/n) + (n-1) gamma S/n.  The formulas of all algorithms
    stand in `bpkit.plan.strategies.collectives`.

    Parameters
    ----------
    plan : Plan
        As `bpkit.plan.collective` makes it.
    size_bytes : int
        Size of each rank's buffer.
    fit : AlphaBeta
    gamma_s_per_byte : float
        Time to add a byte to a byte; 0: additions cost nothing.
    """
    program = compile_collective(plan, size_bytes, 1)
    found = messages(program, lambda source, to, size: fit.predicted(size), gamma_s_per_byte)
    return max((message.end for message in found), default=0.0)
