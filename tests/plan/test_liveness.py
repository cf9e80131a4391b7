"""Liveness: what lives how long in a row, by hand; and what waits for what, the same for all who read a plan."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

import bpkit as bp
from bpkit.plan import Action, Program, compile
from bpkit.plan.action import Buffer
from bpkit.plan.checker.hazards import hazards
from bpkit.plan.liveness import first_writes, forward_slots, given_back, loans, waits, weight_copies
from bpkit.run.engine.host import Executor
from bpkit.simulate import events, simulate
from tests.plan.test_pipeline import OPTIONS, SCHEDULES
from tests.run import test_models


def row(text: str) -> tuple[Action, ...]:
    return tuple(map(Action.parse, text.split()))


def texts(actions: tuple[Action, ...], indices: frozenset[int]) -> list[str]:
    return [f"{i} {actions[i]}" for i in sorted(indices)]


@pytest.mark.parametrize(("text", "overwriting", "emptying"), [
    ("0ZERO 0F0 0LOSS0 0B0 0F1 0LOSS1 0B1 0UPDATE", ["3 0B0"], []),
    ("0ZERO 0F0 0LOSS0 0I0 0W0 0REDUCE_GRAD 0UPDATE", ["4 0W0"], []),
    ("0ZERO 1ZERO 1B0 0B0 1UPDATE 0UPDATE", ["2 1B0", "3 0B0"], []),
    ("0ZERO 0ADD_G<1 0B0 0UPDATE", [], ["0 0ZERO"]),  # it is read before it is written
    ("0ZERO 0UPDATE", [], ["0 0ZERO"]),
    ("0ZERO 0NORM 0B0", [], ["0 0ZERO"]),
    ("0ZERO 0B0 0SCATTER_GRAD 0B1 0SCATTER_GRAD 0NORM 0UPDATE", ["1 0B0", "2 0SCATTER_GRAD", "3 0B1"], []),
    ("0ZERO 0B0 0SCATTER_GRAD 0SCATTER_GRAD 0UPDATE", ["1 0B0", "2 0SCATTER_GRAD"], ["2 0SCATTER_GRAD"]),
    ("0ZERO 0B0 0SCATTER_GRAD 0SEND_G>1 0UPDATE", ["1 0B0", "2 0SCATTER_GRAD"], ["2 0SCATTER_GRAD"]),
    ("0ZERO 0B0 0SCATTER_GRAD 0UPDATE 0ZERO 0B1 0SCATTER_GRAD 0UPDATE",
     ["1 0B0", "2 0SCATTER_GRAD", "5 0B1", "6 0SCATTER_GRAD"], []),
])  # fmt: skip
def test_the_first_write_of_a_gradient(text, overwriting, emptying):
    first, empty = first_writes(row(text))
    assert (texts(row(text), first), texts(row(text), empty)) == (overwriting, emptying)


def test_a_sum_of_copies_touches_all_stages_that_hold_one():
    actions = row("0ZERO 1ZERO 1B0 0SUM_TIED 0B0 0UPDATE 1UPDATE")
    assert texts(actions, first_writes(actions)[1]) == ["0 0ZERO"]


def test_what_is_received_is_given_back_by_its_last_reader():
    actions = row("1RECV_F0 1F0 1SEND_F0 1RECV_F1 1RECV_B0 1F1 1I0 1SEND_B0 1W0 1SEND_F1 1RECV_B1 1B1 1SEND_B1")
    back = given_back(actions)
    assert [str(actions[i]) for i, keys in enumerate(back) if keys] == ["1W0", "1B1"]
    assert set(back[8]) == {Buffer("A", 1, 0), Buffer("D", 2, 0)} and loans(actions) == {("RECV_F", 1): 2,
                                                                                         ("RECV_B", 1): 1}


def test_a_slot_is_free_after_the_backward_and_after_what_it_gave_has_gone():
    actions = row("0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0F2 0SEND_F2 0RECV_B1 0B1 0RECV_B2 0B2")
    assert forward_slots(actions) == {(0, 0): 0, (0, 1): 1, (0, 2): 0}
    assert 1 in waits(actions)[6]  # 0F2 writes where 0SEND_F0 reads
    late = row("0F0 0RECV_B0 0B0 0F1 0SEND_F0 0SEND_F1 0RECV_B1 0B1")
    assert forward_slots(late) == {(0, 0): 0, (0, 1): 1}


def test_copies_of_weights_are_as_many_as_a_backward_needs():
    used, copies = weight_copies(row("0F0 0F1 0B0 0UPDATE 0F2 0B1 0UPDATE 0B2 0UPDATE"))
    assert copies == {0: 2} and used[3] == (0, 1) and used[4] == (1, 1) and used[5] == (0, 0) and used[8][1] == 0


def programs() -> Iterator[Program]:
    for make in SCHEDULES.values():
        for options in OPTIONS:
            plan = make(3, 8, **options)
            yield compile(plan, bp.nn.mlp([4] * (plan.stages + 1)))
    for network, _ in test_models.MODELS.values():
        for plan in test_models.plans(network):
            yield compile(plan, network)


def test_the_simulator_the_executor_and_the_program_wait_for_the_same(monkeypatch):
    """Of earlier compute the executor needs no wait: a row runs it in order."""
    simulated: list[events.Rank] = []
    made = events.Rank
    monkeypatch.setattr(events, "Rank", lambda *args: simulated.append(made(*args)) or simulated[-1])
    slots = 0
    for program in programs():
        simulated.clear()
        simulate(program, steps=1)
        for rank, at in zip(simulated, program.plan.mesh.coordinates(), strict=True):
            instructions = program.row(at)
            needs = [tuple(i for i in needs if rank.row[i].verb.stream != "compute") for needs in rank.waits]
            assert needs == [step.waits for step in instructions], program.plan.name
            executor = Executor(instructions, [lambda: None] * len(instructions), SimpleNamespace())
            assert needs == [needs for _, needs, _ in executor._steps], program.plan.name
            slots += rank.waits != hazards(rank.row, program.plan)
    assert slots > 50  # rows in which something waits for a slot
