"""Tensor parallelism: the ranks' shards sum to the whole, and merge to it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F

from bpkit import nn

from .cases import D, close

HERE = nn.Context(step=2, first=3)
NETWORKS = {
    "mlp": lambda: nn.Network([nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)], 6, dtype=D),
    "mlp of two": lambda: nn.Network([nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4)], 6, dtype=D),
    "squared": lambda: nn.Network([nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 4), nn.Tanh()], 6, loss="mse", dtype=D),
    "container": lambda: nn.Network([nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)), nn.Tanh(),
                                     nn.Residual(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6),
                                                 nn.Dropout(0.1)), nn.Linear(6, 5)], 6, dtype=D),
    "gpt": lambda: nn.gpt(11, 5, 12, 6, 2, dtype=D),
    "gpt, dropout, not tied": lambda: nn.gpt(11, 5, 12, 6, 1, dtype=D, tied=False, dropout=0.1, fused=False),
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


@pytest.mark.parametrize("of", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_shards_sum_to_the_whole(name: str, of: int) -> None:
    net = NETWORKS[name]()
    g = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p.add_(torch.randn(p.shape, generator=g, dtype=D), alpha=0.1)
    x, t = batch(net)
    value, dy = net.loss.value_and_gradient(net.forward(x, context=HERE), t)
    net.backward(dy)
    layout = nn.tensor_layout(net)
    whole = net.split(layout.cuts)

    def rank(index: int, reduce):  # type: ignore[no-untyped-def]
        own = nn.shard(net, index, of)
        stages, y = own.split(layout.cuts), x
        for i, stage in enumerate(stages):
            y_whole = whole[i].forward(y, (index, i), HERE)
            y = stage.forward(y, context=HERE)
            if i in layout.partial_outputs:
                y = reduce(y, "sum")
            assert y.shape[-1] != y_whole.shape[-1] or close(y, y_whole)
        loss = own.loss
        if layout.vocabulary:
            loss = nn.VocabularyCrossEntropy(loss.ignore_index, loss.low, loss.high, loss.classes, reduce)
        loss.check(t, net.output_shape)
        value_, d = loss.value_and_gradient(y, t)
        for i in reversed(range(len(stages))):
            d = stages[i].backward(d, need_input=True)
            if i in layout.partial_inputs and d is not None:
                d = reduce(d, "sum")
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
    assert all(close(a, b) for a, b in zip(nn.merge(net, given, add=True), net.gradients(), strict=True))
    back = nn.merge(net, [own.parameters() for _, own, _ in results])
    assert all(torch.equal(a, b) for a, b in zip(back, net.parameters(), strict=True))
    # And by slices, as a plan's SUM_G does it.
    for shares in zip(*([s for stage in stages for s in stage.shares()] for _, _, stages in results), strict=True):
        total = sum(shares)
        for share in shares:
            share.copy_(total)
    assert all(close(a, b) for a, b in zip(nn.merge(net, given), net.gradients(), strict=True))


def test_layout_of_a_gpt() -> None:
    layout = nn.tensor_layout(nn.gpt(11, 5, 12, 6, 2))
    assert layout.cuts == (2, 3, 4, 5, 6) and layout.vocabulary
    assert layout.partial_outputs == (0, 1, 2, 3, 4) and layout.partial_inputs == (1, 2, 3, 4, 5)


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
        ([nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Tanh())], 2, "Tanh.*behind the pair"),
        ([nn.Sequential(nn.Linear(6, 4), nn.Tanh())], 2, "finds 0"),
    ],
)
def test_what_cannot_be_cut_is_named(layers: list[nn.Layer], of: int, text: str) -> None:
    shape = (5, 6)
    with pytest.raises(ValueError, match=text):
        nn.shard(nn.Network(layers, shape), 0, of)
