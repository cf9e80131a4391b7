"""The description of a network: what it says is what the network has, and nothing is allocated for it."""

from __future__ import annotations

import pickle
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bpkit as bp
from bpkit.description import Description, shard
from bpkit.description import layers as bare
from bpkit.plan import compile, data_parallel, gpipe, interleaved, one_f_one_b, serial, tensor_parallel, zero

GPT = bp.nn.gpt(11, 4, width=12, heads=2, layers=2)
NETWORKS = {"mlp": bp.nn.mlp([6, 7, 5, 4]), "gpt": GPT, "double": bp.nn.gpt(11, 4, 12, 2, dtype=torch.float64),
            "images": bp.nn.convnet(8, (1, 3, 5))}  # fmt: skip


def described_gpt(vocabulary: int, length: int, width: int, heads: int, layers: int) -> Description:
    """The description that `bp.nn.gpt` makes, from bare layers."""
    attention = bare.Sequential(bare.Linear(width, 3 * width), bare.Heads(heads), bare.Linear(width, width))
    mlp = (bare.Linear(width, 4 * width), bare.GELU(), bare.Linear(4 * width, width))
    block = [bare.Residual(bare.LayerNorm(width), attention), bare.Residual(bare.LayerNorm(width), *mlp)]
    start, end = (bare.Embedding(vocabulary, width, "embedding"), bare.Positions(length, width)), bare.LayerNorm(width)
    return Description((*start, *block * layers, end, bare.Unembedding(width, vocabulary)), (length,))


class NoTensor(TorchDispatchMode):
    """No operation of torch's is allowed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


@pytest.mark.parametrize("name", NETWORKS)
def test_tensors_lie_where_the_description_says(name):
    network = NETWORKS[name]
    description = pickle.loads(pickle.dumps(network.description))
    assert description == network.description and description.itemsize == network.dtype.itemsize
    assert network.flat_parameters.shape == (description.flat_size,)
    for tensor, place in zip(network.parameters(), description.parameters, strict=True):
        assert torch.equal(network.flat_parameters[place.slice], tensor.flatten())
        assert place.offset * description.itemsize % 64 == 0
    for cuts in ([1], [2, 3]):
        for real, said in zip(network.split(cuts), description.split(cuts), strict=True):
            assert real.description == said and real.flat_size == said.flat_size
            assert sum(map(len, map(torch.flatten, real.buffers()))) == sum(map(torch.Size.numel, map(
                torch.Size, said.buffer_shapes)))


@pytest.mark.parametrize("sequence", [False, True])
def test_a_tensor_rank_has_what_the_description_says(sequence):
    cuts = bp.nn.tensor_layout(GPT, sequence).cuts
    assert bp.nn.tensor_layout(GPT.description, sequence) == bp.nn.tensor_layout(GPT, sequence)
    for index in range(2):
        real, said = bp.nn.shard(GPT, index, 2, sequence), shard(GPT.description, index, 2, sequence)
        assert said == real.description and said.costs() == real.costs()
        assert [s.flat_size for s in real.split(cuts)] == [len(s.flat_gradients) for s in real.split(cuts)]
        assert [s.flat_size for s in said.split(cuts)] == [s.flat_size for s in real.split(cuts)]


def test_a_description_of_bare_layers_is_that_of_the_network():
    bare_gpt = described_gpt(11, 4, 12, 2, 2)
    assert bare_gpt.costs() == GPT.costs() and bare_gpt.shapes == GPT.shapes and bare_gpt.text == GPT.describe()
    assert bare_gpt.parameters == GPT.description.parameters
    assert bare_gpt.opened().parameters == GPT.opened().description.parameters
    layout = bp.nn.tensor_layout(GPT, sequence=True)
    assert bp.nn.tensor_layout(bare_gpt, sequence=True) == layout
    for plan in (data_parallel(2, 3), one_f_one_b(2, 4), tensor_parallel(gpipe(2, 2), 2, layout)):
        assert compile(plan, bare_gpt) == compile(plan, GPT)


def test_compile_allocates_no_tensor():
    layout = bp.nn.tensor_layout(GPT, sequence=True)
    plans = [serial(), data_parallel(4, 3), zero(2, 1, units=1), one_f_one_b(2, 4), interleaved(2, 4, 2),
             tensor_parallel(one_f_one_b(2, 2, data=2), 2, layout)]  # fmt: skip
    with pytest.raises(AssertionError, match="was called"), NoTensor():
        torch.zeros(1)
    with NoTensor():
        for plan in plans:
            compile(plan, GPT, clip=True)
        compile(data_parallel(2), NETWORKS["images"])
        bp.plan.bucket_cuts(GPT, 0.001)


def test_a_network_larger_than_any_memory_compiles_at_once():
    large = described_gpt(50257, 2048, width=12288, heads=96, layers=96)
    began = time.perf_counter()
    program = compile(one_f_one_b(8, 16), large)
    assert time.perf_counter() - began < 5
    assert 175e9 < sum(program.sizes) < 176e9  # both copies of the tied matrix


@pytest.mark.parametrize("layers", [
    [bp.nn.Linear(6, 6), bp.nn.StashSkip(0), bp.nn.Linear(6, 4)],
    [bp.nn.AddSkip(0), bp.nn.Linear(6, 6), bp.nn.StashSkip(0)],
    [bp.nn.StashSkip(0), bp.nn.Linear(6, 6), bp.nn.AddSkip(0), bp.nn.StashSkip(0), bp.nn.AddSkip(0)],
    [bp.nn.Sequential(bp.nn.StashSkip(3), bp.nn.StashSkip(3)), bp.nn.AddSkip(3)],
])  # fmt: skip
def test_a_skip_has_two_ends(layers):
    with pytest.raises(ValueError, match="one StashSkip and, behind it, one AddSkip"):
        bp.nn.Network(layers, 6)


def test_a_skip_adds_samples_of_one_shape():
    with pytest.raises(ValueError, match=r"AddSkip of the same shape.* on samples of shape \(6,\) in layer 3"):
        bp.nn.Network([bp.nn.Linear(6, 1), bp.nn.StashSkip(0), bp.nn.Linear(1, 6), bp.nn.AddSkip(0)], 6)


def test_written_out_residuals_get_numbers_that_are_free():
    network = bp.nn.Network([bp.nn.StashSkip(0), bp.nn.Residual(bp.nn.Linear(6, 6)), bp.nn.Residual(bp.nn.Tanh()),
                             bp.nn.AddSkip(0), bp.nn.Linear(6, 4)], 6, dtype=torch.float64)  # fmt: skip
    assert network.description.skips() == ((0, 3),)
    assert network.opened().description.skips() == ((0, 7), (1, 3), (4, 6))
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(network.predict(x), network.opened().predict(x))
    assert bp.nn.gradcheck(network.opened(), x, torch.arange(5) % 4).ok
