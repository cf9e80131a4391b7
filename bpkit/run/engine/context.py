"""What the actions of one rank work on, and the register of what runs each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor

from bpkit.nn import Context, Network
from bpkit.plan import liveness
from bpkit.plan.action import Action, Buffer
from bpkit.run.engine.memory import Buffers
from bpkit.run.engine.precision import Mixed
from bpkit.run.transports.comm import Then

Call = Callable[[], Any]  # communication returns what it posted, or None; what compute returns is not used
Maker = Callable[["Rank", Action, int], Call]

RUNS: Final[dict[str, Maker]] = {}  # by kind; filled by `runs`, when `compute` and `communication` are imported


def runs(*kinds: str) -> Callable[[Maker], Maker]:
    """Register a function that binds the actions of some kinds: from rank, action and index to what the step calls."""

    def register(maker: Maker) -> Maker:
        RUNS.update(dict.fromkeys(kinds, maker))
        return maker

    return register


def nothing() -> None:
    """What an action calls that has nothing to do on this rank."""


@dataclass
class StepData:
    """What one step works on; filled before the row runs."""

    number: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    contexts: list[Context] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # of each microbatch's terms, in LOSS
    scale: float = 1.0  # of the merged gradient, in UPDATE
    losses: dict[int, Tensor] = field(default_factory=dict)  # of each microbatch: the sum over its terms
    sum_over_data: Callable[[Tensor], Tensor] | None = None  # for batch norm over all data ranks
    skips: bool = False  # whether a step makes no update where its gradient is not finite
    skipped: int = 0  # such steps so far

    def begin(self, number: int) -> None:
        """Make room for another step."""
        self.number, self.losses = number, {}
        self.inputs, self.targets, self.contexts, self.weights = [], [], [], []

    def load(self, step: int, inputs: Tensor, targets: Tensor, first: int, weights: Sequence[float],
             shares: Sequence[float]) -> None:  # fmt: skip
        """Cut this rank's shard of a step's batch into microbatches; the first ones take the remainder."""
        parts = inputs.tensor_split(len(weights))
        starts = accumulate(map(len, parts[:-1]), initial=first)
        self.inputs += parts
        self.targets += targets.tensor_split(len(weights))
        self.contexts += [Context(step, start, True, self.sum_over_data, share=share)
                          for start, share in zip(starts, shares, strict=True)]  # fmt: skip
        self.weights += weights

    def loss(self, ahead: bool = False) -> Callable[[], list[float]]:
        """What gives the microbatches' weighted losses, once the step has ended where the host is `ahead` of it."""
        places, weights, values = list(self.losses), self.weights, list(self.losses.values())
        if values and values[0].is_cuda:
            values = list(torch.stack(values).to("cpu", non_blocking=ahead))  # into pinned memory then

        def read() -> list[float]:
            result = [0.0] * len(weights)
            for mb, value in zip(places, values, strict=True):
                result[mb] = float(value) * weights[mb]
            return result

        return read


@dataclass
class Rank:
    """One rank's row, its memory, and what passes between its actions.

    Parameters
    ----------
    buffers : Buffers
    step : StepData
        Filled before each step.
    captured : dict, optional
        Where UPDATE puts what it would apply, by stage, instead of applying it.
    precision : {"full", "bf16"}

    Attributes
    ----------
    edges : dict of Buffer to Tensor
        Activations and their gradients, under way between actions.
    borrowed : dict of Buffer to Then
        Of edges that were received: what gives their memory back.
    """

    buffers: Buffers
    step: StepData
    captured: dict[int, Tensor] | None = None
    precision: str = "full"
    edges: dict[Buffer, Tensor] = field(default_factory=dict)
    borrowed: dict[Buffer, Then] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plan, self.row, self.groups = self.buffers.program.plan, self.buffers.row, self.buffers.groups
        self.slots = liveness.forward_slots(self.row)
        self.given_back = liveness.given_back(self.row)
        self.overwriting, self.emptying = liveness.first_writes(self.row, self.plan)
        self.weights_of, counts = liveness.weight_copies(self.row) if self.plan.stashed else ({}, {})
        self.copies = self.buffers.copies(counts)
        self.mixed = {s: Mixed(net) for s, net in self.buffers.stages.items()} if self.precision == "bf16" else {}
        self.buffers.halves = sum(net.bytes for net in self.mixed.values())

    def bind(self) -> list[Call]:
        """What each action of the row calls, in every step.

        Over an axis of one a collective changes nothing; only SCATTER_GRAD still moves the gradient.
        """
        alone = {axis for axis in ("data", "tensor") if getattr(self.plan.mesh, axis) == 1}
        idle = {a for a in self.row if a.verb.axis in alone and a.verb.bytes == "native" and not a.verb.touches("R")}
        return [nothing if a in idle else RUNS[a.kind](self, a, index) for index, a in enumerate(self.row)]

    def net(self, action: Action, index: int) -> Network | Mixed:
        """The stage, with the copy of its parameters that an action reads."""
        return self.mixed.get(action.stage) or self.copies[action.stage][self.weights_of.get(index, (0, 0))[0]]
