"""Interleaved repetitions, the ratio of two and its interval, and the noise of the machine."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from bpkit.measure import Point, Ratio, Scaling, interleave, noise, ratio, report
from bpkit.measure.comparison import said

from .made import repeated, result


def made(factor: float, pairs: int, seed: int) -> tuple[list[float], list[float]]:
    """Samples whose true ratio is `factor`, in episodes that hit both of a pair alike."""
    random = np.random.default_rng(seed)
    episode = np.exp(random.normal(0, 0.3, pairs))
    over, under = (np.exp(random.normal(0, 0.05, pairs)) for _ in range(2))
    return (factor * episode * over).tolist(), (episode * under).tolist()


# -- ratio


def test_a_constant_ratio_is_its_own_interval() -> None:
    found = ratio([3.0, 6.0] * 5, [2.0, 4.0] * 5)
    assert (found.median, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert found.resolved and str(found) == "1.50 [1.50, 1.50]"


def test_the_median_is_that_of_the_pairs_not_the_ratio_of_the_medians() -> None:
    a, b = [2.0, 20.0, 200.0] * 4, [1.0, 5.0, 200.0] * 4
    assert ratio(a, b).median == pytest.approx(2.0)
    assert np.median(a) / np.median(b) == 4.0


def test_equal_samples_are_not_resolved() -> None:
    found = ratio([1.0, 2.0, 3.0] * 4, [1.0, 2.0, 3.0] * 4)
    assert not found.resolved and str(found) == "not resolved (1.00 [1.00, 1.00])"


@pytest.mark.parametrize("pairs", [10, 20])
def test_the_interval_covers_the_true_ratio_about_95_times_in_100(pairs: int) -> None:
    """The median's bootstrap is a little too wide with few pairs, never much too narrow."""
    intervals = [ratio(*made(1.07, pairs, seed)) for seed in range(300)]
    covered = np.mean([found.low <= 1.07 <= found.high for found in intervals])
    assert 0.91 <= covered <= 0.99


def test_episodes_that_hit_both_alike_do_not_widen_the_interval() -> None:
    found = ratio(*made(1.3, 20, 0))
    assert 1.2 < found.low < found.median < found.high < 1.4 and found.resolved


def test_the_same_samples_give_the_same_interval_in_any_order() -> None:
    a, b = made(1.1, 15, 3)
    turned = np.random.default_rng(1).permutation(15)
    assert ratio(a, b) == ratio(a, b) == ratio([a[i] for i in turned], [b[i] for i in turned])


def test_turning_the_ratio_round_gives_the_inverse() -> None:
    a, b = made(1.4, 20, 5)
    one, other = ratio(a, b), ratio(b, a)
    assert other.median == pytest.approx(1 / one.median)
    assert (other.low, other.high) == pytest.approx((1 / one.high, 1 / one.low), rel=0.01)


def test_what_1_lies_inside_of_says_so() -> None:
    found = Ratio(1.02, 0.95, 1.08)
    assert str(found) == "not resolved (1.02 [0.95, 1.08])" and not found.resolved
    assert not Ratio(1.0, 1.0, 1.2).resolved and Ratio(0.8, 0.7, 0.99).resolved
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.median = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0] * 9, [1.0] * 9, "at least 10 pairs of samples, better 20, not 9"),
        ([1.0] * 10, [1.0] * 11, "pairs of samples, not 10 and 11"),
        ([0.0] * 10, [1.0] * 10, "samples above 0"),
        ([1.0] * 10, [float("nan")] * 10, "samples above 0"),
    ],
)
def test_samples_that_give_no_interval_are_refused(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratio(a, b)


# -- interleave


def test_every_turn_holds_each_run_once_in_an_order_of_its_own() -> None:
    called: list[str] = []

    def run(name: str) -> float:
        called.append(name)
        return float(len(called))

    found = interleave({name: lambda name=name: run(name) for name in "abc"}, 12)
    assert list(found) == ["a", "b", "c"] and all(len(times) == 12 for times in found.values())
    turns = [called[i : i + 3] for i in range(0, 39, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len({*map(tuple, turns)}) > 3
    kept = sorted(time for times in found.values() for time in times)
    assert kept == [float(n) for n in range(4, 40)]  # the first turn warms up
    for i in range(12):
        assert {(found[name][i] - 4) // 3 for name in "abc"} == {i}


def test_a_run_without_a_time_of_its_own_is_timed() -> None:
    found = interleave({"slow": lambda: time.sleep(0.01), "said": lambda: 7.0}, 3, warmup=0)
    assert all(0.01 <= seconds < 5 for seconds in found["slow"]) and found["said"] == [7.0] * 3


def test_what_cannot_be_interleaved_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        interleave({})
    with pytest.raises(ValueError, match="interleave: repetitions must be a whole number of at least 1, not 0"):
        interleave({"a": lambda: 1.0}, 0)


# -- noise


def test_noise_is_the_spread_of_the_same_work() -> None:
    random = np.random.default_rng(0)
    found = noise(lambda: float(np.exp(random.normal(0, 0.1))))
    assert found.low < 1 < found.high and 0.02 < found.high - found.low < 0.3
    steady = noise(lambda: 0.5, 10)
    assert (steady.low, steady.median, steady.high) == (1.0, 1.0, 1.0)


# -- beside a measurement


def test_a_report_holds_the_steps_against_their_neighbours() -> None:
    """Steps of 100 and 110 us in turn: what looks like noise of 10 % is one number for all pairs."""
    starts = np.cumsum([0] + [100_000, 110_000] * 11).tolist()
    found = report(result(repeated(len(starts), starts)))
    assert found.noise is not None and found.noise.median == pytest.approx(1.1) and found.noise.resolved
    assert "the same work against itself: 1.10 [1.10, 1.10]" in str(found)
    assert found.to_json()["noise"] == pytest.approx({"median": 1.1, "low": 1.1, "high": 1.1})
    assert report(result(repeated(20))).noise is None  # nineteen periods: nine pairs


def test_a_caption_says_nothing_that_is_not_known() -> None:
    assert said(None) == "" and said(None, 0.012) == "; stolen CPU time: 1.2 %"
    assert said(Ratio(1.0, 0.97, 1.04), 0.0) == (
        "; the same work against itself: 1.00 [0.97, 1.04]; stolen CPU time: 0.0 %"
    )


def test_a_scaling_holds_its_repetitions_against_each_other() -> None:
    one = Point.from_json({**POINT, "workers": 1, "step_s": {**SPREAD, "samples": [1.0, 1.1] * 3}})
    two = Point.from_json({**POINT, "workers": 2, "step_s": {**SPREAD, "samples": [0.5] * 6}})
    found = Scaling({}, EXPERIMENT, (one, two))
    assert found.noise is not None and found.noise.median == 1.0 and found.noise.low < 1 < found.noise.high
    assert found.to_json()["noise"] == dataclasses.asdict(found.noise)
    assert "the same work against itself: 1.00 [" in str(found) and "stolen CPU time: 3.0 %" in str(found)
    assert Scaling({}, EXPERIMENT, (one,)).noise is None  # five pairs


SPREAD = {"median": 1.0, "q1": 1.0, "q3": 1.0}
PARTS = {"compute": 1.0, "waiting_for_core": 0.0, "exposed_communication": 0.0, "idle": 0.0}
POINT = {"batch": 8, "throughput": 8.0, "speedup": 1.0, "efficiency": 1.0, "parts": PARTS, "hidden_communication": 0.0,
         "bytes_sent": None, "payload_bytes": 0, "algorithm": "", "time_to_accuracy_s": None, "steps_to_accuracy": None,
         "final_loss": 1.0, "timeline": []}  # fmt: skip
EXPERIMENT = {"batch": 8, "scaling": "strong", "plan": "p", "backend": "shm", "network": "n", "data": "d",
              "target_accuracy": None, "steal": 0.03}  # fmt: skip
