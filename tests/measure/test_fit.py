"""The alpha-beta fit, the time of collectives, and the description of the machine."""

from __future__ import annotations

import getpass
import json
import platform

import pytest

from bpkit.measure import alpha_beta, machine
from bpkit.measure.fit import AlphaBeta, collective_time
from bpkit.measure.messages import messages
from bpkit.plan import collective, data_parallel
from bpkit.plan.program import compile_collective


def test_two_points_are_met_exactly() -> None:
    fit = alpha_beta([1_000, 1_000_000], [10e-6, 1e-3])
    assert fit.predicted(1_000) == pytest.approx(10e-6, rel=1e-9)
    assert fit.predicted(1_000_000) == pytest.approx(1e-3, rel=1e-9)
    assert fit.worst == pytest.approx(0, abs=1e-9)


def test_known_constants_come_back() -> None:
    true = AlphaBeta(5e-6, 1e-9)
    sizes = [8, 1e3, 1e5, 1e7]
    fit = alpha_beta(sizes, [true.predicted(s) for s in sizes])
    assert fit.alpha_s == pytest.approx(5e-6) and fit.beta_s_per_byte == pytest.approx(1e-9)
    assert fit.bytes_per_s == pytest.approx(1e9)


def test_weights_keep_the_latency_where_large_messages_are_noisy() -> None:
    true, sizes = AlphaBeta(5e-6, 1e-9), [8, 80, 1e7, 2e7]
    times = [true.predicted(s) * (1.2 if s == 2e7 else 1) for s in sizes]
    assert alpha_beta(sizes, times).alpha_s == pytest.approx(5e-6, rel=0.02)


@pytest.mark.parametrize(
    ("sizes", "times", "message"),
    [
        ([1], [1.0], "two different sizes"),
        ([8, 8], [1.0, 2.0], "two different sizes"),
        ([8, 16], [1.0], "2 sizes and 1 times"),
        ([8, 16], [1.0, 0.0], "above 0"),
    ],
)
def test_fits_that_cannot_be(sizes: list[float], times: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alpha_beta(sizes, times)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_collectives_take_what_the_formulas_say(n: int) -> None:
    """On 840 bytes, which 2, 4 and 8 divide; the tree is complete at 1, 3 and 7 ranks."""
    fit, size, log = AlphaBeta(2.0, 0.5), 840, n.bit_length() - 1
    part, whole = fit.predicted(size / n), fit.predicted(size)
    times = {"ring": 2 * (n - 1) * part, "sharded_server": 2 * (n - 1) * part, "server": 2 * (n - 1) * whole,
             "reduce_scatter": (n - 1) * part, "all_gather": (n - 1) * part, "broadcast": log * whole,
             "halving_doubling": 2 * log * 2.0 + 2 * (n - 1) / n * size * 0.5,
             "all_to_all": (n if n > 2 else n - 1) * part}
    for name, seconds in times.items():
        assert collective_time(collective(name, n), size, fit) == pytest.approx(seconds), name
    assert collective_time(collective("tree", 2 * n - 1), size, fit) == pytest.approx(4 * log * whole)


def test_ranks_that_fold_take_two_steps_more() -> None:
    fit = AlphaBeta(2.0, 0.5)
    assert collective_time(collective("halving_doubling", 3), 840, fit) == 2 * (2 + 420) + 2 * (2 + 210)
    assert collective_time(collective("server", 3, root=2), 840, fit) == 4 * (2 + 420)


def test_links_between_hosts_may_be_slower() -> None:
    """By the two-link formula of the hierarchy, L = 4 ranks a host."""
    program = compile_collective(collective("hierarchical", 8, hosts=2), 840, 1)
    slow = messages(program, lambda source, to, size: 100 + 7 * size if source // 4 != to // 4 else 2 + size / 2)
    assert max(m.end for m in slow) == 2 * 3 * (2 + 210 / 2) + 2 * (100 + 7 * 105)


def test_a_training_plan_is_no_collective() -> None:
    with pytest.raises(ValueError, match="not a collective by itself"):
        collective_time(data_parallel(2), 8, AlphaBeta(1.0, 1.0))


def test_a_machine_names_neither_host_nor_user() -> None:
    text = json.dumps(machine())
    for private in (platform.node(), getpass.getuser(), "/"):
        assert private not in text.replace("+00:00", "") or (len(private) < 4 and private != "/")
    assert machine("a laptop")["name"] == "a laptop" and machine()["cores"] >= 1
