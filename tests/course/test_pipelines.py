"""The pipeline explorer in Python: its times against a schedule of our own, its formulas, its measurement.

A browser tests the drawing.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("anywidget")

import bpkit as bp
from bpkit.course.figures.explorers import bundle
from bpkit.course.figures.pipelines import MODULES, SCHEDULES, UNITS, Pipelines, film, pipelines
from bpkit.course.figures.schedules import FORMAT, equal_stages
from bpkit.plan import Plan

pytestmark = pytest.mark.slow

CASES = [(name, p, m) for name in SCHEDULES for p in range(1, 5) for m in range(1, 9)]
RECORDED = Path(__file__).parents[2] / "book/measurements/pipelines-two-core-cpu.json"
CELL = re.compile(r"(\d+)([FBIW])(\d+)")


@pytest.fixture(scope="module")
def figure() -> Pipelines:
    return pipelines()


def read(cell: str) -> tuple[int, str, int]:
    """A pass's stage, kind and microbatch."""
    found = CELL.fullmatch(cell)
    assert found, cell
    return int(found[1]), found[2], int(found[3])


def sources(cell: str, stages: int, kinds: set[str]) -> tuple[list[str], list[str]]:
    """What a pass needs by the definition of backpropagation: of its own stage, and of a neighbour."""
    stage, kind, mb = read(cell)
    back = "I" if "I" in kinds else "B"
    if kind == "F":
        return [], [f"{stage - 1}F{mb}"] * (stage > 0)
    if kind == "W":
        return [f"{stage}I{mb}"], []
    return [f"{stage}F{mb}"], [f"{stage + 1}{back}{mb}"] * (stage + 1 < stages)


def scheduled(rows: list[list[str]], stages: int, steps: int) -> list[list[list[int]]]:
    """When each pass begins in each step, if it begins as soon as its row and what it needs allow."""
    kinds = {read(cell)[1] for row in rows for cell in row}
    ends: dict[tuple[int, str], int] = {}
    free, at = [0] * len(rows), [0] * len(rows)
    begins: list[list[list[int]]] = [[[] for _ in rows] for _ in range(steps)]
    while any(at[r] < steps * len(row) for r, row in enumerate(rows)):
        moved = False
        for r, row in enumerate(rows):
            while at[r] < steps * len(row):
                step, cell = at[r] // len(row), row[at[r] % len(row)]
                needed = [(step, other) for part in sources(cell, stages, kinds) for other in part]
                if not all(one in ends for one in needed):
                    break
                begin = max([free[r], *(ends[one] for one in needed)])
                begins[step][r].append(begin)
                ends[step, cell] = free[r] = begin + UNITS[read(cell)[1]]
                at[r], moved = at[r] + 1, True
        assert moved, "the schedule hangs"
    return begins


def test_times_are_those_of_a_schedule_made_by_hand(figure: Pipelines) -> None:
    assert [(one["name"], one["p"], one["m"]) for one in figure.films] == CASES
    for one in figure.films:
        rows = [row.split() for row in one["rows"]]
        stages = 1 + max(read(cell)[0] for row in rows for cell in row)
        begins = scheduled(rows, stages, 3)
        assert one["begin"] == begins[0], (one["name"], one["p"], one["m"])
        shift = one["period"] / one["unit"]
        assert begins[1:] == [[[b + k * shift for b in row] for row in begins[0]] for k in (1, 2)], "each step is alike"
        lengths = [[UNITS[read(cell)[1]] for cell in row] for row in rows]
        ends = [b + n for row, many in zip(begins[0], lengths, strict=True) for b, n in zip(row, many, strict=True)]
        assert one["makespan"] == one["unit"] * max(ends)


def test_messages_are_what_backpropagation_needs_of_other_ranks(figure: Pipelines) -> None:
    for one in figure.films:
        rows = [row.split() for row in one["rows"]]
        cells = [(rank, cell) for rank, row in enumerate(rows) for cell in row]
        stages, kinds = 1 + max(read(cell)[0] for _, cell in cells), {read(cell)[1] for _, cell in cells}
        for (rank, cell), need in zip(cells, [need for row in one["needs"] for need in row], strict=True):
            abroad = [other for other in sources(cell, stages, kinds)[1] if other not in rows[rank]]
            assert ([cells[need][1]] if need >= 0 else []) == abroad, (one["plan"], cell)


def test_formulas_hold_where_they_are_given_and_nowhere_else(figure: Pipelines) -> None:
    limit = {"interleaved": lambda p: 1.5 * (p - 1), "zero_bubble_h1": lambda p: p - 1}
    for one in figure.films:
        p, m, known = one["p"], one["m"], one["formula"]
        bubble = one["period"] - 3 * m
        if known["bubble"] is None:
            assert bubble > limit.get(one["name"], lambda p: 0)(p), one["plan"]
        else:
            assert bubble == pytest.approx(known["bubble"]), one["plan"]
        assert known["peak"] is None or known["peak"] == one["peak"], one["plan"]
    assert sum(one["formula"]["bubble"] is not None for one in figure.films) > 150


def test_random_picks_agree_with_the_simulator_and_the_compiler() -> None:
    for name, p, m in random.Random(0).sample(CASES, 12):
        one, plan = film(name, p, m), SCHEDULES[name](p, m)
        unit = one["unit"]
        trace = bp.simulate.simulate(plan, bp.simulate.Times(unit, unit, unit), steps=6)
        assert one["period"] == pytest.approx(bp.measure.period(trace))
        assert one["period"] - 3 * m == pytest.approx(bp.measure.bubble(trace).max()), "a rank's own bubble in a step"
        assert one["peak"] == [unit * n for n in bp.plan.compile(plan, equal_stages(8)).peak]
        assert str(plan).startswith(f"plan {one['plan']}\n") and isinstance(plan, Plan)


def test_it_opens_as_asked_with_the_answer_hidden(figure: Pipelines) -> None:
    assert repr(figure) == "Pipelines(gpipe, 4 ranks, 8 microbatches)"
    assert (figure.skipped, figure.shown, figure.recorded, figure.measurable) == (False, [], [], True)
    assert len(json.dumps(figure.films)) < 150_000
    assert bp.course.pipelines is pipelines


@pytest.mark.parametrize("asked", [("star", 4, 8), ("gpipe", 5, 8), ("gpipe", 4, 0)])
def test_refuses_what_it_has_not(asked: tuple[str, int, int]) -> None:
    with pytest.raises(ValueError, match="choose one of naive, .*zb_v"):
        pipelines(None, *asked)


def test_refuses_what_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no measurement of pipelines"):
        pipelines(tmp_path)
    with pytest.raises(ValueError, match="no measurement of pipelines"):
        pipelines(tmp_path / "missing.json")
    (tmp_path / "pipelines-x.json").write_text('{"format": "bpkit-scaling/1"}')
    with pytest.raises(ValueError, match=r'pipelines-x\.json .*"format" must be'):
        pipelines(tmp_path)


def test_the_recorded_run_is_of_plans_of_the_figure(figure: Pipelines) -> None:
    (run,) = pipelines(RECORDED.parent).recorded
    assert run["machine"]["cores"] == 2 and run["machine"]["torch"] and run["machine"]["date"]
    plans = {one["plan"]: one for one in figure.films if one["p"] in (1, 2, 4) and one["m"] in (4, 8)}
    assert {point["plan"] for point in run["points"]} == set(plans)
    for point in run["points"]:
        holds(point, plans[point["plan"]]["rows"], run["experiment"]["repetitions"])


def holds(point: dict[str, Any], rows: list[str], repetitions: int) -> None:
    """What must be true of a measured plan, whatever the machine."""
    assert len(point["step_s"]["samples"]) == repetitions
    assert sum(point["parts"].values()) == pytest.approx(point["step_s"]["median"])
    assert 0 < point["unit_s"] < point["step_s"]["median"] and point["predicted_s"] > 0
    for rank, row in enumerate(rows):
        mine = [event for event in point["timeline"] if event[0] == rank]
        assert [event[1] for event in mine if not event[1].endswith("UPDATE")] == row.split()
        assert all(b[2] >= a[3] - 1 and a[3] >= a[2] >= 0 for a, b in zip(mine, mine[1:], strict=False)), "in order"


def test_measure_runs_the_chosen_plan_on_workers() -> None:
    figure = pipelines(None, "zb_v", 2, 3, network=equal_stages(16))
    figure.measure()
    assert figure.wait(60) and figure.error == "", figure.error
    (run,) = figure.own
    assert (figure.phase, run["format"], run["machine"]["cores"] > 0) == ("measured", FORMAT, True)
    (point,) = run["points"]
    chosen = next(one for one in figure.films if (one["name"], one["p"], one["m"]) == ("zb_v", 2, 3))
    assert point["plan"] == chosen["plan"]
    holds(point, chosen["rows"], 3)
    json.dumps(run)


def test_stop_ends_the_measurement() -> None:
    figure = pipelines(None, "gpipe", 2, 4, network=equal_stages(512))
    figure.measure()
    figure.stop()
    assert figure.wait(30)
    assert (figure.phase, figure.own) == ("stopped", [])


def test_the_bundle_is_one_module_and_every_word_is_in_a_catalogue() -> None:
    source = bundle(*MODULES)
    assert Pipelines._esm == source
    assert not [line for line in source.splitlines() if line.startswith("import ")]
    own = bundle("pipelines_words", "pipelines_view", "pipelines_lanes", "pipelines_panels", "pipelines")
    used = set(re.findall(r'\bsay\(\s*"(\w+)"', own)) | set(SCHEDULES) | set(UNITS)
    used |= {f"about{name[0].upper()}{name[1:]}" for name in SCHEDULES}
    used |= {f"formula{name[0].upper()}{name[1:]}" for name in SCHEDULES}
    used |= {f"say{kind}" for kind in UNITS} | {f"{key}.other" for key in re.findall(r'sayCount\("(\w+)"', own)}
    used |= set(re.findall(r'"((?:row|column|verdict|predict)[A-Z]\w+)"', own))
    catalogue = set(re.findall(r'^\s+"?([\w.]+)"?: ', bundle("pipelines_words", "pipelines"), re.MULTILINE))
    assert len(used) > 60 and used <= catalogue, used - catalogue
