"""Tensor parallelism: the ranks' shards sum to the whole, and merge to it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F

from bpkit import nn
from bpkit.plan import serial, tensor_parallel

from .cases import D, close

HERE = nn.Context(step=2, first=3)
NETWORKS = {
    "mlp": lambda: nn.Network([nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)], 6, dtype=D),
    "mlp of two": lambda: nn.Network([nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4)], 6, dtype=D),
    "squared": lambda: nn.Network([nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 4), nn.Tanh()], 6, loss="mse", dtype=D),
    "container": lambda: nn.Network([nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)), nn.Tanh(),
                                     nn.Residual(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6),
                                                 nn.Dropout(0.1)), nn.Linear(6, 5)], 6, dtype=D),
    "gpt": lambda: nn.gpt(11, 6, 12, 6, 2, dtype=D),
    "gpt, dropout, not tied": lambda: nn.gpt(11, 6, 12, 6, 1, dtype=D, tied=False, dropout=0.1, fused=False),
}  # fmt: skip


def over_ranks(of: int, work):  # type: ignore[no-untyped-def]
    """Call work(rank, reduce) on a thread for each rank; reduce waits for all."""
    barrier, given = Barrier(of), {}

    def run(rank: int):  # type: ignore[no-untyped-def]
        def reduce(tensor: torch.Tensor, how: str) -> torch.Tensor:
            given[rank] = tensor
            barrier.wait(20)
            all_of_them = torch.stack([given[i] for i in range(of)])
            barrier.wait(20)
            return all_of_them.amax(0) if how == "max" else all_of_them.sum(0)

        return work(rank, reduce)

    with ThreadPoolExecutor(of) as pool:
        return list(pool.map(run, range(of)))


def batch(net: nn.Network) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens = net.input_dtype is torch.int64
    x = torch.randint(11, (4, *net.input_shape), generator=g) if tokens else torch.randn(4, 6, generator=g, dtype=D)
    if isinstance(net.loss, nn.MSE):
        return x, torch.randn(4, 4, generator=g, dtype=D)
    t = torch.randint(net.output_shape[-1], (4, *net.output_shape[:-1]), generator=g)
    t.view(-1)[1] = -100
    return x, t


CASES = [(name, of, False) for name in NETWORKS for of in (1, 2, 3)]
CASES += [(name, of, True) for name in NETWORKS if "gpt" in name for of in (2, 3)]


@pytest.mark.parametrize(("name", "of", "sequence"), CASES)
def test_shards_sum_to_the_whole(name: str, of: int, sequence: bool) -> None:
    net = NETWORKS[name]()
    g = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p.add_(torch.randn(p.shape, generator=g, dtype=D), alpha=0.1)
    x, t = batch(net)
    value, dy = net.loss.value_and_gradient(net.forward(x, context=HERE), t)
    net.backward(dy)
    layout = nn.tensor_layout(net, sequence).joined([])
    plan = tensor_parallel(serial(), of, layout)
    expected = []  # the output of each stage
    for stage in net.opened().split(layout.cuts):
        expected.append(stage.forward(expected[-1] if expected else x, context=HERE).clone())

    def rank(index: int, reduce):  # type: ignore[no-untyped-def]
        own = nn.shard(net, index, of, sequence)
        stages, y = own.split(layout.cuts), x

        def edge(value: torch.Tensor, kind: str) -> torch.Tensor:
            """What the collective that the plan names makes of a value."""
            if not kind:
                return value
            part = slice(index * 6 // of, (index + 1) * 6 // of)  # of six tokens
            if kind.startswith("GATHER"):
                own, value = value, torch.zeros(4, 6, value.shape[-1], dtype=D)
                value[:, part] = own
            value = reduce(value, "sum")
            return value[:, part].contiguous() if kind.startswith("SCATTER") else value

        for i, stage in enumerate(stages):
            kind = plan.edge_collective("F", i)
            y = edge(stage.forward(y, context=HERE), kind)
            if i + 1 < len(stages) or not layout.vocabulary:
                whole = y.shape == expected[i].shape
                tokens = slice(None) if whole else slice(index * 6 // of, (index + 1) * 6 // of)
                assert close(y, expected[i][:, tokens])
        loss = own.loss
        if layout.vocabulary:
            loss = nn.VocabularyCrossEntropy(loss.ignore_index, loss.low, loss.high, loss.classes, reduce)
        loss.check(t, net.output_shape)
        value_, d = loss.value_and_gradient(y, t)
        for i in reversed(range(len(stages))):
            d = stages[i].backward(d, need_input=True)
            if d is not None:
                d = edge(d, plan.edge_collective("B", i))
        return value_, own, stages

    results = over_ranks(of, rank)
    assert all(close(v, value) for v, _, _ in results)
    for _, own, stages in results:  # tied copies in different stages: the plan adds them
        for key, place in own.tied_slices().items():
            copies = [s.flat_gradients[s.tied_slices()[key]] for s in stages if key in s.tied_slices()]
            total = sum(copies)
            for copy in copies:
                copy.copy_(total)
            assert total.shape == own.flat_gradients[place].shape
    given = [[g for stage in stages for g in stage.gradients()] for _, _, stages in results]
    summed = nn.merge(net, given, add=True, sequence=sequence)
    assert all(close(a, b) for a, b in zip(summed, net.gradients(), strict=True))
    back = nn.merge(net, [own.parameters() for _, own, _ in results], sequence=sequence)
    assert all(torch.equal(a, b) for a, b in zip(back, net.parameters(), strict=True))
    # And by slices, as a plan's SUM_G does it.
    for shares in zip(*([s for stage in stages for s in stage.shares()] for _, _, stages in results), strict=True):
        total = sum(shares)
        for share in shares:
            share.copy_(total)
    assert all(close(a, b) for a, b in zip(nn.merge(net, given, sequence=sequence), net.gradients(), strict=True))


def test_layout_of_a_gpt() -> None:
    layout, by_tokens = (nn.tensor_layout(nn.gpt(11, 5, 12, 6, 1), sequence) for sequence in (False, True))
    # Embedding | Positions, StashSkip, norm | attention | AddSkip | StashSkip, norm | mlp | AddSkip, norm | scores
    assert layout.cuts == (1, 4, 7, 8, 10, 13, 15) and layout.vocabulary
    assert layout.partial_outputs == (0, 2, 5) and layout.partial_inputs == (2, 5, 7)
    assert layout.skips == ((1, 3), (4, 6)) and layout.own_tokens == ()
    assert by_tokens == replace(layout, own_tokens=(1, 3, 4, 6))
    assert by_tokens.joined([8]) == by_tokens
    joined = by_tokens.joined([])  # between the skips no pipeline is cut
    assert joined.cuts == (1, 4, 7, 10, 13, 15) and joined.partial_outputs == (0, 2, 4)
    assert joined.own_tokens == (1, 3, 5) and joined.skips == ((1, 3), (3, 5))
    assert sum(joined.costs) == sum(by_tokens.costs) and joined.costs[3] == sum(by_tokens.costs[3:5])


@pytest.mark.parametrize("masked", [False, True])
def test_vocabulary_cross_entropy_is_that_of_torch(masked: bool) -> None:
    y, t = torch.randn(6, 3, 7, dtype=D) * 200, torch.randint(7, (6, 3))  # large scores: the maximum matters
    if masked:
        t[2] = -100
    leaf = y.clone().requires_grad_()
    expected = F.cross_entropy(leaf.flatten(0, 1), t.flatten(), reduction="sum")
    expected.backward()

    def rank(index, reduce):  # type: ignore[no-untyped-def]
        low, high = index * 7 // 3, (index + 1) * 7 // 3
        return nn.VocabularyCrossEntropy(-100, low, high, 7, reduce).value_and_gradient(y[..., low:high], t)

    results = over_ranks(3, rank)
    assert all(close(value, expected) for value, _ in results)
    assert close(torch.cat([g for _, g in results], -1), leaf.grad)
    with pytest.raises(RuntimeError, match="reduce"):
        nn.VocabularyCrossEntropy(-100, 0, 3, 7).value_and_gradient(y, t)
    with pytest.raises(ValueError, match="label 7"):
        nn.VocabularyCrossEntropy(-100, 0, 3, 7).check(torch.tensor([7]), (3,))


@pytest.mark.parametrize(
    ("layers", "of", "text"),
    [
        ([nn.Residual(nn.LayerNorm(6), nn.Attention(6, 3))], 2, "3 heads cannot be divided among 2 tensor ranks"),
        ([nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 4))], 3, "width of 2 cannot be divided among 3"),
        ([nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.1), nn.Linear(4, 4))], 2, "Dropout between two split products"),
        ([nn.Linear(6, 4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 4)], 2, "Dropout between two split products"),
    ],
)
def test_what_cannot_be_cut_is_named(layers: list[nn.Layer], of: int, text: str) -> None:
    shape = (5, 6)
    with pytest.raises(ValueError, match=text):
        nn.shard(nn.Network(layers, shape), 0, of)


def test_sequence_parallelism_needs_tokens_that_divide() -> None:
    with pytest.raises(ValueError, match="each of 2 tensor ranks as many tokens, which samples of 5 tokens"):
        nn.shard(nn.gpt(11, 5, 12, 6, 1), 0, 2, sequence=True)
    with pytest.raises(ValueError, match="layers that treat each token alone between split products.* has none"):
        nn.tensor_layout(nn.mlp([6, 7, 5, 4]), sequence=True)


def test_ranks_that_should_hold_the_same_are_compared() -> None:
    net = nn.gpt(11, 6, 12, 4, 1, dtype=torch.float64)
    parts = [nn.shard(net, index, 2).parameters() for index in range(2)]
    norm = next(i for i, p in enumerate(parts[1]) if p.shape == (12,))
    parts[1][norm][3] += 1e-6
    nn.merge(net, parts, within=1e-5)
    with pytest.raises(RuntimeError, match=f"tensor rank 1 holds other values of parameter {norm} than rank 0"):
        nn.merge(net, parts, within=1e-8)
