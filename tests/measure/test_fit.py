"""The alpha-beta fit, the time of collectives, and the description of the machine."""

from __future__ import annotations

import getpass
import json
import platform

import numpy as np
import pytest

from bpkit import Cluster
from bpkit.measure import alpha_beta, link_times, machine
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
             "binomial": 2 * log * whole,
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


# -- several repetitions, residuals, additions


SIZES = [float(4**k) for k in range(2, 11)]


def turns(alpha: float, beta: float, repetitions: int, noise: float, seed: int = 0) -> np.ndarray:
    """Times of each size in each of so many turns."""
    random = np.random.default_rng(seed)
    true = alpha + beta * np.array(SIZES)
    return true[:, None] * np.exp(random.normal(0, noise, (len(SIZES), repetitions)))


def test_the_intervals_of_a_line_hold_its_constants_about_95_times_in_100() -> None:
    fits = [alpha_beta(SIZES, turns(5e-6, 1e-9, 10, 0.05, seed)) for seed in range(40)]
    for of, true in (("alpha_interval_s", 5e-6), ("beta_interval_s_per_byte", 1e-9)):
        covered = [low <= true <= high for low, high in (getattr(fit, of) for fit in fits)]
        assert sum(covered) >= 33
        assert all(high - low < 0.2 * true for low, high in (getattr(fit, of) for fit in fits))
    assert "us [" in repr(fits[0]) and "GB/s [" in repr(fits[0])


def test_residuals_show_what_no_line_fits() -> None:
    times = 5e-6 + 1e-9 * np.array(SIZES) * (1 + 0.5 * (np.array(SIZES) > 1e5))
    fit = alpha_beta(SIZES, times)
    assert max(map(abs, fit.residuals)) == pytest.approx(fit.worst) and fit.worst > 0.1
    assert min(fit.residuals) < -0.05 and max(fit.residuals) > 0.05
    assert fit.alpha_interval_s is None  # one time a size has no interval
    assert f"{100 * fit.residuals[-1]:+.0f} %" in fit._repr_html_()


@pytest.mark.parametrize(("sizes", "repetitions"), [(7, 20), (9, 9)])
def test_few_sizes_or_repetitions_have_no_interval(sizes: int, repetitions: int) -> None:
    fit = alpha_beta(SIZES[:sizes], turns(5e-6, 1e-9, repetitions, 0.05)[:sizes])
    assert fit.alpha_interval_s is None and fit.alpha_s == pytest.approx(5e-6, rel=0.1)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_a_ring_adds_in_its_first_half(n: int) -> None:
    size, fit = 840, AlphaBeta(3.0, 0.5)
    expected = 2 * (n - 1) * (3.0 + 0.5 * size / n) + (n - 1) * 0.25 * size / n
    assert collective_time(collective("ring", n), size, fit, 0.25) == pytest.approx(expected)
    assert collective_time(collective("all_gather", n), size, fit, 0.25) == collective_time(
        collective("all_gather", n), size, fit)  # fmt: skip


def test_a_server_adds_one_gradient_after_the_other() -> None:
    """The messages of n - 1 workers arrive at one link; the server adds each before it takes the next."""
    found = messages(compile_collective(collective("server", 4), 100, 1), lambda *_: 1.0, 0.02)
    assert [m.end - m.start for m in found] == pytest.approx([3.0] * 3 + [1.0] * 3)


# -- measured


def test_link_times_has_every_size_in_every_turn() -> None:
    sizes = [64, 256, 1024, 4096, 16384, 65536, 262144, 1048576]
    with Cluster(2) as cluster:
        found = link_times(cluster, sizes, 10)
    assert found.workers == 2 and found.sizes_bytes == tuple(sizes)
    for times in (found.message_s, found.all_reduce_s, found.add_s):
        assert [len(own) for own in times] == [10] * 8 and all(second > 0 for own in times for second in own)
    assert min(found.message_s[-1]) > min(found.message_s[0])  # on busy cores a median is another's
    assert found.link.alpha_interval_s is not None and len(found.link.residuals) == 8
    # A message of a megabyte is copied in and out; an addition of it reads two and writes one.
    assert 1e-12 < found.gamma.beta_s_per_byte < 1e-7 and 1e-12 < found.link.beta_s_per_byte < 1e-7


@pytest.mark.parametrize(
    ("workers", "sizes", "message"),
    [(1, [4], "at least two workers"), (2, [6], "multiples of 4"), (2, [], "multiples of 4"), (2, [0], "at least 4")],
)
def test_link_times_refuses(workers: int, sizes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        link_times(Cluster(workers), sizes)
