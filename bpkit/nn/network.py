"""The network: an ordered list of layers over one flat pair of parameters and gradients."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from bpkit.description.costs import StageCost, balanced_cuts
from bpkit.description.flat import Shape
from bpkit.description.network import Description
from bpkit.given import integer
from bpkit.nn.flat import aligned, check_flat, fitting, packed, views
from bpkit.nn.layer import START, Chain, Context, Layer, Run, Site
from bpkit.nn.losses import Loss, make_loss


class Network:
    """A run of layers with its own flat parameters and gradients; a stage of a cut network is one too.

    Parameters
    ----------
    layers : sequence of Layer
        At least one.
    input_shape : int or tuple of int
        Shape of one sample, without the batch dimension.
    loss : "cross_entropy", "mse" or Loss
        The loss that training uses.
    seed : int
        Of the initial parameters and of the dropout masks. One generator serves the whole network, in layer
        order, so equal layers start different; it draws in float64, so both dtypes start alike.
    dtype : torch.float32, torch.float64 or torch.bfloat16
    device : str or torch.device

    Attributes
    ----------
    flat_parameters, flat_gradients : Tensor, shape (flat_size,)
        The tensors lie in the order in which backward produces their gradients (last layer first), each at a
        multiple of 64 bytes; the padding in between is zero.
    flat_size : int
        Elements of a flat buffer, padding included.
    description : bpkit.description.Description
        The network without a number in it.
    flat_buffers : Tensor
        What is kept but not trained, such as batch norm's running statistics.
    input_dtype : torch.dtype
        What `forward` takes: the network's dtype, or that of its first layer's numbers (tokens).

    Raises
    ------
    ValueError
        If the layers' shapes do not chain.
    TypeError
        For another dtype, or something that is not a layer.
    """

    flat_parameters: Tensor
    flat_gradients: Tensor
    flat_buffers: Tensor

    def __init__(self, layers: Sequence[Layer], input_shape: int | Sequence[int], *, loss: str | Loss = "cross_entropy",
                 seed: int = 0, dtype: torch.dtype = torch.float32,
                 device: str | torch.device = "cpu") -> None:  # fmt: skip
        if dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise TypeError(f"a network computes in torch.float32, torch.float64 or torch.bfloat16, not {dtype}")
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise TypeError(f"layer {i} is {layer!r}, not a bp.nn layer")
        given = input_shape if isinstance(input_shape, Iterable) else (input_shape,)
        shape = tuple(integer("Network: each number of input_shape", n, 1, floats=False) for n in given)
        made = make_loss(loss)
        own = made.name if "name" in vars(type(made)) else type(made).__name__  # what a subclass computes is its own
        description = Description(tuple(layers), shape, own, _name(dtype))
        description.skips()  # refuses those with one end
        self._define(description, made, integer("Network: seed", seed), torch.device(device))
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [p for layer, s in self._placed() for p in layer.initial(s, generator)]
        self.load([drawn[i] for i in self.owners])

    def _define(self, description: Description, loss: Loss, seed: int, device: torch.device,
                lenders: Mapping[str, Network] = MappingProxyType({})) -> None:  # fmt: skip
        """Allocate what is described, but for what `lenders` hold; parameters are zero afterwards."""
        self.description, self.loss, self.seed, self.device = description, loss, seed, device
        self.layers, self.input_shape = cast("tuple[Layer, ...]", description.layers), description.input_shape
        self.dtype: torch.dtype = getattr(torch, description.dtype)
        self.shapes, self.output_shape = description.shapes, description.output_shape
        self.flat_size = description.flat_size
        self.input_dtype = self.layers[0].input_dtype or self.dtype
        self.owners = [parameter.owner for parameter in description.parameters]
        self._lenders = lenders
        self._runs: dict[Hashable, Run] = {}
        self._spare: dict[Hashable, Run] = {}  # the binding before: unequal microbatches alternate between two
        self._skips: dict[tuple[str, int, int], Tensor] = {}
        self.flat_parameters, self.flat_gradients = (aligned(self.flat_size, self.dtype, device) for _ in range(2))
        kept = [b for layer, s in self._placed() for b in layer.buffers(s)]
        self.flat_buffers = torch.cat([torch.zeros(0), *(b.flatten() for b in kept)]).to(device, self.dtype)
        self._make_views()

    def _placed(self) -> Iterator[tuple[Layer, Shape]]:
        return zip(self.layers, self.shapes, strict=False)

    def _make_views(self) -> None:
        self._parameters, self._gradients = (views(self, self._lenders, what) for what in ("parameters", "gradients"))
        self._buffers = packed(self.flat_buffers, self.description.buffer_shapes)
        self.release()  # their passes hold the old views

    # Tensors.

    def parameters(self) -> list[Tensor]:
        """Return views of the parameters in layer order, weight then bias, as in ``torch.nn.Linear``."""
        return list(self._parameters)

    def gradients(self) -> list[Tensor]:
        """Return views of the gradients, in the order of `parameters`."""
        return list(self._gradients)

    def buffers(self) -> list[Tensor]:
        """Return views of what is kept but not trained, in layer order."""
        return list(self._buffers)

    def tied_slices(self) -> dict[str, slice]:
        """Return where each parameter with a name lies in the flat buffers; other stages may hold copies of it."""
        return self.description.tied_slices()

    def shares(self) -> list[Tensor]:
        """Return flat views of the gradients that are only a tensor rank's share: to be summed over the ranks."""
        return [self.flat_gradients[parameter.slice] for parameter in self.description.shares()]

    def load(self, tensors: Iterable[Tensor]) -> None:
        """Copy values into the parameters, given in the order of `parameters`, for instance ``module.parameters()``.

        Raises
        ------
        ValueError
            If their number or a shape does not fit; nothing has been changed then.
        """
        for own, given in zip(self._parameters, fitting(tensors, self._parameters), strict=True):
            own.copy_(given.detach())

    def bind(self, parameters: Tensor | None = None, gradients: Tensor | None = None,
             buffers: Tensor | None = None) -> None:  # fmt: skip
        """Move onto the given flat buffers, for instance shared memory, copying the present values into them.

        Kept activations are dropped. Stages that work in its memory (see `split`) are to be bound after it.

        Raises
        ------
        ValueError
            If a buffer is not 1-D of `flat_size` elements, of the network's dtype, on a 64-byte boundary.
        """
        for name, flat in (("parameters", parameters), ("gradients", gradients), ("buffers", buffers)):
            if flat is not None:
                own = getattr(self, f"flat_{name}")
                check_flat(name, flat, len(own), self.dtype)
                flat.copy_(own)
                setattr(self, f"flat_{name}", flat)
        self._make_views()

    # Running.

    def forward(self, x: Tensor, slot: Hashable = 0, context: Context = START) -> Tensor:
        """Run a microbatch forward and keep in `slot` what its backward needs.

        Parameters
        ----------
        x : Tensor, shape (rows, *input_shape)
            Kept by reference until the slot's backward is done. It may have no rows. Autograd does not follow it.
        slot : hashable
            Names the microbatch in flight; a slot's buffers are used again while its shapes are one of two.
        context : Context

        Returns
        -------
        Tensor, shape (rows, *output_shape)
            Valid until the same slot's next forward.

        Raises
        ------
        ValueError, TypeError
            If the input's shape, dtype or device is not the network's.
        """
        if x.requires_grad:
            x = x.detach()
        run = self._runs.get(slot)
        if run is None or run.shape != x.shape or run.dtype is not x.dtype:
            run = self._prepare(slot, x)
        return run.chain.forward(x, context)

    def backward(self, dy: Tensor, slot: Hashable = 0, accumulate: bool = False,
                 need_input: bool = False) -> Tensor | None:  # fmt: skip
        """Run the whole backward (B) of the microbatch in `slot`.

        Parameters
        ----------
        dy : Tensor, shape (rows, *output_shape)
            Gradient of the loss's sum with respect to the output; kept by reference, never overwritten.
        slot : hashable
        accumulate : bool
            Add to the gradients instead of overwriting them (all microbatches of a step but the first).
        need_input : bool
            Also return the gradient of the input; None otherwise.
        """
        return self._run(slot).chain.backward(dy.detach(), accumulate, need_input)

    def backward_input(self, dy: Tensor, slot: Hashable = 0, need_input: bool = True) -> Tensor | None:
        """Run the input half (I): return the input's gradient and keep what `backward_weight` needs.

        With ``need_input=False`` (the first stage) the input's gradient is left out and None is returned.
        """
        return self._run(slot).chain.backward_input(dy.detach(), need_input)

    def backward_weight(self, slot: Hashable = 0, accumulate: bool = False) -> None:
        """Run the weight half (W) of the microbatch in `slot`, after its input half."""
        self._run(slot).chain.backward_weight(accumulate)

    def _run(self, slot: Hashable) -> Run:
        run = self._runs.get(slot)
        if run is None:
            raise RuntimeError(f"backward of slot {slot!r} without a forward before it")
        return run

    def check_inputs(self, x: Tensor) -> None:
        """Refuse samples that the network cannot take; who runs it on others' data calls this once, before the start.

        Parameters
        ----------
        x : Tensor, shape (samples, *input_shape)
            Training or test samples, all of them: their shape, dtype and device are checked, and of tokens that each
            is in the vocabulary (the whole one, also where this is a tensor rank's part). Targets are for `Loss.check`.

        Raises
        ------
        ValueError, TypeError
            With what is wrong, and what would be right.
        """
        self._check_form(x)
        self.layers[0].check(x)

    @property
    def least_rows(self) -> int:
        """Samples that a microbatch must have in training, if any: 2 for batch norm of one value a channel and sample.

        With statistics over data ranks it is the microbatch of all these together.
        """
        return max(layer.least_rows(s) for layer, s in self._placed())

    def _check_form(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.input_shape or x.ndim == 0:
            raise ValueError(f"the network takes inputs of shape {('rows', *self.input_shape)}, not {tuple(x.shape)}")
        if x.dtype is not self.input_dtype:
            raise TypeError(f"the network takes inputs of {self.input_dtype} and got inputs of {x.dtype}")
        if x.device.type != self.device.type:
            raise ValueError(f"the network is on {self.device} and got inputs on {x.device}")

    def _prepare(self, slot: Hashable, x: Tensor) -> Run:
        """Check an input's form and bind a chain for its shape."""
        self._check_form(x)
        before, run = self._runs.get(slot), self._spare.get(slot)
        if run is None or run.shape != x.shape or run.dtype is not x.dtype:
            run = Run(x.shape, x.dtype, Chain(self.layers, self.site(x.shape[0])))
        self._spare |= {slot: before} if before else {}
        self._runs[slot] = run
        return run

    def site(self, rows: int) -> Site:
        """Return the site of the whole network for a batch of `rows`."""
        return Site(self._parameters, self._gradients, (rows, *self.input_shape), self.dtype, self.device,
                    self.description.first_leaf, self.seed, buffers=self._buffers,
                    added=tuple(p.added for p in self.description.parameters), skips=self._skips)  # fmt: skip

    def release(self) -> None:
        """Drop the buffers of all slots."""
        self._runs.clear()
        self._spare.clear()

    def predict(self, x: Tensor, rows: int = 1024) -> Tensor:
        """Return outputs with training off, computed `rows` samples at a time.

        Raises
        ------
        ValueError
            If there is no sample.
        """
        if x.ndim == 0 or len(x) == 0:
            raise ValueError("an empty batch has nothing to predict: give at least one sample")
        off = Context(training=False)
        result = torch.cat([self.forward(part, "predict", off).clone() for part in x.split(rows)])
        del self._runs["predict"]
        self._spare.pop("predict", None)
        return result

    def accuracy(self, x: Tensor, targets: Tensor) -> float:
        """Return the share of targets that are the largest output (targets below 0 do not count)."""
        hits = self.predict(x).argmax(-1) == targets
        return float(hits[targets >= 0].double().mean())

    # Cutting and copying.

    def split(self, stages: int | Sequence[int], together: Sequence[int] | None = None) -> tuple[Network, ...]:
        """Cut the network into stages, each a network with copies of its parameters in its own flat buffers.

        Parameters
        ----------
        stages : int or sequence of int
            The number of stages, balanced by cost; or the indices of the layers at which a new stage starts,
            strictly increasing: ``[2, 4]`` on 6 layers gives 3 stages.
        together : sequence of int, optional
            The process of each stage: stages of one hold a tied tensor once, in the first, and all add to its gradient.

        Raises
        ------
        ValueError
            If the network cannot be cut so.
        """
        if isinstance(stages, int):
            stages = balanced_cuts([cost.total for cost in self.costs()], stages)
        bounds = pairwise((0, *self.description.checked(stages), len(self.layers)))
        made: list[Network] = []
        for part, (a, b) in zip(self.description.split(stages, together), bounds, strict=True):
            made.append(self._stage(part, a, b, {name: made[stage] for name, stage in part.lent}))
        return tuple(made)

    def _stage(self, part: Description, start: int, stop: int, lenders: Mapping[str, Network]) -> Network:
        """Return layers `start` to `stop`, a part, as a network of their own."""
        stage = Network.__new__(Network)
        stage._define(part, self.loss, self.seed, self.device, lenders)
        held = zip(self._parameters, self.description.parameters, strict=True)
        stage.load([tensor for tensor, place in held if start <= place.layer < stop])
        kept = [sum(math.prod(b) for la, s in run for b in la.buffer_shapes(s))
                for run in (list(self._placed())[:start], list(self._placed())[:stop])]  # fmt: skip
        stage.flat_buffers.copy_(self.flat_buffers[kept[0] : kept[1]])
        stage._skips = self._skips
        return stage

    def like(self, description: Description, loss: Loss, device: str | torch.device | None = None) -> Network:
        """Return a network of this description, with this one's seed and on its device, its parameters zero."""
        other = Network.__new__(Network)
        other._define(description, loss, self.seed, torch.device(device or self.device))
        return other

    def opened(self) -> Network:
        """Return the network with its containers written out as layers, skips as pairs of layers: cut anywhere.

        It computes the same, dropout masks included, and its `parameters` are the same in the same order. Stages must
        run together in one process where a skip goes from one to another.
        """
        opened = self.description.opened()
        if opened is self.description:
            return self
        other = self.like(opened, self.loss)
        other.load(self.parameters())
        other.flat_buffers.copy_(self.flat_buffers)
        return other

    def copy(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Network:
        """Return a network with the same values in buffers of its own (on `device`, in `dtype`; float32 and bfloat16
        are laid out alike), without kept activations."""
        other = self.like(replace(self.description, dtype=_name(dtype or self.dtype), lent=()), self.loss, device)
        tensors = [(*net._parameters, *net._gradients, net.flat_buffers) for net in (self, other)]
        for own, to in zip(*tensors, strict=True):
            to.copy_(own)
        return other

    def _flats(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.flat_parameters, self.flat_gradients, self.flat_buffers

    def __getstate__(self) -> dict[str, Any]:
        if self._lenders:
            return self.copy().__getstate__()
        # As NumPy: multiprocessing would turn a tensor into shared memory that dies with its sender.
        define = (self.description, self.loss, self.seed, self.device)
        return {"define": define, "flats": [flat.cpu().view(torch.uint8).numpy() for flat in self._flats()]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._define(*state["define"])
        for flat, held in zip(self._flats(), state["flats"], strict=True):
            flat.view(torch.uint8).copy_(torch.from_numpy(held))

    def costs(self) -> tuple[StageCost, ...]:
        """Return the cost of each layer for one sample."""
        return self.description.costs()

    def describe(self) -> str:
        """Return a short text, such as ``mlp 64-512-512-10, 301,066 parameters``."""
        return self.description.text

    def __repr__(self) -> str:
        return f"<Network: {self.describe()}>"


def _name(dtype: torch.dtype) -> str:
    """A dtype's name in a description."""
    return str(dtype).removeprefix("torch.")
