"""The plan as a value: text, mesh, grid, and what does not fit."""

import numpy as np
import pytest

import bpkit as bp
from bpkit.plan import Action, Mesh, Plan, data_parallel, grid
from bpkit.plan.checker.hazards import hazards

from .hand_written import PIPELINE_1F1B, plans


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: plan.name)
def test_text_reads_back_with_the_same_digest(plan):
    again = Plan.parse(str(plan))
    assert again == plan
    assert again.digest == plan.digest


def test_the_readme_plan():
    rows = bp.plan.data_parallel(2, buckets=2).rows
    assert [" ".join(map(str, row)) for row in rows] == [
        "0ZERO 1ZERO 0F0 1F0 1LOSS0 1B0 1REDUCE_GRAD 0B0 0REDUCE_GRAD 1UPDATE 0UPDATE"
    ]


def test_one_worker_reduces_nothing():
    assert "REDUCE_GRAD" not in str(bp.plan.data_parallel(1, buckets=3))


def test_accumulation_reduces_once_after_the_last_microbatch():
    row = [str(a) for a in bp.plan.data_parallel(2, buckets=2, microbatches=3).rows[0]]
    assert row.count("1REDUCE_GRAD") == 1
    assert row.index("1REDUCE_GRAD") == row.index("1B2") + 1


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_numbers_below_one_are_refused(bad):
    with pytest.raises(ValueError, match="workers must be a whole number of at least 1"):
        bp.plan.data_parallel(bad)


def test_unknown_merge_names_the_choices():
    with pytest.raises(ValueError, match="unknown merge 'median': choose one of mean, mean-of-means, sum"):
        bp.plan.data_parallel(2, merge="median")


def test_a_wrong_line_of_text_is_named():
    with pytest.raises(ValueError, match=r"line 2 of the plan, 'mesh data=x'"):
        Plan.parse("plan p\nmesh data=x\nstages 1\nrow 0F0")
    with pytest.raises(ValueError, match=r"line 6 .*unknown kind"):
        Plan.parse("plan p\nmesh data=1\nstages 1\nmicrobatches 1\nmerge mean\nrow 0G0")


def test_rows_must_fit_the_mesh():
    row = (Action(0, "F", 0),)
    with pytest.raises(ValueError, match="2 rows, but a mesh of data=2 pipeline=1 tensor=1 needs 1"):
        Plan("p", (row, row), 1, Mesh(data=2))
    with pytest.raises(ValueError, match="stages 0 to 0"):
        Plan("p", ((Action(0, "F", 0), Action(1, "F", 0)),), 1)
    with pytest.raises(ValueError, match="microbatches 0 to 0"):
        Plan("p", ((Action(0, "F", 1),),), 1)


def test_mesh_ranks_and_groups():
    mesh = Mesh(data=2, pipeline=3, tensor=2)
    assert [mesh.rank(at) for at in mesh.coordinates()] == list(range(12))
    assert mesh.group(0, "tensor") == (0, 1)
    assert mesh.group(0, "data") == (0, 2)
    assert mesh.group(0, "pipeline") == (0, 4, 8)
    assert mesh.group(7, "data") == (5, 7)
    with pytest.raises(ValueError, match="Mesh: tensor must be a whole number of at least 1"):
        Mesh(tensor=0)


def test_the_grid_marks_a_cell():
    text = grid(Plan.parse(PIPELINE_1F1B), (1, 5), around=3)
    assert ">>1SEND_B0<<" in text
    assert text.count("\n") == 2


def test_hazards_of_data_parallelism():
    row = bp.plan.data_parallel(2, buckets=2).rows[0]
    index = {str(action): i for i, action in enumerate(row)}
    waits = {str(action): set(w) for action, w in zip(row, hazards(row), strict=True)}
    assert index["1REDUCE_GRAD"] not in waits["0B0"]  # this is the overlap
    assert index["1REDUCE_GRAD"] in waits["0REDUCE_GRAD"]  # one stream, in order
    assert index["1REDUCE_GRAD"] in waits["1UPDATE"]
    assert index["0B0"] in waits["0REDUCE_GRAD"]


def test_parts_that_do_not_overlap_do_not_wait():
    row = [
        Action.parse(t) for t in ("0SEND_G[0/4]>1", "0ADD_G[1/4]<1", "0ADD_G[0/4]<1", "0UPDATE[3/4]", "0UPDATE[0:2/4]")
    ]
    waits = hazards(row)
    assert 0 not in waits[1]
    assert 0 in waits[2]
    assert waits[3] == ()
    assert set(waits[4]) >= {1, 2}


def test_whole_numbers_of_numpy_are_taken() -> None:
    two = np.int64(2)
    plan = data_parallel(two, microbatches=two)
    assert plan == data_parallel(2, microbatches=2) and "np" not in str(plan.name)
    assert Plan.parse(str(plan)) == plan
    for wrong in (2.0, True, "2", np.float64(2)):
        with pytest.raises(ValueError, match="workers must be a whole number of at least 1"):
            data_parallel(wrong)


LAYOUT = bp.nn.tensor_layout(bp.nn.mlp([8, 8, 8, 8]))
IN_PARTS = {"data": 2, "buckets": 2}


@pytest.mark.parametrize(("make", "arguments", "options"), [
    (bp.plan.serial, (2, 2), {}), (data_parallel, (2, 2, "mean", 2), {}), (data_parallel, (2, [1, 2]), {}),
    *((bp.plan.zero, (2, level, 3, 2), {}) for level in (1, 2, 3)), (bp.plan.parameter_server, (3, 2, 2), {}),
    (bp.plan.local_sgd, (2, 2, 2), {}), (bp.plan.asynchronous_server, (1, [1, 1], 1), {}),
    (bp.plan.naive, (2,), IN_PARTS), (bp.plan.one_f_one_b, (2, 4), {"cuts": [2]}),
    *((make, (2, 3), IN_PARTS) for make in (bp.plan.gpipe, bp.plan.one_f_one_b, bp.plan.zero_bubble_h1,
                                            bp.plan.zero_bubble_h2, bp.plan.zb_v)),
    (bp.plan.interleaved, (2, 4, 2), IN_PARTS), (bp.plan.pipedream, (2, 3), {}),
    (bp.plan.tensor_parallel, (data_parallel(2), 2, LAYOUT), {}), (bp.plan.collective, ("ring", 3), {}),
    (bp.plan.collective, ("hierarchical", 4), {"hosts": 2}),
    (bp.plan.expand, (data_parallel(4, 2), "hierarchical"), {"hosts": 2}),
])  # fmt: skip
def test_a_plan_of_numpys_numbers_is_that_of_pythons(make, arguments, options) -> None:
    def numpys(value: object) -> object:
        return np.int64(value) if type(value) is int else np.array(value) if isinstance(value, list) else value

    plan = make(*arguments, **options)
    found = make(*map(numpys, arguments), **{name: numpys(value) for name, value in options.items()})
    assert found == plan and str(found) == str(plan) and found.digest == plan.digest
    assert repr(found) == repr(plan)  # of numbers that are Python's


def test_cuts_are_whole_numbers() -> None:
    for wrong in ("12", [1.5], [1, "2"]):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            data_parallel(2, wrong)
    with pytest.raises(ValueError, match="buckets must be a whole number of at least 1, not 2.0"):
        data_parallel(2, 2.0)
