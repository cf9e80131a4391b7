"""The explorer in Python: what it reads, and what Measure and Stop do. A browser tests the drawing."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("anywidget")

from bpkit.course.figures.explorers import MODULES, PARTS, Explorer, bundle, check, explorer, fragment, sentence


def measurement(workers: tuple[int, ...] = (1, 2), machine: str = "sample") -> dict[str, Any]:
    """An invented measurement with what the explorer relies on."""
    points = [{"workers": n, "step_s": {"median": 1.0 / n}, "throughput": 10.0 * n, "speedup": float(n),
               "efficiency": 1.0, "parts": dict.fromkeys(PARTS, 0.25 / n)} for n in workers]
    return {"format": "bpkit-scaling/1", "machine": {"name": machine, "cores": 2},
            "experiment": {"network": "n", "data": "d", "plan": "p", "batch": 8}, "points": points}


class Scaling:
    """What `bpkit.measure.scaling` returns, as far as the explorer knows."""

    def to_json(self) -> dict[str, Any]:
        return measurement(machine="mine")


def quick(network: Any, data: Any, *, workers: list[int], progress: Any, **options: Any) -> Scaling:
    """Stands in for a measurement; takes no time."""
    for n in workers:
        progress(n / max(workers), f"{n} workers")
    return Scaling()


def endless(network: Any, data: Any, *, stop: threading.Event, progress: Any, **options: Any) -> Scaling:
    """Runs until it is stopped, for at most ten seconds."""
    progress(0.5, "in the middle")
    stop.wait(10)
    return Scaling()


def until(condition: Any, seconds: float = 5.0) -> None:
    """Wait for a condition that another thread makes true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def test_reads_dicts_files_folders_and_scalings(tmp_path: Path) -> None:
    one = tmp_path / "one.json"
    one.write_text(json.dumps(measurement()))
    (tmp_path / "other.json").write_text('{"rows": []}')
    assert explorer(one).recorded == [measurement()]
    assert explorer(str(tmp_path)).recorded == [measurement()], "a folder holds other files too"
    assert len(explorer([measurement((1, 2, 4)), Scaling(), one]).recorded) == 3
    assert explorer().recorded == []


def test_opens_on_the_largest_count_with_the_answer_hidden() -> None:
    figure = explorer([measurement((1, 2, 4))])
    assert (figure.workers, figure.revealed, figure.measurable) == (4, False, False)


@pytest.mark.parametrize(("bad", "message"), [
    ("missing.json", "no measurement file"),
    ({"format": "other"}, "format"),
    ({**measurement(), "points": []}, "no points"),
    ({**measurement(), "points": [{"workers": 3}]}, "the point for 3 workers lacks"),
])
def test_refuses_what_is_no_measurement(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explorer(bad)


def test_refuses_text_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not JSON"):
        explorer(tmp_path / "bad.json")


@pytest.mark.parametrize("workers", [(), (0, 1), (2, -1), (1.5,), (True,)])
def test_refuses_worker_counts_that_are_none(workers: Any) -> None:
    with pytest.raises(ValueError, match="positive integers"):
        explorer(workers=workers)


def test_refuses_half_of_a_network_and_data() -> None:
    with pytest.raises(ValueError, match="both network= and data="):
        explorer(network=object())
    with pytest.raises(TypeError, match="batch"):
        explorer(batch=3)


def test_repr_is_fixed() -> None:
    assert repr(explorer([measurement()])) == repr(explorer([measurement()])) == "Explorer(1 recorded)"


def test_measure_appends_and_can_run_again() -> None:
    figure = explorer(network=1, data=2, measure=quick)
    for runs in (1, 2):
        figure._receive(figure, {"kind": "measure", "scaling": "strong"}, [])
        assert figure.wait(5)
        assert [one["machine"]["name"] for one in figure.own] == ["mine"] * runs
    assert (figure.phase, figure.error, figure.progress) == ("measured", "", 1.0)


def test_the_callback_returns_at_once_and_stop_ends_the_run() -> None:
    figure = explorer(network=1, data=2, measure=endless)
    start = time.monotonic()
    figure._receive(figure, {"kind": "measure"}, [])
    assert time.monotonic() - start < 0.5
    until(lambda: figure.progress == 0.5)
    assert (figure.phase, figure.status) == ("running", "in the middle")
    figure._receive(figure, {"kind": "measure"}, [])
    figure._receive(figure, {"kind": "stop"}, [])
    assert figure.wait(2)
    assert (figure.phase, figure.own, figure.error, figure.failure) == ("stopped", [], "", None)


def test_a_second_measure_while_one_runs_does_nothing() -> None:
    calls = []

    def count(*args: Any, **options: Any) -> Scaling:
        calls.append(1)
        return endless(*args, **options)

    figure = explorer(network=1, data=2, measure=count)
    figure.measure()
    until(lambda: bool(calls))
    figure.measure()
    figure.stop()
    assert figure.wait(2)
    assert len(calls) == 1


def test_an_error_is_one_sentence_and_the_next_run_works() -> None:
    fail = [True]

    def measure(*args: Any, **options: Any) -> Scaling:
        if fail[0]:
            raise RuntimeError("rank 1 died in 0F0\nTraceback: many lines")
        return quick(*args, **options)

    figure = explorer(network=1, data=2, measure=measure)
    figure.measure()
    assert figure.wait(5)
    assert figure.error == "RuntimeError: rank 1 died in 0F0"
    assert isinstance(figure.failure, RuntimeError) and figure.phase == "failed"
    fail[0] = False
    figure.measure()
    assert figure.wait(5)
    assert (figure.error, len(figure.own)) == ("", 1)


def test_a_worker_s_traceback_is_told_by_its_last_line() -> None:
    message = "rank 1 raised in train():\nTraceback (most recent call last):\n  ...\nKeyError: 'w'\n"
    assert sentence(RuntimeError(message)) == "RuntimeError: rank 1 raised in train(): KeyError: 'w'"
    assert sentence(ValueError()) == "ValueError: no message was given"


def test_a_result_in_another_form_is_named() -> None:
    figure = explorer(network=1, data=2, measure=lambda *args, **options: {"format": "?"})
    figure.measure()
    assert figure.wait(5)
    assert "the new measurement is not a measurement of bp.scaling" in figure.error


def test_settings_reach_the_measurement() -> None:
    seen: dict[str, Any] = {}

    def measure(network: Any, data: Any, **options: Any) -> Scaling:
        seen.update(options, network=network, data=data)
        return Scaling()

    figure = explorer(network="net", data="data", workers=[1, 3], measure=measure, batch=64)
    figure.measure("weak")
    assert figure.wait(5)
    assert (seen["network"], seen["data"], seen["batch"]) == ("net", "data", 64)
    assert (seen["workers"], seen["scaling"]) == ([1, 3], "weak")


def test_without_a_network_measure_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match="network="):
        explorer([measurement()]).measure()


def test_closing_stops_the_run() -> None:
    figure = explorer(network=1, data=2, measure=endless)
    figure.measure()
    figure.close()
    assert figure.wait(2)


def test_the_bundle_is_one_module() -> None:
    source = bundle(*MODULES)
    lines = source.splitlines()
    assert not [line for line in lines if line.startswith("import ")]
    assert [line for line in lines if line.startswith("export ")] == ["export default (() => {"]
    assert Explorer._esm == source


def test_every_word_is_in_the_catalogue() -> None:
    """A key that the catalogue lacks would be drawn as itself."""
    source = bundle(*MODULES)
    used = set(re.findall(r'\bsay\("(\w+)"', source))
    used |= {f"{key}.other" for key in re.findall(r'sayCount\("(\w+)"', source)}
    catalogue = set(re.findall(r'^\s+"?([\w.]+)"?: "', bundle("text", "explorer"), re.MULTILINE))
    assert used and used <= catalogue, used - catalogue


def test_check_takes_the_written_form() -> None:
    assert check(Scaling(), "it") == measurement(machine="mine")


def test_a_fragment_is_the_same_each_time_and_closes_no_script() -> None:
    one, two = (fragment(explorer(measurement(machine="</script>")), loader="x.js") for _ in range(2))
    assert one == two
    assert one.count("</script>") == 3 and one.endswith('<script src="x.js"></script>')
