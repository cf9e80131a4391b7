"""Collectives as plans: what they leave, what they send, and what the checker says of their mutants."""

from __future__ import annotations

import pytest

from bpkit.plan import Plan, PlanError, check, collective, data_parallel, expand
from bpkit.plan.strategies.collectives import ALGORITHMS

RANKS = [1, 2, 3, 4, 5, 6, 7, 8]
ALL_REDUCES = [name for name, (purpose, _) in ALGORITHMS.items() if purpose == "all_reduce"]


def hosts(name: str, n: int) -> dict[str, int]:
    return {"hosts": 2 if n % 2 == 0 else 1} if name == "hierarchical" else {}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("n", RANKS)
def test_each_collective_does_what_it_promises(name, n):
    plan = collective(name, n, **hosts(name, n))
    check(plan)
    assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize("name", ALL_REDUCES)
@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_an_expanded_training_plan_is_accepted(name, n):
    check(expand(data_parallel(n, buckets=2, microbatches=2), name, **hosts(name, n)))


def sent(plan: Plan, size: int) -> list[int]:
    """Elements that each rank sends, summed over the actual parts."""
    return [
        sum(
            high - low
            for a in row
            if a.kind in ("SEND_G", "SWAP_G")
            for low, high in [(0, size) if a.part is None else a.part.bounds(size)]
        )
        for row in plan.rows
    ]


def sizes(n: int, size: int) -> list[int]:
    return [(i + 1) * size // n - i * size // n for i in range(n)]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("size", [10, 64, 1001])
def test_bytes_by_the_formulas_of_the_docstrings(n, size):
    s = sizes(n, size)
    every = range(n)
    assert sent(collective("reduce_scatter", n), size) == [size - s[r] for r in every]
    assert sent(collective("all_gather", n), size) == [size - s[(r + 1) % n] for r in every]
    assert sent(collective("ring", n), size) == [2 * size - s[r] - s[(r + 1) % n] for r in every]
    assert sent(collective("server", n), size) == [(n - 1) * size] + [size] * (n - 1)
    assert sent(collective("sharded_server", n), size) == [size - s[r] + (n - 1) * s[r] for r in every]
    children = [sum(c < n for c in (2 * r + 1, 2 * r + 2)) for r in every]
    assert sent(collective("tree", n), size) == [size * (children[r] + (r > 0)) for r in every]
    assert sum(sent(collective("broadcast", n), size)) == (n - 1) * size
    binomial = sent(collective("binomial", n), size)
    assert sum(binomial) == 2 * (n - 1) * size and binomial[0] == (n - 1).bit_length() * size
    if size % n == 0:
        assert sent(collective("all_to_all", n), size) == [size - s[r] for r in every]


def test_figures_of_the_literature():
    assert sent(collective("ring", 3), 10) == [14, 13, 13]
    assert sent(collective("halving_doubling", 3), 10) == [20, 10, 10]
    assert sent(collective("halving_doubling", 8), 64) == [2 * 64 * 7 // 8] * 8


def test_a_hierarchy_sends_little_between_hosts():
    plan = collective("hierarchical", 8, hosts=2)
    across = [
        sum(8 * (a.part.hi - a.part.lo) for a in row if a.kind == "SEND_G" and a.peer // 4 != rank // 4)
        for rank, row in enumerate(plan.rows)
    ]
    assert across == [2 * 64 // 2 // 4] * 8  # 2 (hosts-1)/hosts S/L of S = 64 elements, parts of 8


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_collective_with_one_action_missing_is_refused(name):
    plan = collective(name, 4, **hosts(name, 4))
    for r, row in enumerate(plan.rows):
        for i in range(len(row)):
            rows = [list(other) for other in plan.rows]
            del rows[r][i]
            with pytest.raises(PlanError):
                check(plan.with_rows(rows))


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="unknown collective 'star': choose one of ring"):
        collective("star", 3)
    with pytest.raises(ValueError, match="4 ranks do not divide into 3 hosts"):
        collective("hierarchical", 4, hosts=3)
    with pytest.raises(ValueError, match="broadcast is none"):
        expand(data_parallel(2), "broadcast")
    with pytest.raises(ValueError, match="expanded already"):
        expand(expand(data_parallel(2), "ring"), "ring")
