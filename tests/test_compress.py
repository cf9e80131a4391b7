"""The codes of gradient compression by themselves: their bounds and their bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bpkit.compress import BF16, FP16, Codec, Int8, PowerSGD, TopK

CODECS = [BF16(), FP16(), Int8(), TopK(0.01), TopK(0.3), TopK(1.0)]
SLACK = 1 + 2**-12  # to rounding


def values(n: int, dtype: torch.dtype, scale: float) -> Tensor:
    """Of many magnitudes, with zeros."""
    generator = torch.Generator().manual_seed(n)
    found = torch.randn(n, generator=generator, dtype=torch.float64)
    found *= scale * 10.0 ** torch.randint(-6, 1, (n,), generator=generator)
    found[:: max(2, n // 7)] = 0.0
    return found.to(dtype)


def through(codec: Codec, v: Tensor) -> Tensor:
    """What the others get."""
    code = torch.full((codec.size(len(v), v.element_size()),), 255, dtype=torch.uint8)
    codec.encode(v, code)
    return codec.decode(code, torch.empty_like(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 16, 1000])
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e7])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_the_bound_of_the_docstring_holds(codec, scale, n, dtype):
    v = values(n, dtype, scale).double()
    v = v.to(dtype)
    error, most = (through(codec, v) - v).double().abs(), float(v.abs().max())
    if isinstance(codec, BF16):
        assert (error <= SLACK * 2**-8 * v.abs()).all()
    elif isinstance(codec, FP16):
        assert (error <= SLACK * (2**-11 * v.abs() + 2**-39 * most)).all()
    elif isinstance(codec, Int8):
        assert (error <= SLACK * most / 254).all()
    else:
        kept = math.ceil(codec.share * n)
        assert float(error.square().sum()) <= SLACK * (1 - kept / n) * float(v.double().square().sum())


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_the_bound_is_not_idle(codec):
    """Compression loses something, but for TopK of all."""
    v = values(1000, torch.float32, 1.0)
    assert torch.equal(through(codec, v), v) == (codec == TopK(1.0))


@pytest.mark.parametrize("n", [1, 8, 1000, 4099])
@pytest.mark.parametrize("width", [4, 8])
def test_bytes_are_those_of_the_docstring(n, width):
    expected = {BF16(): 2 * n, FP16(): 2 * n + 8, Int8(): n + 8, TopK(0.01): math.ceil(n / 100) * (width + 4)}
    for codec, formula in expected.items():
        assert codec.size(n, width) == -(-formula // 8) * 8, codec


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_zeros_stay_zeros_and_what_is_no_number_shows(codec):
    assert not through(codec, torch.zeros(64)).any()
    broken = torch.ones(64)
    broken[3] = math.nan
    assert not through(codec, broken).isfinite().all()


def test_sums_beyond_float16_do_not_overflow():
    v = torch.tensor([1e30, -7e29, 1e20])
    assert torch.allclose(through(FP16(), v), v, rtol=2**-10, atol=2**-39 * 1e30)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, math.nan])
def test_a_share_of_nothing_or_more_than_all_is_refused(share):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        TopK(share)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match="at least 1"):
        PowerSGD(rank)


def test_only_what_two_factors_shorten_is_factored():
    assert PowerSGD(4).applies(torch.empty(64, 64)) and PowerSGD(4).applies(torch.empty(64, 8, 3, 3))
    assert not PowerSGD(4).applies(torch.empty(8, 8)) and not PowerSGD(1).applies(torch.empty(64))
