"""Pipelines without a bubble, or with less: the backward in halves, the weight half where a rank would wait.

Symbols, and what the times and formulas assume, are those of `bpkit.plan.strategies.pipeline`.
"""

from collections.abc import Callable
from typing import Unpack

from bpkit.given import whole_numbers
from bpkit.plan.plan import Plan
from bpkit.plan.strategies.pipeline import Options, scheduled


def zero_bubble_h1(workers: int, microbatches: int, **options: Unpack[Options]) -> Plan:
    """1F1B in halves, with the weight halves r microbatches late, where they fill gaps (Qi et al. 2023, ZB-H1).

    ::

        rank 0  F0 F1 .  I0 W0 F2 I1 W1 I2 W2
        rank 1  .  F0 I0 F1 I1 W0 F2 I2 W1 W2

    Bubble (p-1)(F+I-W) where W <= I, W <= F and m >= p; (p-1) I where F < W <= I.  Activations of min(m, p)
    microbatches (arXiv:2401.10241, section 2.1).
    """
    return _halves("zero_bubble_h1", lambda rank: (workers - rank, rank), workers, microbatches, options)


def zero_bubble_h2(workers: int, microbatches: int, **options: Unpack[Options]) -> Plan:
    """More forwards before the first backward, and weight halves 2r microbatches late (Qi et al. 2023, ZB-H2).

    ::

        rank 0  F0 F1 F2 I0 W0 I1 W1 I2 W2 .
        rank 1  .  F0 I0 F1 I1 F2 I2 W0 W1 W2

    Bubble (p-1)(F+I-2W) where W <= I, W <= F and m >= 2p-1: 0 where F = I = W and no rank waits for all others between
    steps (a clipped gradient norm does).  Then each rank works from its first start to its last end, though the
    makespan of one step exceeds the work by p-1.  Activations of min(m, 2p-1) microbatches (arXiv:2401.10241, section
    2.2).
    """
    return _halves("zero_bubble_h2", lambda rank: (2 * (workers - rank) - 1, 2 * rank), workers, microbatches, options)


def _halves(name: str, rule: Callable[[int], tuple[int, int]], workers: int, microbatches: int,
            options: Options) -> Plan:  # fmt: skip
    """1F1B in halves by each rank's (forwards first, microbatches by which W lags behind I)."""

    def word(rank: int) -> str:
        warm, lag = rule(rank)
        return "F" * warm + "IF" * lag + "IWF" * microbatches

    return scheduled(name, word, range(workers), microbatches, options, workers, microbatches)


def zb_v(workers: int, microbatches: int, **options: Unpack[Options]) -> Plan:
    """Two chunks a rank placed as a V, so that the last stage stands with the first (Qi et al. 2023, ZB-V).

    With p = 2, m = 3, where small letters are of the second chunk::

        rank 0  F0 F1 F2 f0 i0 w0 f1 i1 w1 I0 W0 f2 i2 w2 I1 W1 I2 W2 .
        rank 1  .  F0 f0 F1 f1 i0 w0 F2 I0 W0 f2 i1 w1 I1 i2 I2 W1 w2 W2

    Bubble 0 where F = I = W and m >= 2p-1; activations of p microbatches, as 1F1B's first rank (2p chunks of half the
    size), on every rank (arXiv:2401.10241, section 6; arXiv:2405.15362).
    """

    workers, microbatches = whole_numbers("zb_v", workers=workers, microbatches=microbatches)

    def word(rank: int) -> list[str]:
        p, n = workers, max(microbatches, 2 * workers - 1)
        row = ["F0"] * (2 * (p - rank) - 1) + ["F1", "F0"] * rank + ["F1", "I1", "W1"] * (p - rank)
        for k in range(n - p):
            row += ["F0"] * (k < n - (2 * p - rank - 1)) + ["I0", "W0", "F1", "I1", "W1"]
        return row + ["I0", "I1"] * rank + ["I0", "W0"] * (p - rank) + ["W1"] * rank + ["W0"] * rank

    place = [min(stage, 2 * workers - 1 - stage) for stage in range(2 * workers)]
    return scheduled("zb_v", word, place, microbatches, options, workers, microbatches)
