"""Models of the time of a message, fitted to measurements."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    """

    alpha_s: float
    beta_s_per_byte: float
    worst: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth, 1 / beta."""
        return 1.0 / self.beta_s_per_byte if self.beta_s_per_byte else float("inf")

    def predicted(self, size_bytes: float) -> float:
        """Seconds for a message of `size_bytes`."""
        return self.alpha_s + self.beta_s_per_byte * size_bytes

    def __repr__(self) -> str:
        return f"<AlphaBeta: alpha {self.alpha_s * 1e6:.3g} us, {self.bytes_per_s / 1e9:.3g} GB/s>"


def alpha_beta(sizes_bytes: Sequence[float], seconds: Sequence[float]) -> AlphaBeta:
    """Fit alpha and beta to times of messages.

    Two points are met exactly.  More are fitted by least squares on the relative error, that is with weights
    1/t^2: otherwise the largest message alone would decide and alpha would be noise.

    Parameters
    ----------
    sizes_bytes, seconds : sequence of float, same length
        At least two different sizes; times above 0.

    Raises
    ------
    ValueError
        If there are too few points, or a time is not above 0.
    """
    sizes, times = np.asarray(sizes_bytes, dtype=float), np.asarray(seconds, dtype=float)
    if sizes.shape != times.shape or sizes.ndim != 1:
        raise ValueError(f"a fit needs one time for each size, not {sizes.size} sizes and {times.size} times")
    if len(np.unique(sizes)) < 2:
        raise ValueError("a fit of alpha and beta needs messages of at least two different sizes")
    if not (times > 0).all():
        raise ValueError("a fit needs times above 0 seconds")
    # Scaled to the largest size, so that both columns are of one magnitude.
    unit = sizes.max()
    columns = np.column_stack([1 / times, sizes / unit / times])
    (alpha, beta), *_ = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)
    found = AlphaBeta(float(alpha), float(beta / unit))
    worst = max(abs(found.predicted(s) - t) / t for s, t in zip(sizes, times, strict=True))
    return AlphaBeta(found.alpha_s, found.beta_s_per_byte, float(worst))


def collective_time(plan: Plan, size_bytes: int, fit: AlphaBeta) -> float:
    """Seconds of a collective on a buffer of `size_bytes`, each message by the fit; additions are not in it.

    The longest chain of messages that must follow each other: for a ring on n ranks 2(n-1) messages of S/n bytes, hence
    2(n-1) (alpha + beta S/n).  The formulas of all algorithms stand in `bpkit.plan.strategies.collectives`.

    Parameters
    ----------
    plan : Plan
        As `bpkit.plan.collective` makes it.
    size_bytes : int
        Size of each rank's buffer.
    fit : AlphaBeta
    """
    program = compile_collective(plan, size_bytes, 1)
    return max((m.end for m in messages(program, lambda source, to, size: fit.predicted(size))), default=0.0)
