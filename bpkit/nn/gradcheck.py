"""Check hand-written gradients against autograd and against finite differences, in float64.

This is the only place in `bpkit` where autograd runs, as an oracle.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bpkit.nn.layer import START, Context
from bpkit.nn.layers.containers import Sequential
from bpkit.nn.network import Network


@dataclass(frozen=True)
class GradCheck:
    """Errors of the gradients of "input" and "parameter 0", ...: max|a - b| / max|b| for each tensor.

    Parameters
    ----------
    autograd, differences : dict of str to float
        Errors against autograd, and against central finite differences at sampled elements.
    rounding : dict of str to float
        Errors of differences that their own rounding explains: some units in the loss's last place, over `step`.
    """

    autograd: dict[str, float]
    differences: dict[str, float]
    rounding: dict[str, float]

    @property
    def ok(self) -> bool:
        """Whether autograd agrees to 1e-12 and finite differences agree to 1e-6, or to their rounding."""
        near = [error <= max(1e-6, self.rounding[name]) for name, error in self.differences.items()]
        return all(e <= 1e-12 for e in self.autograd.values()) and all(near)

    def __str__(self) -> str:
        lines = [f"{'gradient':<14}{'autograd':>10}{'differences':>13}   max|a - b| / max|b|"]
        lines += [f"{name:<14}{e:>10.1e}{self.differences[name]:>13.1e}" for name, e in self.autograd.items()]
        return "\n".join([*lines, "gradients agree" if self.ok else "gradients DIFFER (limits 1e-12 and 1e-6)"])


def gradcheck(network: Network, x: Tensor, targets: Tensor, *, context: Context = START, samples: int = 20,
              step: float = 1e-6) -> GradCheck:  # fmt: skip
    """Compare a network's gradients of the loss's sum with autograd and central finite differences.

    Parameters
    ----------
    network : Network
        Of float64; its gradients are overwritten.
    x, targets : Tensor
        A batch with at least one sample.
    context : Context
        Places the dropout masks, which are the same in all three computations.
    samples : int
        Elements of each tensor at which differences are taken, evenly spread.
    step : float
        Half-width of a difference, in absolute terms.

    Notes
    -----
    A tensor's error is relative to its largest element, or, where its gradient vanishes in theory (below
    1e-10 of the network's largest), to a tenth of the network's largest, so that 1e-12 of it is 1e-13.

    Raises
    ------
    TypeError
        If the network is not of float64.
    ValueError
        If the batch is empty.
    """
    if network.dtype is not torch.float64:
        raise TypeError(f"gradients are checked in torch.float64; this network is of {network.dtype}")
    if len(x) == 0:
        raise ValueError("an empty batch has no gradient to check: give at least one sample")
    parameters = network.parameters()
    ours = _by_hand(network, x, targets, context)
    own = [p.detach().clone().requires_grad_() for p in parameters]
    leaves = [own[i] for i in network.owners]  # tied weights are one leaf
    point = x.detach().clone().requires_grad_() if x.is_floating_point() else x
    wanted = [point, *leaves] if point.requires_grad else leaves
    theirs = torch.autograd.grad(reference_loss(network, point, leaves, targets, context), wanted)
    largest = max(float(g.abs().max()) for g in theirs)
    moved = x.detach().clone(memory_format=torch.contiguous_format)  # is changed element by element, as parameters are

    def value() -> float:
        return float(network.loss.value(network.forward(moved, "gradcheck", context), targets))

    tensors = {f"parameter {i}": parameter for i, parameter in enumerate(parameters)}
    if point.requires_grad:  # tokens have no gradient
        tensors = {"input": moved, **tensors}
    autograd, differences, rounding = {}, {}, {}
    unit = 8 * torch.finfo(torch.float64).eps * abs(value()) / step
    for (name, tensor), a, b in zip(tensors.items(), ours, theirs, strict=True):
        size = float(b.abs().max())
        scale = size if size > 1e-10 * largest else 0.1 * largest or 1.0
        autograd[name] = float((a - b).abs().max()) / scale
        differences[name] = _difference_error(tensor, a, value, samples, step) / scale
        rounding[name] = unit / scale
    network.release()
    return GradCheck(autograd, differences, rounding)


def reference_loss(network: Network, x: Tensor, parameters: list[Tensor], targets: Tensor,
                   context: Context = START) -> Tensor:  # fmt: skip
    """Compute the loss's sum with torch's own functions, differentiable by autograd."""
    y = Sequential(*network.layers).reference(x, parameters, context, network.site(len(x)))
    return network.loss.reference(y, targets)


def _by_hand(network: Network, x: Tensor, targets: Tensor, context: Context) -> list[Tensor]:
    """Return copies of the hand-written gradients: the input's, then the parameters'."""
    y = network.forward(x, "gradcheck", context)
    _, dy = network.loss.value_and_gradient(y, targets)
    dx = network.backward(dy, "gradcheck", need_input=True)
    return [g.clone() for g in (*([dx] if dx is not None else []), *network.gradients())]


def _difference_error(tensor: Tensor, gradient: Tensor, value: Callable[[], float], samples: int, step: float) -> float:
    """Return the largest |gradient - central difference| over evenly spread elements of `tensor`."""
    flat, worst = tensor.view(-1), 0.0  # of either, in the order of its elements, however they lie
    for i in torch.linspace(0, flat.numel() - 1, min(samples, flat.numel())).long().unique().tolist():
        old = float(flat[i])
        flat[i] = old + step
        above = value()
        flat[i] = old - step
        below = value()
        flat[i] = old
        worst = max(worst, abs(float(gradient.reshape(-1)[i]) - (above - below) / (2 * step)))
    return worst
