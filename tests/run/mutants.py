"""Random mutants of plans, random correct plans, and what judges them: weights after two steps, against serial."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import bpkit as bp
from bpkit.plan import (
    Action,
    Part,
    Plan,
    check,
    compile,
    data_parallel,
    expand,
    gpipe,
    interleaved,
    local_sgd,
    one_f_one_b,
    parameter_server,
    serial,
    shard_optimizer,
    tensor_parallel,
    zb_v,
    zero,
)  # fmt: skip
from bpkit.plan.action import VERBS

SAMPLES, STEPS, NEAR = 6, 2, 1e-12
TEXT = bp.data.text(length=8)
DIGITS = bp.data.digits(dtype=torch.float64)
MLP = bp.nn.mlp([64, 6, 5, 7, 6, 5, 6, 7, 10], seed=1, dtype=torch.float64)
GPT = bp.nn.gpt(TEXT.vocabulary, 8, width=8, heads=2, layers=1, seed=1, dtype=torch.float64, dropout=0.1)
ALGORITHMS = ("ring", "server", "sharded_server", "tree", "binomial", "halving_doubling")


def of_text(plan: Plan) -> bool:
    """Whether a plan is judged on the GPT: those that split it by tensors or tie its stages."""
    return plan.mesh.tensor > 1 or bool(plan.tied)


def originals() -> list[Plan]:
    """Correct plans to make mutants of, of every kind of action."""
    made = [data_parallel(2, 3, microbatches=2), parameter_server(3, 2, buckets=2), one_f_one_b(2, 3), zb_v(2, 2)]
    made += [expand(data_parallel(n, 2), name) for n in (2, 3) for name in ALGORITHMS]
    made += [expand(data_parallel(4), "hierarchical"), interleaved(2, 3), gpipe(2, 2, recompute=True)]
    made += [one_f_one_b(2, 2, data=2), expand(one_f_one_b(2, 2, data=2), "ring"), local_sgd(2, 2, buckets=2)]
    made += [zero(2, level, units=3, microbatches=2) for level in (1, 2, 3)]
    layout, by_tokens = bp.nn.tensor_layout(GPT), bp.nn.tensor_layout(GPT, sequence=True)
    split = [tensor_parallel(base, 2, layout) for base in (serial(1, 2), data_parallel(2), one_f_one_b(2, 2))]
    split += [shard_optimizer(split[1]), tensor_parallel(one_f_one_b(2, 2, recompute=True), 2, by_tokens)]
    made += [compile(plan, GPT).plan for plan in split]
    normed = (data_parallel(2, 2), zero(2, 2, units=2), parameter_server(2, 2), parameter_server(3, 2, buckets=2))
    made += [compile(plan, MLP, clip=True).plan for plan in normed]
    return [*made, compile(one_f_one_b(2, 2, data=2), MLP, clip=True).plan, compile(split[1], GPT, clip=True).plan]


# -- mutants -----------------------------------------------------------------------------------------------


def any_action(plan: Plan, draw: random.Random) -> Action:
    """Any kind with any stage, microbatch, part and peer."""
    verb = VERBS[kind := draw.choice(list(VERBS))]
    of = draw.choice([2, 3, 4, max(2, plan.mesh.data)])
    low, high = sorted(draw.sample(range(of + 1), 2))
    part = Part(low, high, of) if verb.scope == "part" and draw.random() < 0.5 else None
    mb = draw.randrange(plan.microbatches) if verb.scope == "mb" else None
    return Action(draw.randrange(plan.stages), kind, mb, part, draw.randrange(plan.mesh.data) if verb.peer else None)


def altered(action: Action, plan: Plan, draw: random.Random) -> Action:
    """The same action with one coordinate changed, or of another kind with the same coordinates."""
    changes: list[dict[str, Any]] = [{"stage": draw.randrange(plan.stages)}]
    if action.mb is not None:
        changes.append({"mb": draw.randrange(plan.microbatches)})
    if action.peer is not None:
        changes.append({"peer": draw.randrange(plan.mesh.data)})
    if action.verb.scope == "part":
        changes.append({"part": draw.choice([None, Part(draw.randrange(2), 2, 2), Part(1, 3, 4)])})
    like = [k for k, v in VERBS.items() if (v.scope, bool(v.peer)) == (action.verb.scope, bool(action.verb.peer))]
    changes.append({"kind": draw.choice(like)})
    return replace(action, **draw.choice(changes))


def mutated(rows: list[list[Action]], plan: Plan, draw: random.Random) -> None:
    """One change of the rows, in place."""
    row, other = draw.choice([r for r in rows if r]), draw.choice(rows)
    at = draw.randrange(len(row))
    how = draw.choice(["drop", "double", "move", "alter", "insert", "insert", "between", "swap"])
    if how == "drop":
        del row[at]
    elif how == "double":
        row.insert(draw.randrange(len(row) + 1), row[at])
    elif how == "move":
        action = row.pop(at)
        row.insert(draw.randrange(len(row) + 1), action)
    elif how == "alter":
        row[at] = altered(row[at], plan, draw)
    elif how == "insert":
        row.insert(at, any_action(plan, draw))
    elif how == "between":
        action = row.pop(at)
        other.insert(draw.randrange(len(other) + 1), action)
    elif other:
        there = draw.randrange(len(other))
        row[at], other[there] = other[there], row[at]


def mutant(plan: Plan, draw: random.Random) -> Plan:
    """A plan with one change, or with two."""
    rows = [list(row) for row in plan.rows]
    for _ in range(draw.choice([1, 1, 2])):
        mutated(rows, plan, draw)
    return plan.with_rows(rows)


# -- correct plans -----------------------------------------------------------------------------------------


def correct(draw: random.Random) -> Plan:
    """A random correct plan of at most four workers."""
    n, m, b = draw.randint(2, 4), draw.randint(1, 4), draw.randint(1, 4)
    data = draw.randint(1, 2)
    layout = bp.nn.tensor_layout(GPT, sequence=draw.random() < 0.5)
    made: list[Callable[[], Plan]] = [
        lambda: serial(b, m),
        lambda: data_parallel(n, b, microbatches=m),
        lambda: expand(data_parallel(n, b, microbatches=m), draw.choice(ALGORITHMS)),
        lambda: zero(n, draw.randint(1, 3), b, m, draw.random() < 0.5, draw.random() < 0.5),
        lambda: parameter_server(n, draw.randint(1, n), b),
        lambda: draw.choice([one_f_one_b, gpipe])(2, m, data=data, recompute=draw.random() < 0.5),
        lambda: expand(one_f_one_b(2, m, data=2), draw.choice(ALGORITHMS)),
        lambda: one_f_one_b(n, m),
        lambda: zb_v(2, m),
        lambda: interleaved(2, m),
        lambda: tensor_parallel(draw.choice([serial(1, m), data_parallel(2, 1, microbatches=m)]), 2, layout),
        lambda: tensor_parallel(one_f_one_b(2, m, recompute=draw.random() < 0.5), 2, layout),
    ]
    plan = draw.choice(made)()
    return reordered(compile(plan, GPT).plan if plan.mesh.tensor > 1 else plan, draw)


def reordered(plan: Plan, draw: random.Random) -> Plan:
    """The plan with communication moved to earlier places of its rows, past what it does not wait for."""
    rows = [list(row) for row in plan.rows]
    for _ in range(draw.randrange(12)):
        row = draw.choice(rows)
        at = draw.randrange(1, len(row))
        if row[at].verb.stream != "compute" and apart(row[at - 1], row[at], plan):
            row[at - 1], row[at] = row[at], row[at - 1]
    return plan.with_rows(rows)


def apart(a: Action, b: Action, plan: Plan) -> bool:
    """Whether two actions run on other streams and touch no buffer in common."""

    def touched(action: Action) -> set[tuple[str, int]]:
        every = {*action.verb.reads, *action.verb.writes, *action.verb.frees}
        near = {(t.letter, plan.room(t.letter, stage)) for t in every for stage in plan.near(action, t.letter)}
        return near | {(t.letter, action.stage + t.edge) for t in every if t.letter not in "GP"}

    of_all = {"NORM", "SUM_TIED"} & {a.kind, b.kind}  # these touch the gradients of all stages
    return a.verb.stream != b.verb.stream and not of_all and not touched(a) & touched(b)


# -- the judge -------------------------------------------------------------------------------------------------


@dataclass
class Judge:
    """Runs plans on workers that stay, and compares weights with those that serial, or the original plan, gives.

    Parameters
    ----------
    backend : str
    timeout : float
        Seconds after which a run counts as hung.
    """

    backend: str
    timeout: float = 10.0
    counts: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)
    _clusters: dict[int, bp.Cluster] = field(default_factory=dict)
    _expected: dict[object, Tensor] = field(default_factory=dict)
    _judged: set[str] = field(default_factory=set)

    def weights(self, plan: Plan, text: bool, clip: bool = False) -> Tensor:
        """What two steps of SGD make of a network."""
        if plan.workers not in self._clusters:
            self._clusters[plan.workers] = bp.Cluster(plan.workers, backend=self.backend, timeout=self.timeout)
        network, data = (GPT, TEXT) if text else (MLP, DIGITS)
        optimizer = bp.optim.SGD(0.1, clip=0.02 if clip else None)
        made = self._clusters[plan.workers].train(network, data, plan, batch=SAMPLES, steps=STEPS, optimizer=optimizer)
        return made.network.flat_parameters.clone()

    def of_mutants(self, plan: Plan, draw: random.Random, number: int) -> None:
        """Make mutants of a correct plan, none like it or like one before; each must be refused, or be right."""
        how = of_text(plan), any(action.kind == "NORM" for row in plan.rows for action in row)
        if plan.digest not in self._judged:
            self._judged.add(plan.digest)
            self._expected[plan.digest] = self.weights(plan, *how)
        while number:
            try:
                changed = mutant(plan, draw)
            except ValueError:
                self.counts["no plan"] += 1  # refused when it is written
                continue
            if changed.digest not in self._judged:
                self._judged.add(changed.digest)
                number -= 1
                self.judge(changed, how, self._expected[plan.digest])

    def judge(self, plan: Plan, how: tuple[bool, bool], expected: Tensor) -> None:
        """Refuse a plan, by itself or where clipping is added to it, or run it."""
        try:
            check(plan)
            compile(plan, GPT if how[0] else MLP, clip=how[1])
        except ValueError:
            self.counts["refused"] += 1
        else:
            self.decide(plan, how, expected, "harmless")

    def of_correct(self, draw: random.Random, number: int) -> None:
        """Make correct plans; each must be accepted, and equal serial."""
        for _ in range(number):
            plan = correct(draw)
            how = of_text(plan), False
            if how not in self._expected:
                self._expected[how] = self.weights(compile(serial(), GPT if how[0] else MLP).plan, *how)
            self.decide(plan, how, self._expected[how], "right")

    def decide(self, plan: Plan, how: tuple[bool, bool], expected: Tensor, good: str) -> None:
        """Run a plan; what hangs, raises or is wrong is missed."""
        try:
            worst = float((self.weights(plan, *how) - expected).abs().max())
            why = "" if worst <= NEAR else f"weights differ by {worst:.1e}"
        except Exception as error:  # whatever comes, the checker has missed it
            why = f"{type(error).__name__}: {str(error)[:600]}"
            self.close()
        self.counts["missed" if why else good] += 1
        if why:
            self.missed.append(f"{self.backend}: {why}\n{plan}")

    def close(self) -> None:
        """Give all workers back."""
        for cluster in self._clusters.values():
            cluster.close()
        self._clusters.clear()
