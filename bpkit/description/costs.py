"""What a run of layers costs: the numbers that balance stages and feed a model of the hardware."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class StageCost:
    """Cost of a run of layers for one sample.

    A multiplication and an addition count as two FLOPs, so a linear layer's product is 2 x inputs x outputs
    (Kaplan et al. 2020, arXiv:2001.08361, section 2.1: backward is twice forward, half of it for each half).
    Elementwise layers count one FLOP an element unless their docstring says otherwise.

    Parameters
    ----------
    forward, backward_input, backward_weight : int
        FLOPs of F, I and W a sample; the whole backward is I + W.
    inputs, outputs : int
        Elements a sample on the edge into and out of the run.
    parameters : int
        Trainable elements, without padding.
    """

    forward: int
    backward_input: int
    backward_weight: int
    inputs: int
    outputs: int
    parameters: int

    @property
    def total(self) -> int:
        """FLOPs of F, I and W together, a sample."""
        return self.forward + self.backward_input + self.backward_weight

    @staticmethod
    def merge(costs: Sequence[StageCost]) -> StageCost:
        """Return the cost of layers run one after another: sums, with the outer edges.

        Raises
        ------
        ValueError
            If `costs` is empty.
        """
        if not costs:
            raise ValueError("a stage has at least one layer, and there is no cost to merge")
        return StageCost(sum(c.forward for c in costs), sum(c.backward_input for c in costs),
                         sum(c.backward_weight for c in costs), costs[0].inputs, costs[-1].outputs,
                         sum(c.parameters for c in costs))  # fmt: skip


def balanced_cuts(weights: Sequence[int], parts: int) -> list[int]:
    """Cut `weights` into `parts` non-empty runs so that the heaviest run is as light as can be.

    Dynamic programming over prefixes, O(parts x n); of equal solutions the one with the earliest last cut.

    Returns
    -------
    list of int
        Indices at which a new run starts, `parts` - 1 of them.

    Raises
    ------
    ValueError
        If `parts` is not between 1 and the number of weights.
    """
    n = len(weights)
    if not 1 <= parts <= n:
        raise ValueError(f"{n} layers can be cut into 1 to {n} stages, not {parts}")
    prefix = list(accumulate(weights, initial=0))
    best, starts = prefix, list[list[int]]()  # of the first i weights the heaviest run; where last runs start
    for k in range(2, parts + 1):
        heaviest, where, j = [prefix[n] + 1] * (n + 1), [0] * (n + 1), k - 1
        for i in range(k, n + 1):
            while j < i and best[j] < prefix[i] - prefix[j]:  # up to there the last run is the heaviest, and less so
                j += 1
            heaviest[i], where[i] = best[j], j
            if j > k - 1 and (j == i or prefix[i] - prefix[j - 1] <= best[j]):
                heaviest[i], where[i] = prefix[i] - prefix[j - 1], max(k - 1, bisect_left(prefix, prefix[j - 1]))
        best, starts = heaviest, [*starts, where]
    cuts, end = [], n
    for where in reversed(starts):
        end = where[end]
        cuts.append(end)
    return cuts[::-1]
