"""What each kind of action does on a rank: closures that the executor calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bpkit.nn import Network
from bpkit.optim import clip_factor
from bpkit.plan.actions import Action
from bpkit.run.buffers import Buffers
from bpkit.run.comm import Exchange, Handle, Loan
from bpkit.run.compressed import reducer
from bpkit.run.executor import Runner, StepData, assign_slots
from bpkit.run.stash import stash

_ON_GRADIENTS = frozenset(
    {"ZERO", "B", "W", "REDUCE_GRAD", "SCATTER_GRAD", "SEND_G", "ADD_G", "RECV_G", "SWAP_G", "SUM_G", "SUM_TIED",
     "UPDATE"}
)  # fmt: skip


@dataclass
class Verbs:
    """Binds the actions of one row to a rank's buffers.

    Parameters
    ----------
    buffers : Buffers
    step : StepData
        Filled before each step.
    captured : dict, optional
        Where UPDATE puts what it would apply, by stage, instead of applying it.
    """

    buffers: Buffers
    step: StepData
    captured: dict[int, Tensor] | None = None
    _edges: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    _borrowed: dict[tuple[str, int, int], Loan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._slots = assign_slots(self.buffers.row)
        self._used, counts = stash(self.buffers.row) if self.buffers.program.plan.stashed else ({}, {})
        self._copies = self.buffers.copies(counts)

    def _net(self, action: Action, index: int) -> Network:
        """The stage, with the copy of its parameters that an action reads."""
        return self._copies[action.stage][self._used.get(index, (0, 0))[0]]

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
            "SUM_F": self._sum_edge, "SUM_B": self._sum_edge, "SUM_G": self._sum_gradients,
            "SUM_TIED": self._sum_tied,
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

    def _touch(self, stage: int, after: int) -> str:
        """The kind of the next action on a stage's gradient; empty at the end of the row."""
        row = self.buffers.row[after + 1 :]
        return next((a.kind for a in row if a.stage == stage and a.kind in _ON_GRADIENTS), "")

    def _overwrites(self, stage: int, index: int) -> bool:
        """Whether a backward is the first to touch the gradient since it was emptied."""
        row = self.buffers.row[:index]
        last = next((a.kind for a in reversed(row) if a.stage == stage and a.kind in _ON_GRADIENTS), "")
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

        def run() -> None:
            edges["A", s + 1, mb] = forward(step.inputs[mb] if s == 0 else edges["A", s, mb], slot, step.contexts[mb])

        def run_and_forget() -> None:  # nothing is kept but the output: all such forwards share one slot
            x = step.inputs[mb] if s == 0 else edges["A", s, mb]
            edges["A", s + 1, mb] = forward(x, "forgotten", step.contexts[mb]).clone()

        return run_and_forget if again else run

    def _recompute(self, action: Action, index: int) -> Runner:
        s, mb = action.stage, action.mb or 0
        forward, slot, edges, step = self.buffers.stages[s].forward, self._slots[s, mb], self._edges, self.step
        return lambda: forward(step.inputs[mb] if s == 0 else edges["A", s, mb], slot, step.contexts[mb])

    def _loss(self, action: Action, index: int) -> Runner:
        s, mb = action.stage, action.mb or 0
        loss, edges, step = self.buffers.loss, self._edges, self.step

        def value_and_gradient() -> None:
            value, gradient = loss.value_and_gradient(edges["A", s + 1, mb], step.targets[mb])
            weight = step.weights[mb]
            step.losses[mb] = float(value) * weight
            edges["D", s + 1, mb] = gradient if weight == 1.0 else gradient.mul_(weight)

        return value_and_gradient

    def _backward(self, action: Action, index: int) -> Runner:
        s, mb = action.stage, action.mb or 0
        backward, slot, edges = self._net(action, index).backward, self._slots[s, mb], self._edges
        adds = not self._overwrites(s, index)
        if s == 0:
            return self._returning(action, lambda: backward(edges["D", 1, mb], slot, adds))

        def run() -> None:
            gradient = backward(edges["D", s + 1, mb], slot, adds, True)
            assert gradient is not None
            edges["D", s, mb] = gradient

        return self._returning(action, run)

    def _input_half(self, action: Action, index: int) -> Runner:
        s, mb = action.stage, action.mb or 0
        net, slot, edges = self._net(action, index), self._slots[s, mb], self._edges

        def run() -> None:
            gradient = net.backward_input(edges["D", s + 1, mb], slot, s > 0)
            if gradient is not None:
                edges["D", s, mb] = gradient

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
        number = sum(a.kind == "UPDATE" and a.stage == action.stage for a in self.buffers.row[:index])
        each = sum(a.kind == "UPDATE" and a.stage == action.stage for a in self.buffers.row)

        if self.buffers.program.plan.shared:

            def update() -> None:
                self.buffers.clean(action.stage)
                optimizer.update(weights, gradient, state, step.number, step.scale * self._clipping())

            return update
        if self.buffers.program.plan.stashed:
            source, target = (self._copies[action.stage][i].flat_parameters for i in self._used[index])

            def update_copy() -> None:
                if target is not source:
                    target.copy_(source)
                optimizer.update(target, gradient, state, step.number * each + number, step.scale)

            return update_copy
        if self.buffers.program.plan.holds != "all":
            return lambda: optimizer.update(weights, gradient, state, step.number * each + number, step.scale)
        if optimizer.clip is None:
            return lambda: optimizer.update(weights, gradient, state, step.number, step.scale)
        return lambda: optimizer.update(weights, gradient, state, step.number, step.scale * self._clipping())

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
        return lambda: torch.mul(gradient, self.step.scale * self._clipping(), out=into)

    def _clipping(self) -> float:
        clip = self.buffers.optimizer.clip
        return 1.0 if clip is None else clip_factor(math.sqrt(self.step.squares) * self.step.scale, clip)

    # -- collectives -------------------------------------------------------------------------------------

    def _reduce(self, action: Action, index: int) -> Runner:
        buffers, gradients, comm = self.buffers, self.buffers.gradients[action.stage], self.buffers.groups.data
        if buffers.compress is not None and len(gradients):
            compressed = reducer(buffers.compress, buffers.stages[action.stage], comm)
            buffers.encoded += compressed.payload
            return compressed
        return (lambda: comm.post_all_reduce(gradients)) if len(gradients) else (lambda: None)

    def _scatter(self, action: Action, index: int) -> Runner:
        gradients, reduced = self.buffers.gradients[action.stage], self.buffers.reduced[action.stage]
        comm, row = self.buffers.groups.data, self.buffers.row
        adds = any(a.kind == "SCATTER_GRAD" and a.stage == action.stage for a in row[:index])
        empty = self._touch(action.stage, index) == "SCATTER_GRAD"  # nobody writes before the next scatter

        if not len(gradients):
            return lambda: None
        if self.buffers.program.plan.mesh.data == 1:
            keep = reduced.add_ if adds else reduced.copy_

            def scatter_to_oneself() -> None:
                keep(gradients)

            return scatter_to_oneself
        if not empty:
            return lambda: comm.post_reduce_scatter(gradients, reduced, adds)

        def scatter_and_empty() -> None:
            comm.post_reduce_scatter(gradients, reduced, adds).wait()
            gradients.zero_()

        return scatter_and_empty

    def _unshard(self, action: Action, index: int) -> Runner:
        if self.buffers.program.plan.mesh.data == 1:
            return lambda: None
        return lambda: self.buffers.gather(action.stage)

    def _average(self, action: Action, index: int) -> Runner:
        flat, comm = self.buffers.masters[action.stage], self.buffers.groups.data
        n = self.buffers.program.plan.mesh.data

        def average() -> None:
            if n > 1:
                comm.all_reduce(flat).div_(n)

        return average

    def _norm(self, action: Action, index: int) -> Runner:
        buffers, step, mesh = self.buffers, self.step, self.buffers.program.plan.mesh
        gradients = [(buffers.reduced.get(s, buffers.gradients[s]), buffers.counted(s)) for s in buffers.stages]
        split = mesh.pipeline * mesh.tensor > 1
        scattered = bool(buffers.reduced) and mesh.data > 1

        squares, divided = buffers.squares, 1 if scattered or not split else mesh.data

        def take() -> None:
            step.squares = float(squares) / divided

        def norm() -> Handle | None:
            for stage in buffers.stages:
                buffers.clean(stage)
            parts = [torch.dot(g, g if mask is None else g * mask) for g, mask in gradients]
            squares.copy_(torch.stack(parts).sum())
            if split or scattered:
                return Loan(buffers.groups.world.post_all_reduce(squares), take, lambda: None)
            take()
            return None

        return norm

    def _sum_edge(self, action: Action, index: int) -> Runner:
        s, mb, forward, comm = action.stage, action.mb or 0, action.kind == "SUM_F", self.buffers.groups.tensor
        key, memory, edges = ("A", s + 1, mb) if forward else ("D", s, mb), self.buffers.sums[action], self._edges

        def sum_edge() -> Handle:
            share = edges[key]
            flat = memory[: share.numel()]
            edges[key] = flat.view(share.shape)
            edges[key].copy_(share)
            return comm.post_all_reduce(flat)

        return sum_edge

    def _sum_gradients(self, action: Action, index: int) -> Runner:
        """Only the gradients of which each tensor rank has a share: brought together, summed, and put back."""
        shares, memory, comm = self.buffers.shares[action.stage], self.buffers.sums[action], self.buffers.groups.tensor
        places = memory.split([len(share) for share in shares])

        def put_back() -> None:
            for share, place in zip(shares, places, strict=True):
                share.copy_(place)

        def sum_gradients() -> Handle:
            for share, place in zip(shares, places, strict=True):
                place.copy_(share)
            return Loan(comm.post_all_reduce(memory), put_back, lambda: None)

        return sum_gradients if shares else (lambda: None)

    def _sum_tied(self, action: Action, index: int) -> Runner:
        buffers, plan, at = self.buffers, self.buffers.program.plan, self.buffers.at
        copies = [buffers.gradients[stage][place] for stage in plan.tied if stage in buffers.stages
                  for place in buffers.stages[stage].tied_slices().values()]  # fmt: skip
        peers = {plan.mesh.rank(at._replace(pipeline=plan.place[stage])) for stage in plan.tied}
        others, channel = sorted(peers - {buffers.groups.world.rank}), buffers.edges

        def add(other: Tensor) -> None:
            copies[0].add_(other)

        def spread() -> None:
            for copy in copies[1:]:
                copy.copy_(copies[0])

        def sum_tied() -> Handle | None:
            for copy in copies[1:]:
                copies[0].add_(copy)
            if not others:
                spread()
                return None
            assert channel is not None  # one peer: a + b has the same bits as b + a
            sent = channel.send(("SUM_TIED", 0), copies[0], others[0])
            return Exchange(sent, channel.receive(copies[0].shape, copies[0].dtype, others[0], add), spread)

        return sum_tied

    # -- messages ----------------------------------------------------------------------------------------

    def _send_edge(self, action: Action, index: int) -> Runner:
        forward, mb = action.kind == "SEND_F", action.mb or 0
        key = ("A", action.stage + 1, mb) if forward else ("D", action.stage, mb)
        to, edges, channel = self._neighbour(action.stage + (1 if forward else -1)), self._edges, self.buffers.edges
        assert channel is not None
        return lambda: channel.send((action.kind, action.stage), edges.pop(key), to)

    def _receive_edge(self, action: Action, index: int) -> Runner:
        forward, mb = action.kind == "RECV_F", action.mb or 0
        key = ("A", action.stage, mb) if forward else ("D", action.stage + 1, mb)
        source, channel, step = self._neighbour(action.stage - (1 if forward else -1)), self.buffers.edges, self.step
        net, take = self.buffers.stages[action.stage], partial(self._edges.__setitem__, key)
        shape = net.input_shape if forward else net.output_shape
        assert channel is not None

        def receive() -> Loan:
            loan = channel.receive((len(step.inputs[mb]), *shape), net.dtype, source, take)
            self._borrowed[key] = loan
            return loan

        return receive

    def _returning(self, action: Action, run: Callable[[], object]) -> Runner:
        """A backward that gives back the memory which it is the last to read."""
        stage, mb, row = action.stage, action.mb or 0, self.buffers.row
        keys = [key for key, kind in ((("A", stage, mb), "RECV_F"), (("D", stage + 1, mb), "RECV_B"))
                if Action(stage, kind, mb) in row]  # fmt: skip
        if not keys:
            return run

        def run_and_return() -> None:
            run()
            for key in keys:
                self._borrowed.pop(key).release()

        return run_and_return

    def _neighbour(self, stage: int) -> int:
        """The rank that holds a stage, on this rank's data and tensor coordinates."""
        plan = self.buffers.program.plan
        return plan.mesh.rank(self.buffers.at._replace(pipeline=plan.place[stage]))

    def _part(self, action: Action) -> tuple[Tensor, int]:
        whole = self.buffers.gradients if action.kind.endswith("G") else self.buffers.masters
        flat = whole[action.stage]
        low, high = (0, len(flat)) if action.part is None else action.part.bounds(len(flat))
        return flat[low:high], action.peer or 0

    def _send_part(self, action: Action, index: int) -> Runner:
        (part, to), comm = self._part(action), self.buffers.groups.data
        return (lambda: comm.post_send(part, to)) if len(part) else (lambda: None)

    def _receive_part(self, action: Action, index: int) -> Runner:
        (part, source), comm, adds = self._part(action), self.buffers.groups.data, action.kind == "ADD_G"
        return (lambda: comm.post_recv(part, source, adds)) if len(part) else (lambda: None)

    def _swap(self, action: Action, index: int) -> Runner:
        (part, peer), comm = self._part(action), self.buffers.groups.data

        def swap() -> None:
            comm.send(part, peer)
            comm.recv(part, peer)

        return swap
