"""Optimizers against torch.optim, schedules, and clipping."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from bpkit import nn, optim
from bpkit.data import digits

D = torch.float64
SCALE = 0.125

CASES = [
    (optim.SGD(lr=0.1), torch.optim.SGD, {"lr": 0.1}),
    (optim.SGD(0.1, weight_decay=0.02), torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.02}),
    (optim.SGD(0.1, 0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (
        optim.SGD(0.1, 0.9, weight_decay=0.02),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02},
    ),
    (
        optim.SGD(0.1, 0.9, weight_decay=0.02, nesterov=True),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02, "nesterov": True},
    ),
    (optim.Adam(), torch.optim.Adam, {"lr": 1e-3}),
    (
        optim.Adam(0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.02),
        torch.optim.Adam,
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.02},
    ),
    (optim.AdamW(), torch.optim.AdamW, {"lr": 1e-3}),
    (optim.AdamW(0.01, weight_decay=0.1), torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("ours", "peer", "options"), CASES, ids=lambda c: getattr(c, "__name__", None))
def test_ten_steps_equal_torch(ours: optim.Optimizer, peer: type, options: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(37, generator=generator, dtype=D)
    leaf = p.clone().requires_grad_()
    theirs, state = peer([leaf], **options), ours.state(p)
    for step in range(10):
        g = torch.randn(37, generator=generator, dtype=D)
        leaf.grad = g * SCALE
        theirs.step()
        before = g.clone()
        ours.update(p, g, state, step, SCALE)
        assert torch.equal(g, before)
    assert float((p - leaf.detach()).abs().max()) <= 1e-12 * float(leaf.detach().abs().max())


@pytest.mark.parametrize("ours", [c[0] for c in CASES])
def test_slices_update_as_the_whole(ours: optim.Optimizer) -> None:
    p, g = torch.randn(64, dtype=D), torch.randn(64, dtype=D)
    whole, parts = p.clone(), p.clone()
    state, states = ours.state(whole), [ours.state(parts[:24]), ours.state(parts[24:])]
    for step in range(3):
        ours.update(whole, g, state, step)
        for part, s in zip((slice(0, 24), slice(24, 64)), states, strict=True):
            ours.update(parts[part], g[part], s, step)
    assert torch.allclose(parts, whole, rtol=1e-14, atol=0)
    again = pickle.loads(pickle.dumps(ours))
    assert again == ours


def test_padding_stays_zero() -> None:
    for ours, _, _ in CASES:
        p, g = torch.zeros(8), torch.zeros(8)
        ours.update(p, g, ours.state(p), 0)
        assert not p.any()


def test_numbers_of_numpy_are_taken() -> None:
    made = optim.SGD(np.float32(0.5), momentum=np.float64(0.25), clip=np.int64(2))
    assert made == optim.SGD(0.5, momentum=0.25, clip=2.0) and type(made.lr) is float


def test_empty_buffers_update() -> None:
    for ours, _, _ in CASES:
        p = torch.zeros(0)
        ours.update(p, p.clone(), ours.state(p), 0)


def test_schedules() -> None:
    assert optim.constant(0.3)(7) == 0.3
    assert [optim.warmup(1.0, 4)(s) for s in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    c = optim.cosine(1.0, 12, warmup=2, floor=0.1)
    assert [c(0), c(1), c(2)] == [0.5, 1.0, 1.0]
    assert math.isclose(c(7), 0.55) and math.isclose(c(12), 0.1) and math.isclose(c(99), 0.1)
    assert optim.SGD(lr=optim.warmup(1.0, 4)).rate(1) == 0.5 and optim.SGD(lr=0.2).rate(5) == 0.2
    leaf = torch.zeros(1, requires_grad=True)
    peer = torch.optim.SGD([leaf], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(peer, 10, eta_min=0.1)
    for step in range(10):
        assert math.isclose(optim.cosine(1.0, 10, floor=0.1)(step), theirs.get_last_lr()[0])
        peer.step()
        theirs.step()


def test_clipping_equals_torch() -> None:
    g = torch.randn(40, dtype=D)
    for limit in (0.5, 1e3):
        leaf = torch.zeros(40, dtype=D, requires_grad=True)
        leaf.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_([leaf], limit)
        assert torch.allclose(g * optim.clip_factor(norm, limit), leaf.grad, rtol=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e20, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_squares_beyond_a_float32_are_summed(size: float, dtype: torch.dtype) -> None:
    flat = torch.randn(1000).clamp(-1, 1).to(dtype) * size
    found = optim.square_sum(flat)
    assert found.dtype is D and found.ndim == 0
    if size > 1e-30:  # whose squares count for nothing in float32, and are not clipped
        assert math.isclose(found, float(flat.double().square().sum()), rel_tol=1e-5)
        clipped = flat * optim.clip_factor(found.sqrt(), 1.0)
        assert clipped.dtype is dtype and math.isclose(clipped.double().norm(), 1.0, rel_tol=1e-5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_no_step_of_zero(bad: float) -> None:
    flat = torch.tensor([1.0, bad, 2.0])
    assert not optim.square_sum(flat).isfinite()
    assert (flat * optim.clip_factor(optim.square_sum(flat).sqrt(), 1.0)).isnan().all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: optim.SGD(lr=-1.0), "a learning rate must be a finite number of at least 0, not -1.0"),
        (lambda: optim.SGD(lr="0.1"), "finite number of at least 0, not '0.1'"),
        (lambda: optim.SGD(lr=math.nan), "finite number of at least 0, not nan"),
        (lambda: optim.SGD(lr=torch.ones(2)), "a learning rate must be"),
        (lambda: optim.SGD(momentum=None), "momentum must be a finite number"),
        (lambda: optim.SGD(weight_decay=-0.1), "weight_decay must be"),
        (lambda: optim.Adam(betas=(0.9, 1.0)), "two numbers from 0 to below 1"),
        (lambda: optim.Adam(betas=(0.9,)), "two numbers"),
        (lambda: optim.Adam(eps="small"), "eps must be"),
        (lambda: optim.SGD(nesterov=True), "momentum above 0"),
        (lambda: optim.Adam(clip=0.0), "clip, the largest norm of a gradient, must be .* above 0, not 0.0"),
        (lambda: optim.cosine(1.0, 5, warmup=5), "0 <= warmup < steps"),
    ],
)
def test_bad_options(make, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=text):
        make()


def test_digits_reach_97_percent() -> None:
    """The plain serial loop, in four lines."""
    net, data = nn.mlp([64, 512, 512, 10]), digits()
    optimizer = optim.SGD(lr=0.1, momentum=0.9)
    state = optimizer.state(net.flat_parameters)
    for step in range(150):
        x, t = data.batch(step, 256)
        _, dy = net.loss.value_and_gradient(net.forward(x), t)
        net.backward(dy)
        optimizer.update(net.flat_parameters, net.flat_gradients, state, step, 1 / net.loss.terms(t))
    assert net.accuracy(data.test_inputs, data.test_targets) >= 0.97
