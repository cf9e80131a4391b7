"""The network's buffers, shapes, cuts, costs, and its refusals."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch

from bpkit import nn
from bpkit.description import balanced_cuts
from bpkit.nn import network as network_module

from .cases import LAYERS, D, batch, by_hand, network


def test_parameters_are_aligned_views_in_the_order_of_production() -> None:
    net = nn.mlp([5, 7, 3])
    assert [tuple(p.shape) for p in net.parameters()] == [(7, 5), (7,), (3, 7), (3,)]
    places = {i: p.data_ptr() for i, p in enumerate(net.parameters())}
    assert sorted(places, key=places.__getitem__) == [2, 3, 0, 1]  # last layer first, weight then bias
    assert all(p.data_ptr() % 64 == 0 for p in (*net.parameters(), *net.gradients()))
    assert net.flat_parameters.data_ptr() % 64 == 0 and net.flat_size == 32 + 16 + 48 + 16
    net.flat_parameters.fill_(2.0)
    assert all((p == 2).all() for p in net.parameters())


def test_production_order_holds_inside_containers() -> None:
    layers = [nn.Sequential(nn.Linear(2, 2), nn.Residual(nn.Linear(2, 2, bias=False))), nn.Linear(2, 2)]
    net = nn.Network(layers, 2)
    places = [p.data_ptr() for p in net.parameters()]
    assert sorted(range(5), key=places.__getitem__) == [3, 4, 2, 0, 1]


@pytest.mark.parametrize("name", LAYERS)
def test_padding_stays_zero(name: str) -> None:
    net = network(name)
    by_hand(net, *batch())
    for flat, views in ((net.flat_parameters, net.parameters()), (net.flat_gradients, net.gradients())):
        left = flat.clone()
        for view in views:
            start = (view.data_ptr() - flat.data_ptr()) // 8
            left[start : start + view.numel()] = 0
        assert not left.any()


def test_initial_values_follow_torch_and_differ_between_equal_layers() -> None:
    net, double = nn.mlp([400, 400, 400], seed=3), nn.mlp([400, 400, 400], seed=3, dtype=D)
    first, bias, second, _ = net.parameters()
    bound = 1 / math.sqrt(400)
    assert first.abs().max() <= bound and bias.abs().max() <= bound
    assert abs(float(first.std()) - bound / math.sqrt(3)) < 0.01 * bound
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b.float()) for a, b in zip(net.parameters(), double.parameters(), strict=True))
    assert not torch.equal(first, nn.mlp([400, 400, 400], seed=4).parameters()[0])


def test_bind_moves_values_onto_other_buffers() -> None:
    net, (x, t) = network("nested"), batch()
    dx, gradients = by_hand(net, x, t)
    old = net.flat_parameters
    room = torch.empty(2, net.flat_size, dtype=D)
    net.bind(room[0], room[1])
    assert net.flat_parameters is not old and torch.equal(room[0], old)
    room[1].fill_(7.0)
    assert torch.equal(by_hand(net, x, t)[0], dx)
    assert net.gradients()[0].data_ptr() >= room[1].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(net.gradients(), gradients, strict=True))
    with pytest.raises(ValueError, match=f"1-D with {net.flat_size} elements"):
        net.bind(torch.empty(3, dtype=D))
    with pytest.raises(ValueError, match="64-byte boundary"):
        net.bind(gradients=torch.empty(net.flat_size + 9, dtype=D)[1 : net.flat_size + 1])


def test_copy_and_pickle_keep_values_and_masks_and_share_nothing() -> None:
    net, (x, t) = network("dropout"), batch()
    here = nn.Context(2, 1)
    dx, _ = by_hand(net, x, t, here)
    stage = net.split([2])[1]
    for other in (net.copy(), net.copy("cpu"), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other.flat_gradients, net.flat_gradients)
        assert torch.equal(by_hand(other, x, t, here)[0], dx)
        other.flat_parameters.zero_()
        assert net.flat_parameters.any()
    y = net.split([2])[0].forward(x, context=here)
    again = pickle.loads(pickle.dumps(stage))
    assert torch.equal(stage.forward(y, context=here), again.forward(y, context=here))
    assert len(pickle.dumps(net)) < 3 * 8 * net.flat_size + 4000  # no buffers of slots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, D])
@pytest.mark.parametrize("make", [nn.Network.copy, copy.copy, copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))],
                         ids=["own", "copy", "deepcopy", "pickle"])  # fmt: skip
def test_every_dtype_is_copied_and_pickled(dtype: torch.dtype, make: Callable[[nn.Network], nn.Network]) -> None:
    layers = [nn.Linear(6, 3), nn.BatchNorm(3), nn.Tanh(), nn.Linear(3, 4)]
    net = nn.Network(layers, 6, dtype=dtype)
    x, t = torch.randn(5, 6).to(dtype), torch.tensor([0, 1, 2, 3, 0])
    by_hand(net, x, t)
    other = make(net)
    assert other.dtype is dtype and torch.equal(other.predict(x), net.predict(x))
    for own, flat in zip(net._flats(), other._flats(), strict=True):
        assert torch.equal(flat, own) and flat.dtype is dtype and flat.any() and flat.data_ptr() != own.data_ptr()
    assert other.flat_parameters.data_ptr() % 64 == 0


def test_load_takes_the_layout_of_torch() -> None:
    linear = torch.nn.Linear(6, 4, dtype=D)
    net = nn.Network([nn.Linear(6, 4)], 6, dtype=D)
    net.load([p.detach() for p in linear.parameters()])
    x, _ = batch()
    assert torch.allclose(net.forward(x), linear(x), rtol=1e-14)
    with pytest.raises(ValueError, match="2 parameter tensors, not 1"):
        net.load([torch.zeros(4, 6)])
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(4, 6\), not \(6, 4\)"):
        net.load([torch.zeros(6, 4), torch.zeros(4)])


def test_split_balances_and_checks() -> None:
    net = nn.mlp([64, 512, 512, 10])
    assert [len(s.layers) for s in net.split(3)] == [2, 1, 2]
    assert [len(s.layers) for s in net.split([2, 4])] == [2, 2, 1]
    assert [s.input_shape for s in net.split([2, 4])] == [(64,), (512,), (512,)]
    assert len(net.split([])) == 1
    for cuts in ([0], [5], [2, 2], [3, 1]):
        with pytest.raises(ValueError, match="increase strictly from 1 to 4"):
            net.split(cuts)
    for count in (0, 6, -1):
        with pytest.raises(ValueError, match=f"1 to 5 stages, not {count}"):
            net.split(count)


def test_balanced_cuts_are_the_best() -> None:
    assert balanced_cuts([1, 1, 1, 1], 2) == [2]
    assert balanced_cuts([9, 1, 1, 1, 9], 3) == [1, 4]
    assert balanced_cuts([5, 0, 0], 3) == [1, 2]


def test_costs_are_counted() -> None:
    net = nn.mlp([3, 5, 2])
    linear, relu, _ = net.costs()
    assert linear == nn.StageCost(2 * 15 + 5, 2 * 15, 2 * 15 + 5, 3, 5, 20)
    assert relu == nn.StageCost(5, 5, 0, 5, 5, 0)
    merged = nn.StageCost.merge(net.costs())
    assert (merged.inputs, merged.outputs, merged.parameters) == (3, 2, 32)
    assert merged.total == sum(c.total for c in net.costs())
    with pytest.raises(ValueError, match="at least one layer"):
        nn.StageCost.merge([])


@pytest.mark.parametrize("name", LAYERS)
def test_costs_know_edges_and_parameters(name: str) -> None:
    net = network(name)
    for cost, stage in zip(net.costs(), net.split(range(1, len(net.layers))), strict=True):
        assert (cost.inputs, cost.outputs) == (math.prod(stage.input_shape), math.prod(stage.output_shape))
        assert cost.parameters == sum(p.numel() for p in stage.parameters())
        assert cost.forward > 0 and cost.backward_input > 0 and (cost.backward_weight > 0) == (cost.parameters > 0)


def test_describe() -> None:
    assert nn.mlp([64, 512, 512, 10]).describe() == "mlp 64-512-512-10, 301,066 parameters"
    assert "network of 4 layers" in network("residual").describe()


def test_predict_and_accuracy_switch_dropout_off() -> None:
    net, (x, _) = network("dropout"), batch(50)
    y = net.predict(x, rows=8)
    assert torch.equal(y, net.predict(x, rows=8)) and y.shape == (50, 4)
    assert not torch.equal(y, net.forward(x))
    assert net.accuracy(x, y.argmax(1)) == 1.0
    with pytest.raises(ValueError, match="empty batch"):
        net.predict(x[:0])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: nn.Network([nn.Linear(6, 5), nn.ReLU(), nn.Linear(4, 3)], 6),
            ValueError,
            "layer 1 .*ReLU.*5.*layer 2.*4",
        ),
        (lambda: nn.Network([nn.Linear(6, 5)], 7), ValueError, r"input has .*shape \(7,\).*layer 0"),
        (lambda: nn.Network([nn.Residual(nn.Linear(6, 5))], 6), ValueError, "keep the shape"),
        (lambda: nn.Network([nn.LayerNorm(5)], 6), ValueError, "LayerNorm"),
        (lambda: nn.Network([], 6), ValueError, "at least one layer"),
        (lambda: nn.Network([torch.nn.ReLU()], 6), TypeError, "layer 0"),  # type: ignore[list-item]
        (lambda: nn.mlp([6, 4], dtype=torch.float16), TypeError, "torch.float64 or torch.bfloat16, not torch.float16"),
        (lambda: nn.mlp([6, 4], activation="swish"), ValueError, "swish.*relu"),
        (lambda: nn.mlp([6, 4], loss="hinge"), ValueError, "hinge.*cross_entropy"),
        (lambda: nn.mlp([6]), ValueError, "input and its output"),
        (lambda: nn.Linear(0, 4), ValueError, "Linear: inputs must be a whole number of at least 1, not 0"),
        (lambda: nn.Dropout(1.0), ValueError, "probability"),
        (lambda: nn.Sequential(), ValueError, "Sequential needs at least one layer"),
        (lambda: nn.mlp([6, 4]).forward(torch.zeros(2, 5)), ValueError, r"'rows', 6.*\(2, 5\)"),
        (lambda: nn.mlp([6, 4]).forward(torch.zeros(2, 6, dtype=D)), TypeError, "torch.float32.*torch.float64"),
        (lambda: nn.mlp([6, 4]).backward(torch.zeros(2, 4)), RuntimeError, "slot 0 without a forward"),
    ],
)
def test_bad_input_is_named(make, error: type[Exception], text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=text):
        make()


def test_microbatches_of_two_sizes_bind_a_slot_twice_and_never_again(monkeypatch):
    made: list[int] = []
    chain = network_module.Chain
    monkeypatch.setattr(network_module, "Chain", lambda layers, site: made.append(site.shape[0]) or chain(layers, site))
    net = nn.mlp([5, 4, 3], seed=0, dtype=torch.float64)
    alone = nn.mlp([5, 4, 3], seed=0, dtype=torch.float64)
    x = torch.randn(22, 5, dtype=torch.float64)
    for _ in range(3):
        made.clear()
        for index, part in enumerate(x.split([8, 7, 7])):
            net.backward(net.forward(part, 0), 0, index > 0)
    assert made == []
    for index, part in enumerate(x.split([8, 7, 7])):
        alone.backward(alone.forward(part, index), index, index > 0)
    assert torch.equal(net.flat_gradients, alone.flat_gradients)
    for rows in (1, 2, 3, 4):
        net.forward(x[:rows], 0)
    assert len(net._runs) + len(net._spare) == 2  # no more memory, whatever sizes come
    net.release()
    assert not net._runs and not net._spare
