"""Optimizers, learning-rate schedules and clipping, on flat 1-D buffers.

An optimizer is a frozen description; what it remembers is a tuple of tensors, made by `state` for a buffer
or for any slice of one and changed by `update`. Gradients are sums; `update` multiplies them by `scale`: one
over the number of loss terms, times the clipping factor. The formulas are those of ``torch.optim`` and of the
papers named below.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bpkit.given import number

Schedule = Callable[[int], float]
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class constant:
    """The same learning rate at every step."""

    lr: float

    def __call__(self, step: int) -> float:
        return self.lr


@dataclass(frozen=True)
class warmup:
    """Rise to `lr` over `steps` steps, lr (step + 1) / steps, then stay (Goyal et al. 2017, 1706.02677)."""

    lr: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / self.steps) if self.steps > 0 else self.lr


@dataclass(frozen=True)
class cosine:
    """Warm up over `warmup` steps, then fall along half a cosine to `floor` at step `steps`, and stay there.

    floor + (lr - floor) (1 + cos(pi t)) / 2, t from 0 to 1 (Loshchilov and Hutter 2017, arXiv:1608.03983).
    """

    lr: float
    steps: int
    warmup: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"cosine needs 0 <= warmup < steps, not warmup={self.warmup}, steps={self.steps}")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        t = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return self.floor + (self.lr - self.floor) * (1 + math.cos(math.pi * t)) / 2


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what gradients of global `norm` are multiplied by so that it is at most `max_norm`.

    min(1, max_norm / (norm + 1e-6)), as ``torch.nn.utils.clip_grad_norm_``, on the norm's device; but of a norm that is
    not finite NaN, where torch gives 0: a step that cannot be right must show, and not pass for one of size zero.
    """
    return (max_norm / (norm + 1e-6)).clamp_(max=1.0).add_(norm * 0.0)


def square_sum(flat: Tensor) -> Tensor:
    """Return the sum of squares (0-d, float64), also where squares, but not elements, are beyond a float32.

    On the CPU in one pass over memory, and another one only where the first overflowed.
    """
    if flat.is_cpu:
        total = torch.dot(flat, flat).double()
        if math.isfinite(total):
            return total
    return torch.linalg.vector_norm(flat, dtype=torch.float64).square_()


class Optimizer:
    """Base of all optimizers.

    Parameters
    ----------
    lr : float or schedule
        Learning rate; a schedule is called with the step, from 0.
    weight_decay : float
    clip : float or None
        Largest global norm of the scaled gradient. Who calls `update` sees to it, since the norm may span
        ranks: ``grads * clip_factor(scale * norm, optimizer.clip)``.
    """

    lr: float | Schedule
    weight_decay: float
    clip: float | None

    def __post_init__(self) -> None:
        if not callable(self.lr):
            self._number("lr", "a learning rate", least=0)
        self._number("weight_decay", "weight_decay", least=0)
        if self.clip is not None:
            self._number("clip", "clip, the largest norm of a gradient,", above=0)

    def _number(self, name: str, what: str, **bounds: float) -> None:
        object.__setattr__(self, name, number(what, getattr(self, name), **bounds))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.lr(step) if callable(self.lr) else self.lr

    def state(self, flat: Tensor) -> State:
        """Return the state at step 0 for parameters shaped as `flat`."""
        raise NotImplementedError

    def update(self, params: Tensor, grads: Tensor, state: State, step: int, scale: float = 1.0) -> None:
        """Change `params` and `state` in place; `grads`, a sum, is only read.

        Parameters
        ----------
        params, grads : Tensor, shape (n,)
        state : tuple of Tensor
            From `state`.
        step : int
            From 0.
        scale : float
            Multiplies the gradient.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent with momentum, as ``torch.optim.SGD`` (Sutskever et al. 2013, without dampening).

    g = scale x gradient + weight_decay p; v = momentum v + g; p -= lr v, or p -= lr (g + momentum v) with
    `nesterov`.
    """

    lr: float | Schedule = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._number("momentum", "momentum", least=0)
        if self.nesterov and not self.momentum > 0:
            raise ValueError("nesterov needs a momentum above 0")

    def state(self, flat: Tensor) -> State:
        return (torch.zeros_like(flat),) if self.momentum else ()

    def update(self, params: Tensor, grads: Tensor, state: State, step: int, scale: float = 1.0) -> None:
        lr = self.rate(step)
        if not self.momentum:
            if self.weight_decay:
                params.mul_(1 - lr * self.weight_decay)
            params.add_(grads, alpha=-lr * scale)
            return
        velocity = state[0]
        # momentum v + scale g in one pass over memory (an outer product with 1), where mul_ and add_ take two.
        velocity.view(-1, 1).addr_(grads, grads.new_ones(1), beta=self.momentum, alpha=scale)
        if self.weight_decay:
            velocity.add_(params, alpha=self.weight_decay)
        if self.nesterov:
            # g + momentum v, with g added first: its weight decay reads the parameters before they change.
            if self.weight_decay:
                params.mul_(1 - lr * self.weight_decay)
            params.add_(grads, alpha=-lr * scale)
            lr *= self.momentum
        params.add_(velocity, alpha=-lr)


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, arXiv:1412.6980), as ``torch.optim.Adam``; weight decay joins g."""

    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._number("eps", "eps", least=0)
        object.__setattr__(self, "betas", tuple(number("each of the two betas", b, least=0) for b in self.betas))
        if len(self.betas) != 2 or max(self.betas) >= 1:
            raise ValueError(f"betas are two numbers from 0 to below 1, not {self.betas}")

    def state(self, flat: Tensor) -> State:
        return torch.zeros_like(flat), torch.zeros_like(flat)

    def update(self, params: Tensor, grads: Tensor, state: State, step: int, scale: float = 1.0) -> None:
        if self.weight_decay:
            grads, scale = torch.add(grads * scale, params, alpha=self.weight_decay), 1.0
        self._step(params, grads, state, step, scale)

    def _step(self, params: Tensor, grads: Tensor, state: State, step: int, scale: float) -> None:
        """Move by the corrected mean over the root of the corrected mean square."""
        mean, square = state
        b1, b2 = self.betas
        mean.mul_(b1).add_(grads, alpha=(1 - b1) * scale)
        square.mul_(b2).addcmul_(grads, grads, value=(1 - b2) * scale * scale)
        root = torch.sqrt(square).mul_(1 / math.sqrt(1 - b2 ** (step + 1))).add_(self.eps)
        params.addcdiv_(mean, root, value=-self.rate(step) / (1 - b1 ** (step + 1)))


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, 1711.05101): p -= lr weight_decay p."""

    weight_decay: float = 0.01

    def update(self, params: Tensor, grads: Tensor, state: State, step: int, scale: float = 1.0) -> None:
        params.mul_(1 - self.rate(step) * self.weight_decay)
        self._step(params, grads, state, step, scale)
