"""The alpha-beta fit, the ring's time, and the description of the machine."""

from __future__ import annotations

import getpass
import json
import platform

import pytest

from bpkit.measure import alpha_beta, machine
from bpkit.measure.fit import AlphaBeta, ring_time


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


def test_ring() -> None:
    fit = AlphaBeta(2.0, 0.5)
    assert ring_time(1, 100, fit) == 0
    assert ring_time(2, 100, fit) == 2 * (2 + 25)
    assert ring_time(4, 100, fit) == pytest.approx(6 * 2 + 2 * 3 / 4 * 100 * 0.5)
    with pytest.raises(ValueError, match="at least one worker"):
        ring_time(0, 100, fit)


def test_a_machine_names_neither_host_nor_user() -> None:
    text = json.dumps(machine())
    for private in (platform.node(), getpass.getuser(), "/"):
        assert private not in text.replace("+00:00", "") or (len(private) < 4 and private != "/")
    assert machine("a laptop")["name"] == "a laptop" and machine()["cores"] >= 1
