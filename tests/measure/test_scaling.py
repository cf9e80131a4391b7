"""Scaling: the order of runs, the figures, the file, refusals; and one small real measurement."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bpkit as bp
from bpkit.measure import FORMAT, Scaling, experiment
from bpkit.plan import Plan
from bpkit.run.cluster import TrainResult
from bpkit.run.errors import Stopped
from bpkit.run.processes import devices

from .made import PERIOD, repeated, result, trace

POINT = {
    "workers", "batch", "step_s", "throughput", "speedup", "efficiency", "parts", "hidden_communication", "bytes_sent",
    "payload_bytes", "algorithm", "time_to_accuracy_s", "steps_to_accuracy", "final_loss", "timeline",
    "memory_bytes",
}  # fmt: skip


class FakeCluster:
    """Stands in for a cluster: step times follow `periods`, one a repetition; notes what is called."""

    calls: list[tuple[int, int, int | None]]
    closed: list[int]
    periods: dict[int, list[int]]
    devices: set[str]

    def __init__(self, workers: int, backend: str, threads: int, timeout: float, device: str) -> None:
        self.workers, self.runs = workers, 0
        self.devices.add(device)

    def __enter__(self) -> FakeCluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed.append(self.workers)

    def train(
        self, network: Any, data: Any, plan: Plan, *, batch: int, target: float | None, **given: Any
    ) -> TrainResult:
        self.calls.append((self.workers, batch, None if target is None else given["evaluate_every"]))
        given["progress"](0.5, "step 3 of 6")
        times = self.periods[self.workers]
        period = times[min(self.runs, len(times) - 1)]
        self.runs += 1
        if self.workers == 1:
            made = trace((0, s, "0F0", period * s, period * s + period // 2, 0, period // 4, 0) for s in range(5))
        else:
            made = repeated(starts=[period * s for s in range(5)], ranks=self.workers)
        accuracies = ((5, 0.9), (10, 0.98)) if target else ()
        times_s = np.full(12, 1e-3)
        return result(made, plan, batch, accuracies=accuracies, step_times=times_s)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeCluster]:
    """Put the fake in place of `Cluster`."""
    FakeCluster.calls, FakeCluster.closed, FakeCluster.devices = [], [], set()
    FakeCluster.periods = {1: [3 * PERIOD, 2 * PERIOD, 4 * PERIOD], 2: [PERIOD]}
    monkeypatch.setattr(experiment, "Cluster", FakeCluster)
    return FakeCluster


def measure(**settings: Any) -> Scaling:
    """A measurement of a small network with the fake cluster."""
    given: dict[str, Any] = {"workers": [1, 2], "batch": 64, "repetitions": 3, "progress": lambda fraction, text: None}
    return bp.scaling(bp.nn.mlp([64, 8, 10]), bp.data.digits(), **{**given, **settings})


def test_runs_are_interleaved_and_rotate(fake: type[FakeCluster]) -> None:
    measure()
    assert [n for n, _, every in fake.calls if every is None] == [1, 2, 2, 1, 1, 2]
    assert [(n, every) for n, _, every in fake.calls[6:]] == [(1, 5), (2, 5)]  # to the target, at the end
    assert sorted(fake.closed) == [1, 2]


def test_speedup_is_against_the_best_serial_run(fake: type[FakeCluster]) -> None:
    found = measure()
    one, two = found.points
    assert one.step_s.samples == pytest.approx((3e-4, 2e-4, 4e-4)) and one.step_s.median == pytest.approx(3e-4)
    assert two.step_s.median == pytest.approx(1e-4)
    assert two.speedup == pytest.approx(2.0) and two.efficiency == pytest.approx(1.0)
    assert one.speedup == pytest.approx(2 / 3)
    assert two.throughput == pytest.approx(64 / 1e-4)


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cpu"), (2, "cuda")])
def test_all_runs_are_on_one_kind_of_device(
    fake: type[FakeCluster], monkeypatch: pytest.MonkeyPatch, gpus: int, device: str
) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: gpus)
    measure(target=None)
    assert fake.devices == {device}


def test_weak_scaling_keeps_the_batch_of_a_worker(fake: type[FakeCluster]) -> None:
    fake.periods = {1: [PERIOD], 2: [PERIOD], 4: [2 * PERIOD]}
    found = measure(scaling="weak", workers=[2, 4], repetitions=1)
    assert [(n, batch) for n, batch, _ in fake.calls[:3]] == [(1, 64), (2, 128), (4, 256)]
    assert [p.speedup for p in found.points] == pytest.approx([1, 2, 2])
    assert [p.efficiency for p in found.points] == pytest.approx([1, 1, 0.5])


def test_time_to_accuracy_is_the_sum_of_the_steps_up_to_it(fake: type[FakeCluster]) -> None:
    point = measure().point(2)
    assert point.steps_to_accuracy == 10 and point.time_to_accuracy_s == pytest.approx(10e-3)
    point = measure(target=0.99).point(2)
    assert point.steps_to_accuracy is None and point.time_to_accuracy_s is None
    assert measure(target=None).point(2).time_to_accuracy_s is None


def test_the_timeline_is_the_step_nearest_to_the_median(fake: type[FakeCluster]) -> None:
    timeline = measure().point(2).timeline
    assert timeline[0] == (0, "1F0", 0.0, 30.0, 0.0, 25.0)
    assert (0, "1UPDATE", 62.0, 90.0, 18.0) in [event[:5] for event in timeline] and len(timeline) == 9


def test_file_and_back(fake: type[FakeCluster], tmp_path: Path) -> None:
    found = measure()
    path = found.save(tmp_path / "one.json")
    assert Scaling.load(path) == found
    read = json.loads(path.read_text())
    assert read == found.to_json() and read["format"] == FORMAT
    assert set(read["machine"]) == {
        "name", "cpu", "cores", "steal", "gpus", "os", "python", "torch", "numpy", "bpkit", "date",
    }  # fmt: skip
    assert set(read["experiment"]) >= {
        "network", "parameters", "data", "batch", "scaling", "plan", "backend", "threads_per_worker", "steps",
        "repetitions", "optimizer", "seed", "target_accuracy", "steal",
    }  # fmt: skip
    for point in read["points"]:
        assert set(point) == POINT
        assert set(point["step_s"]) == {"median", "q1", "q3", "samples"}
        assert list(point["parts"]) == ["compute", "waiting_for_core", "exposed_communication", "idle"]
        assert sum(point["parts"].values()) == pytest.approx(point["step_s"]["median"], rel=1e-12)
    path.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=r'one\.json is not a measurement.*"format" must be "bpkit-scaling/1"'):
        Scaling.load(path)


def test_table(fake: type[FakeCluster]) -> None:
    found = measure(plan=lambda n: bp.plan.data_parallel(n, buckets=2))
    text = repr(found)
    for words in ("1 (serial)", "speedup", "2.00", "100 %", "not counted", "data_parallel(n, buckets=2)", "to 97%"):
        assert words in text
    assert found._repr_html_().count("<tr>") == 3
    with pytest.raises(KeyError, match="8 workers were not measured"):
        found.point(8)


def test_progress_rises_to_one(fake: type[FakeCluster]) -> None:
    told: list[tuple[float, str]] = []
    measure(progress=lambda fraction, text: told.append((fraction, text)))
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    assert any("repetition 2 of 3, 2 workers: step 3 of 6" in text for _, text in told)


def test_a_bar_where_somebody_looks(fake: type[FakeCluster], monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm.auto")
    drawn: list[int] = []
    monkeypatch.setattr("bpkit.run.progress.somebody_looks", lambda: True)
    monkeypatch.setattr(tqdm.tqdm, "update", lambda bar, n=1: drawn.append(n) or setattr(bar, "n", bar.n + n))
    measure(progress=None)
    assert sum(drawn) == 100 and min(drawn) >= 0


def test_stop_ends_it_and_closes_the_workers(fake: type[FakeCluster]) -> None:
    stop = threading.Event()

    def tell(fraction: float, text: str) -> None:
        if fraction > 0.3:
            stop.set()

    with pytest.raises(Stopped):
        measure(progress=tell, stop=stop)
    assert sorted(fake.closed) == [1, 2] and len(fake.calls) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": []}, "workers is empty"),
        ({"workers": [1, 0]}, "at least 1, not 0"),
        ({"workers": [1, -2]}, "at least 1, not -2"),
        ({"workers": [True]}, "not True"),
        ({"scaling": "strange"}, "scaling must be"),
        ({"batch": 0}, "batch must be a whole number of at least 1, not 0"),
        ({"repetitions": 0}, "repetitions must be"),
        ({"steps": 1}, "steps must be a whole number of at least 2"),
        ({"warmup": -1}, "warmup must be"),
        ({"target": 97}, "target is an accuracy"),
        ({"target": "high"}, "target, an accuracy, must be a finite number"),
        ({"seed": "s"}, "seed must be a whole number"),
        ({"lr": "fast"}, "a learning rate must be a finite number"),
        ({"batch": 1000, "scaling": "weak"}, "global batch of 2000 .weak scaling, 2 workers. is larger than digits"),
        ({"lr": 0.1, "optimizer": bp.optim.SGD(0.1)}, "not both"),
        ({"plan": lambda n: bp.plan.data_parallel(n + 1)}, "a plan for 3 workers"),
        ({"plan": lambda n: bp.plan.data_parallel(n, buckets=9)}, "9 stages, but the network has only"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    fake: type[FakeCluster], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure(**settings)
    assert not fake.calls


def test_workers_that_are_no_list_and_plans_that_are_no_function(fake: type[FakeCluster]) -> None:
    with pytest.raises(TypeError, match=r"a list of counts, for example \[1, 2, 4\], not 4"):
        measure(workers=4)
    with pytest.raises(TypeError, match="function of the number of workers"):
        measure(plan=bp.plan.data_parallel(2))
    with pytest.raises(TypeError, match="progress must take"):
        measure(progress=1)
    with pytest.raises(TypeError, match="stop must be a threading.Event"):
        measure(stop=True)
    with pytest.raises(TypeError, match="one of bpkit's own"):
        measure(optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1))
    assert not fake.calls


def test_test_samples_are_checked_before_anything_starts(fake: type[FakeCluster]) -> None:
    data = bp.data.digits(test=0)
    with pytest.raises(ValueError, match="has no test samples"):
        bp.scaling(bp.nn.mlp([64, 10]), data, [1, 2], batch=64, target=0.9)
    assert not fake.calls


def test_near_numbers_are_taken(fake: type[FakeCluster]) -> None:
    found = measure(workers=np.array([1, 2]), batch=64.0, repetitions=np.int64(1), steps=np.int32(6))
    assert found.experiment["batch"] == 64 and found.experiment["steps"] == 6


def test_two_real_workers() -> None:
    found = measure(workers=[2], steps=4, warmup=1, repetitions=2, target=0.2, target_steps=20, evaluate_every=2)
    assert [p.workers for p in found.points] == [1, 2]
    serial, two = found.points
    assert serial.bytes_sent == 0 and two.bytes_sent is None and two.payload_bytes > 0
    assert two.final_loss == pytest.approx(serial.final_loss, rel=1e-4)
    assert two.steps_to_accuracy == serial.steps_to_accuracy
    assert two.parts.total == pytest.approx(two.step_s.median)
    assert len(two.step_s.samples) == 2
    # The best repetition of the serial plan is the unit of speedup.
    assert serial.speedup == pytest.approx(min(serial.step_s.samples) / serial.step_s.median)
