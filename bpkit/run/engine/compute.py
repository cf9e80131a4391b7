"""What each kind of action does on a rank: closures that the executor calls."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bpkit.nn import Network
from bpkit.optim import clip_factor
from bpkit.plan.action import Action
from bpkit.run.engine.communication import ON_GRADIENTS, Communication
from bpkit.run.engine.host import Runner, assign_slots
from bpkit.run.engine.precision import Mixed
from bpkit.run.engine.stash import stash


def _own(made: Tensor, given: Tensor) -> Tensor:
    """What a stage has made, copied where it is what the stage was given: a skip, or a change of shape, passes it on,
    and its owner uses the memory again as soon as this stage has done with it, whoever else still reads it."""
    passed_on = made.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return made.clone() if passed_on else made


@dataclass
class Verbs(Communication):
    """Binds the actions of one row to a rank's buffers.

    Parameters
    ----------
    captured : dict, optional
        Where UPDATE puts what it would apply, by stage, instead of applying it.
    precision : {"full", "bf16"}
    """

    captured: dict[int, Tensor] | None = None
    precision: str = "full"

    def __post_init__(self) -> None:
        self._slots = assign_slots(self.buffers.row)
        self._used, counts = stash(self.buffers.row) if self.buffers.program.plan.stashed else ({}, {})
        self._copies = self.buffers.copies(counts)
        mixed = self.buffers.stages if self.precision == "bf16" else {}
        self._mixed = {stage: Mixed(net) for stage, net in mixed.items()}
        self.buffers.halves = sum(net.bytes for net in self._mixed.values())

    def _net(self, action: Action, index: int) -> Network | Mixed:
        """The stage, with the copy of its parameters that an action reads."""
        return self._mixed.get(action.stage) or self._copies[action.stage][self._used.get(index, (0, 0))[0]]

    def bind(self) -> list[Runner]:
        """One callable an action of the row.

        Raises
        ------
        NotImplementedError
            If the row holds a kind that this version does not run.
        """
        makers: dict[str, Callable[[Action, int], Runner]] = {
            "ZERO": self._zero, "F": self._forward, "RECOMPUTE": self._recompute, "LOSS": self._loss,
            "B": self._backward, "I": self._input_half, "W": self._weight_half, "UPDATE": self._update,
            "REDUCE_GRAD": self._reduce, "SCATTER_GRAD": self._scatter, "UNSHARD": self._unshard,
            "AVERAGE": self._average, "NORM": self._norm,
            "SUM_F": self._sum_edge, "SUM_B": self._sum_edge, "GATHER_F": self._gather_edge,
            "GATHER_B": self._gather_edge, "SCATTER_F": self._scatter_edge, "SCATTER_B": self._scatter_edge,
            "SUM_G": self._sum_gradients, "SUM_TIED": self._sum_tied,
            "RESHARD": lambda action, index: lambda: None,  # its buffer is free for the next stage: that is all
            "SEND_F": self._send_edge, "SEND_B": self._send_edge, "RECV_F": self._receive_edge,
            "RECV_B": self._receive_edge, "SEND_G": self._send_part, "ADD_G": self._receive_part,
            "RECV_G": self._receive_part, "SEND_P": self._send_part, "RECV_P": self._receive_part, "SWAP_G": self._swap,
        }  # fmt: skip
        for action in self.buffers.row:
            if action.kind not in makers:
                raise NotImplementedError(f"{action}: this version cannot run {action.kind} on workers")
        return [makers[action.kind](action, index) for index, action in enumerate(self.buffers.row)]

    # -- gradients: the first backward after a ZERO or a scatter overwrites, so no pass is spent on zeros ---------

    def _overwrites(self, stage: int, index: int) -> bool:
        """Whether a backward is the first to touch the gradient since it was emptied."""
        row = self.buffers.row[:index]
        last = next((a.kind for a in reversed(row) if a.stage == stage and a.kind in ON_GRADIENTS), "")
        return last in ("ZERO", "SCATTER_GRAD")

    def _zero(self, action: Action, index: int) -> Runner:
        gradients = self.buffers.gradients[action.stage]
        if self._touch(action.stage, index) in ("B", "W", "ZERO"):
            return lambda: None
        return gradients.zero_

    # -- compute -----------------------------------------------------------------------------------------

    def _forward(self, action: Action, index: int) -> Runner:
        s, mb = action.stage, action.mb or 0
        forward, slot, edges, step = self._net(action, index).forward, self._slots[s, mb], self._edges, self.step
        again = action.kind == "F" and Action(s, "RECOMPUTE", mb) in self.buffers.row
        mixed = self._mixed.get(s)
        if mixed and not any(a.kind == "F" and a.stage == s for a in self.buffers.row[:index]):
            forward = mixed.forward_anew

        def run() -> None:
            x = step.inputs[mb] if s == 0 else edges["A", s, mb]
            edges["A", s + 1, mb] = _own(forward(x, slot, step.contexts[mb]), x)

        def run_and_forget() -> None:  # nothing is kept but the output: all such forwards share one slot
            x = step.inputs[mb] if s == 0 else edges["A", s, mb]
            edges["A", s + 1, mb] = forward(x, "forgotten", step.contexts[mb]).clone()

        return run_and_forget if again else run

    def _recompute(self, action: Action, index: int) -> Runner:
        s, mb = action.stage, action.mb or 0
        forward, slot, edges, step = self._net(action, index).forward, self._slots[s, mb], self._edges, self.step
        return lambda: forward(step.inputs[mb] if s == 0 else edges["A", s, mb], slot, step.contexts[mb])

    def _loss(self, action: Action, index: int) -> Runner:
        s, mb = action.stage, action.mb or 0
        loss, edges, step = self.buffers.loss, self._edges, self.step

        def value_and_gradient() -> None:
            value, gradient = loss.value_and_gradient(edges["A", s + 1, mb], step.targets[mb])
            weight = step.weights[mb]
            step.losses[mb] = value
            edges["D", s + 1, mb] = gradient if weight == 1.0 else gradient.mul_(weight)

        return value_and_gradient

    def _backward(self, action: Action, index: int) -> Runner:
        s, mb = action.stage, action.mb or 0
        backward, slot, edges = self._net(action, index).backward, self._slots[s, mb], self._edges
        adds = not self._overwrites(s, index)
        if s == 0:
            return self._returning(action, lambda: backward(edges["D", 1, mb], slot, adds))

        def run() -> None:
            above = edges["D", s + 1, mb]
            gradient = backward(above, slot, adds, True)
            assert gradient is not None
            edges["D", s, mb] = _own(gradient, above)

        return self._returning(action, run)

    def _input_half(self, action: Action, index: int) -> Runner:
        s, mb = action.stage, action.mb or 0
        net, slot, edges = self._net(action, index), self._slots[s, mb], self._edges

        def run() -> None:
            above = edges["D", s + 1, mb]
            gradient = net.backward_input(above, slot, s > 0)
            if gradient is not None:
                edges["D", s, mb] = _own(gradient, above)

        return run

    def _weight_half(self, action: Action, index: int) -> Runner:
        net, slot = self._net(action, index), self._slots[action.stage, action.mb or 0]
        adds = not self._overwrites(action.stage, index)
        return self._returning(action, lambda: net.backward_weight(slot, adds))

    def _update(self, action: Action, index: int) -> Runner:
        weights, gradient, state = self.buffers.update_of(action)
        optimizer, step = self.buffers.optimizer, self.step
        if self.captured is not None:
            return self._capture(action, gradient)
        if self.buffers.program.plan.holds == "all":

            def update() -> None:
                self.buffers.clean(action.stage)
                optimizer.update(weights, self._clipped(gradient), state, step.number, step.scale)

            return update
        before, each = (sum(a.kind == "UPDATE" and a.stage == action.stage for a in row)
                        for row in (self.buffers.row[:index], self.buffers.row))  # fmt: skip
        source = target = weights
        if self.buffers.program.plan.stashed:
            source, target = (self._copies[action.stage][i].flat_parameters for i in self._used[index])

        def update_copy() -> None:
            if target is not source:
                target.copy_(source)
            optimizer.update(target, gradient, state, step.number * each + before, step.scale)

        return update_copy

    def _capture(self, action: Action, gradient: Tensor) -> Runner:
        assert self.captured is not None
        net = self.buffers.stages[action.stage]
        whole = self.captured.setdefault(action.stage, torch.full_like(net.flat_parameters, math.nan))
        low = 0
        if action.part is not None:
            low = action.part.bounds(net.flat_size)[0]
        elif action.stage in self.buffers.reduced:
            low = self.buffers.own_bounds(net.flat_size)[0]
        into = whole[low : low + len(gradient)]
        return lambda: torch.mul(self._clipped(gradient), self.step.scale, out=into)

    def _clipped(self, gradient: Tensor) -> Tensor:
        """The gradient times the factor that clips it: a tensor, since the host does not wait for the norm."""
        clip = self.buffers.optimizer.clip
        if clip is None:
            return gradient
        return gradient * clip_factor(self.buffers.squares[0].sqrt() * self.step.scale, clip)
