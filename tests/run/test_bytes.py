"""Bytes: the docstrings' formulas, the compiled program, the trace and the transport's counter say the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import bpkit as bp
from bpkit.plan import Plan, asynchronous_server, data_parallel, expand, local_sgd, parameter_server, zero
from bpkit.plan.strategies.collectives import ALGORITHMS, collective
from tests.plan.hand_written import PIPELINE_1F1B

RANKS = (2, 3, 4)
UNEVEN = 1009  # elements: a prime, so that no number of ranks divides it
Sent = Callable[[int, int, int], int]  # (elements, ranks, rank) -> elements sent


def s(size: int, parts: int, i: int) -> int:
    """Elements of part i of `size` elements: i*S//n to (i+1)*S//n."""
    i %= parts
    return (i + 1) * size // parts - i * size // parts


def halving_doubling(size: int, n: int, rank: int) -> int:
    """S less the own part while halving; while doubling, all that is held: 1, 2, 4, ... parts, aligned."""
    q = 1 << (n.bit_length() - 1)
    folded = n - q
    if rank < 2 * folded and rank % 2:
        return size
    i = rank // 2 if rank < 2 * folded else rank - folded
    held = sum(s(size, q, p) for k in range(q.bit_length() - 1) for p in range(q) if p >> k == i >> k)
    return size - s(size, q, i) + held + size * (rank < 2 * folded)


def binomial(size: int, n: int, rank: int) -> int:
    """Up once, and down to one rank a round from the one in which it has the sum."""
    return size * ((rank > 0) + sum(rank < 2**k and rank + 2**k < n for k in range(n.bit_length())))


def hierarchical(size: int, n: int, rank: int) -> int:
    """A ring over the L ranks of a host; of part `local`, a ring over the hosts, whose parts are parts of n."""
    hosts = 2 if n % 2 == 0 else n
    per_host = n // hosts
    host, local = divmod(rank, per_host)
    inside = 2 * size - s(size, per_host, local) - s(size, per_host, local + 1)
    across = [s(size, n, local * hosts + (host + k) % hosts) for k in (0, 1)]
    return inside + 2 * s(size, per_host, local) - sum(across)


#: What each docstring of `bpkit.plan.strategies.collectives` says that a rank sends, in elements.
SENT: dict[str, Sent] = {
    "ring": lambda S, n, r: 2 * S - s(S, n, r) - s(S, n, r + 1),
    "server": lambda S, n, r: (n - 1) * S if r == 0 else S,
    "sharded_server": lambda S, n, r: (S - s(S, n, r)) + (n - 1) * s(S, n, r),
    "tree": lambda S, n, r: S * sum(c < n for c in (2 * r + 1, 2 * r + 2)) + S * (r > 0),
    "binomial": binomial,
    "halving_doubling": halving_doubling,
    "hierarchical": hierarchical,
    "reduce_scatter": lambda S, n, r: S - s(S, n, r),
    "all_gather": lambda S, n, r: S - s(S, n, r + 1),
    "broadcast": lambda S, n, r: S * sum(r < 2**k and r + 2**k < n for k in range(n.bit_length())),
    "all_to_all": lambda S, n, r: S - s(S, n, r),
}
ALL_REDUCES = [name for name, (purpose, _) in ALGORITHMS.items() if purpose == "all_reduce"]


@pytest.fixture(scope="module", params=["shm", "gloo"])
def clusters(request: pytest.FixtureRequest) -> Iterator[dict[int, bp.Cluster]]:
    made = {n: bp.Cluster(n, backend=request.param, timeout=30) for n in RANKS}
    yield made
    for cluster in made.values():
        cluster.close()


@pytest.fixture(params=["shm", "gloo"])
def four(request: pytest.FixtureRequest) -> Iterator[bp.Cluster]:
    with bp.Cluster(4, backend=request.param, timeout=30) as cluster:
        yield cluster


def options(name: str, n: int) -> dict[str, int]:
    return {"hosts": n} if name == "hierarchical" and n % 2 else {}


def traced(trace: bp.trace.Trace, n: int) -> list[int]:
    """Bytes that each rank sent in one step, from the trace; the same in all steps, and all of them counted."""
    assert (trace.bytes >= 0).all()
    each = np.array([[trace.bytes[(trace.rank == r) & (trace.step == k)].sum() for r in range(n)] for k in trace.steps])
    assert (each == each[0]).all()
    return each[0].tolist()


def test_every_collective_has_a_formula():
    assert SENT.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_collectives(clusters, name, n, request):
    size = UNEVEN if name != "all_to_all" else UNEVEN // n * n  # it exchanges equal parts
    tensors = [torch.full((size,), float(rank)) for rank in range(n)]
    plan = collective(name, n, **options(name, n))
    result = clusters[n].collective(plan, tensors, repeat=2)
    formula = [4 * SENT[name](size, n, rank) for rank in range(n)]
    assert [result.program.payload(at) for at in plan.mesh.coordinates()] == formula
    assert traced(result.trace, n) == formula
    assert list(result.sent) == formula
    row = (f"{plan.name}, {size} elements", formula, clusters[n].backend, result.sent)
    request.node.user_properties.append(("bytes", row))


# Training plans: a small network of uneven stages; what `Program` holds is float32.

NETWORK = bp.nn.mlp([64, 13, 11, 10], seed=1)
DATA = bp.data.digits()
BATCH = 24


def flat_sizes(buckets: int) -> list[int]:
    return [part.flat_size for part in NETWORK.split(buckets)]


def servers_send(size: int, n: int, rank: int, k: int) -> int:
    """``S - s_j + (n - 1) s_j`` of a rank that serves, S of another."""
    return size if rank >= k else size - s(size, k, rank) + (n - 1) * s(size, k, rank)


def training_plans(n: int) -> dict[Plan, list[int]]:
    """Each plan whose messages are written out, with the bytes that each rank sends a step."""
    made: dict[Plan, list[int]] = {}
    for name in ALL_REDUCES:
        plan = expand(data_parallel(n, 2), name, **options(name, n))
        made[plan] = [4 * sum(SENT[name](size, n, rank) for size in flat_sizes(2)) for rank in range(n)]
    for k in (1, 2, n):
        sent = [4 * sum(servers_send(size, n, rank, k) for size in flat_sizes(2)) for rank in range(n)]
        made[parameter_server(n, servers=k, buckets=2)] = sent
    (size,), rounds = flat_sizes(1), 3
    arrivals = [*range(1, n)] * rounds
    made[asynchronous_server(n - 1, arrivals)] = [4 * size * rounds * (n - 1)] + [4 * size * rounds] * (n - 1)
    if n == 2:  # an edge carries 11 or 13 features of each sample of the batch, forward and backward
        pipeline = Plan.parse(PIPELINE_1F1B)
        before, _ = NETWORK.split(2)
        made[pipeline] = [4 * BATCH * before.output_shape[0]] * 2
    return made


CASES = [(n, plan, sent) for n in RANKS for plan, sent in training_plans(n).items()]


@pytest.mark.parametrize(("n", "plan", "formula"), CASES, ids=[plan.name for _, plan, _ in CASES])
def test_training_plans(clusters, n, plan, formula, request):
    steps = plan.microbatches if plan.holds == "one" else 2  # an asynchronous server's plan is a whole run
    result = clusters[n].train(NETWORK, DATA, plan, batch=BATCH, steps=steps, lr=0.1)
    program = [sum(step.payload for step in row if step.counted) for row in map(result.program.row, coordinates(plan))]
    if plan.mesh.pipeline == 1:  # of an edge it is the payload of one sample
        assert program == formula
    else:
        microbatches = plan.microbatches
        assert [BATCH // microbatches * sent for sent in program] == formula
    assert traced(result.trace, n) == formula
    row = (plan.name, formula, clusters[n].backend, traced(result.trace, n))
    request.node.user_properties.append(("bytes", row))


def coordinates(plan: Plan) -> list[bp.plan.Coordinate]:
    return list(plan.mesh.coordinates())


@pytest.mark.parametrize("n", RANKS)
def test_native_collectives_say_that_they_are_not_counted(clusters, n):
    for plan in (data_parallel(n, 2), *(zero(n, level, units=2) for level in (1, 2, 3)), local_sgd(n, 2)):
        trace = clusters[n].train(NETWORK, DATA, plan, batch=BATCH, steps=2, lr=0.1).trace
        native = np.isin(trace.kinds(), ["REDUCE_GRAD", "SCATTER_GRAD", "UNSHARD", "AVERAGE"])
        assert native.any() and (trace.bytes[native] == -1).all() and (trace.bytes[~native] == 0).all(), plan.name


@pytest.mark.parametrize("sequence", [False, True], ids=["whole edges", "own tokens"])
def test_a_tensor_rank_sends_its_own_tokens_to_the_next_stage(four, sequence):
    text = bp.data.text(length=8)
    gpt = bp.nn.gpt(text.vocabulary, 8, width=12, heads=2, layers=2, tied=False)
    layout = bp.nn.tensor_layout(gpt, sequence)
    plan = bp.plan.tensor_parallel(bp.plan.one_f_one_b(2, 2), 2, layout)
    result = four.train(gpt, text, plan, batch=BATCH, steps=1, lr=0.1)
    edge = 4 * BATCH * 8 * 12 // (2 if sequence else 1)
    sends = np.isin(result.trace.kinds(), ["SEND_F", "SEND_B"])
    assert [result.trace.bytes[sends & (result.trace.rank == rank)].sum() for rank in range(4)] == [edge] * 4
    for at in plan.mesh.coordinates():
        steps = [step for step in result.program.row(at) if step.action.kind in ("SEND_F", "SEND_B")]
        assert sum(step.payload for step in steps) * BATCH // 2 == edge
