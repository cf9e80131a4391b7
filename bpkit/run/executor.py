"""The executor: a small interpreter of one compiled row.

A row is bound once into closures over this rank's stages and transport; then each step calls them in order.
Communication is posted; whoever reads its buffers waits for it (the exposed communication), and what is not
yet finished is moved along at action boundaries.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns, thread_time_ns
from typing import Any, Protocol

import torch
from torch import Tensor

from bpkit.nn import Context, Network
from bpkit.optim import Optimizer, clip_factor
from bpkit.plan.actions import Action
from bpkit.plan.compile import Program
from bpkit.run.comm import Comm
from bpkit.trace import Log

Runner = Callable[[], Any]  # communication returns what it posted, or None; what compute returns is not used


class Posted(Protocol):
    """Communication under way."""

    def poll(self) -> bool:
        """Whether it has ended; moves it along without blocking."""

    def wait(self) -> None:
        """Return when it has ended."""


@dataclass
class _Step:
    """What one step works on; filled before the row runs."""

    number: int = 0
    inputs: Sequence[Tensor] = ()
    targets: Sequence[Tensor] = ()
    contexts: Sequence[Context] = ()
    weight: float = 1.0  # of this shard's terms, in LOSS
    scale: float = 1.0  # of the merged gradient, in UPDATE
    loss: float = 0.0  # sum over this rank's terms, weighted like the gradient
    squares: float = 0.0  # this step's squared gradient norm, where a NORM runs


@dataclass
class _Receive:
    """A posted receive: the message is taken by whoever reads it, after those posted before it on its pair."""

    take: Runner
    before: deque[_Receive]
    ended: bool = False

    def __post_init__(self) -> None:
        self.before.append(self)

    def poll(self) -> bool:
        return self.ended

    def wait(self) -> None:
        while not self.ended:
            earliest = self.before.popleft()
            earliest.take()
            earliest.ended = True


@dataclass
class Executor:
    """Runs the row of one rank.

    Parameters
    ----------
    program : Program
    network : Network
        The whole network; this rank keeps copies of its own stages.
    comm : Comm
        All ranks of the plan.
    optimizer : Optimizer
    """

    program: Program
    network: Network
    comm: Comm
    optimizer: Optimizer
    captured: dict[int, Tensor] | None = None  # where UPDATE puts what it would apply, instead of applying it
    stages: dict[int, Network] = field(default_factory=dict)
    _edges: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    _step: _Step = field(default_factory=_Step)
    _posted: dict[int, Posted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plan = self.program.plan
        self.at = plan.mesh.coordinate(self.comm.rank)
        parts = self.network.split(self.program.cuts)
        self.stages = {stage: parts[stage] for stage in plan.owned(self.at.pipeline)}
        if plan.mesh.data > 1:
            self._share_gradients()
        self._state = {s: self.optimizer.state(net.flat_parameters) for s, net in self.stages.items()}
        self.row = self.program.row(self.at)
        self._inbox: defaultdict[int, deque[_Receive]] = defaultdict(deque)
        self._bound = self._bind()
        self._columns = self._blank()

    def _share_gradients(self) -> None:
        """Let gradients be born where they are reduced: one block of equal size on each rank."""
        plan, sizes = self.program.plan, self.program.sizes
        most = max(sum(sizes[s] for s in plan.owned(p)) for p in range(plan.mesh.pipeline))
        block, low = self.comm.empty(most, self.network.dtype), 0
        for stage in self.stages.values():
            stage.bind(gradients=block[low : low + stage.flat_size])
            low += stage.flat_size

    # -- running -----------------------------------------------------------------------------------------

    def run(
        self, step: int, inputs: Tensor, targets: Tensor, first: int, weight: float, scale: float, log: Log, line: int
    ) -> float:
        """Run one step on this rank's shard.

        Parameters
        ----------
        step : int
            Training step, counted from 0.
        inputs, targets : Tensor
            This rank's shard, cut here into microbatches (the first ones take the remainder).
        first : int
            Position of the shard's first sample in the global batch.
        weight, scale : float
            Factor of the loss in LOSS, and of the merged gradient in UPDATE.
        log : Log
            Line `line` of it is filled.

        Returns
        -------
        float
            Sum of the loss terms of this rank's shard, times `weight`.
        """
        self._load(step, inputs, targets, first, weight, scale)
        start, end, wait, cpu, sent = self._columns
        posted, mark, comm = self._posted, self.comm.mark, self.comm
        mark[0] = step
        for index, (run, needs, compute) in enumerate(self._bound):
            mark[1] = index
            began = ready = perf_counter_ns()
            if posted:
                self._progress(needs)
                ready = perf_counter_ns()
            start[index] = began
            if compute:
                busy = thread_time_ns()
                run()
                end[index] = perf_counter_ns()
                cpu[index] = thread_time_ns() - busy
                wait[index] = ready - began
            else:
                before = comm.sent
                handle = run()
                end[index] = perf_counter_ns()
                wait[index] = end[index] - began
                sent[index] += comm.sent - before
                if handle is not None:
                    posted[index] = handle
        if posted:
            began = perf_counter_ns()
            self._progress(tuple(posted))
            wait[-1] += perf_counter_ns() - began
        log.start[line], log.end[line], log.wait[line], log.cpu[line], log.bytes[line] = self._columns
        self._columns = self._blank()
        return self._step.loss

    def _blank(self) -> tuple[list[int], ...]:
        """One step's columns: start, end, wait, CPU time (-1: not taken) and bytes (-1: not counted)."""
        native = [-1 if step.action.verb.stream in ("data", "tensor") else 0 for step in self.row]
        width = len(self.row)
        return [0] * width, [0] * width, [0] * width, [-1] * width, native

    def _progress(self, needs: Sequence[int]) -> None:
        """Finish what is needed now, and look once at the rest."""
        end = self._columns[1]
        for index in needs:
            handle = self._posted.pop(index, None)
            if handle is not None:
                handle.wait()
                end[index] = perf_counter_ns()
        for index in [i for i, handle in self._posted.items() if handle.poll()]:
            end[index] = perf_counter_ns()
            del self._posted[index]

    def _load(self, number: int, inputs: Tensor, targets: Tensor, first: int, weight: float, scale: float) -> None:
        m = self.program.plan.microbatches
        step = self._step
        step.inputs, step.targets = inputs.tensor_split(m), targets.tensor_split(m)
        starts = [first]
        for part in step.inputs:
            starts.append(starts[-1] + len(part))
        step.contexts = [Context(step=number, first=start, training=True) for start in starts[:-1]]
        step.number, step.weight, step.scale, step.loss, step.squares = number, weight, scale, 0.0, 0.0

    # -- binding -----------------------------------------------------------------------------------------

    def _bind(self) -> list[tuple[Runner, tuple[int, ...], bool]]:
        """For each instruction: what to call, what it needs, and whether it is compute."""
        makers = {
            "ZERO": self._zero,
            "F": self._forward,
            "LOSS": self._loss,
            "B": self._backward,
            "I": self._input_half,
            "W": self._weight_half,
            "UPDATE": self._update,
            "REDUCE_GRAD": self._reduce,
            "NORM": self._norm,
            "SEND_F": self._send_edge,
            "SEND_B": self._send_edge,
            "RECV_F": self._receive_edge,
            "RECV_B": self._receive_edge,
            "SEND_G": self._send_part,
            "ADD_G": self._receive_part,
            "RECV_G": self._receive_part,
        }
        unknown = {step.action.kind for step in self.row} - set(makers)
        if unknown:
            raise NotImplementedError(f"this version cannot run {', '.join(sorted(unknown))} on workers")
        self._slots = _assign_slots([step.action for step in self.row])
        self._written: set[int] = set()
        return [
            (makers[step.action.kind](step.action), step.waits, step.action.verb.stream == "compute")
            for step in self.row
        ]

    def _zero(self, action: Action) -> Runner:
        gradients = self.stages[action.stage].flat_gradients
        self._written.discard(action.stage)
        if any(step.action.stage == action.stage and step.action.kind in ("B", "W") for step in self.row):
            return lambda: None  # the first microbatch overwrites: no pass over memory is spent on zeros
        return lambda: gradients.zero_()

    def _adds(self, stage: int) -> bool:
        """Whether a backward adds to the gradient (False: the first after ZERO, which overwrites it)."""
        adds = stage in self._written
        self._written.add(stage)
        return adds

    def _forward(self, action: Action) -> Runner:
        s, mb = action.stage, action.mb
        assert mb is not None
        net, slot, edges, step = self.stages[s], self._slots[s, mb], self._edges, self._step
        if s == 0:

            def first() -> None:
                edges["A", 1, mb] = net.forward(step.inputs[mb], slot, step.contexts[mb])

            return first

        def forward() -> None:
            edges["A", s + 1, mb] = net.forward(edges["A", s, mb], slot, step.contexts[mb])

        return forward

    def _loss(self, action: Action) -> Runner:
        s, mb = action.stage, action.mb
        assert mb is not None
        loss, edges, step = self.network.loss, self._edges, self._step

        def value_and_gradient() -> None:
            value, gradient = loss.value_and_gradient(edges["A", s + 1, mb], step.targets[mb])
            step.loss += float(value) * step.weight
            edges["D", s + 1, mb] = gradient if step.weight == 1.0 else gradient.mul_(step.weight)

        return value_and_gradient

    def _backward(self, action: Action) -> Runner:
        s, mb = action.stage, action.mb
        assert mb is not None
        net, slot, edges, adds = self.stages[s], self._slots[s, mb], self._edges, self._adds(s)
        if s == 0:

            def last() -> None:
                net.backward(edges["D", 1, mb], slot, adds)

            return last

        def backward() -> None:
            gradient = net.backward(edges["D", s + 1, mb], slot, adds, True)
            assert gradient is not None
            edges["D", s, mb] = gradient

        return backward

    def _input_half(self, action: Action) -> Runner:
        s, mb = action.stage, action.mb
        assert mb is not None
        net, slot, edges = self.stages[s], self._slots[s, mb], self._edges

        def run() -> None:
            gradient = net.backward_input(edges["D", s + 1, mb], slot, s > 0)
            if gradient is not None:
                edges["D", s, mb] = gradient

        return run

    def _weight_half(self, action: Action) -> Runner:
        assert action.mb is not None
        net, slot, adds = self.stages[action.stage], self._slots[action.stage, action.mb], self._adds(action.stage)
        return lambda: net.backward_weight(slot, adds)

    def _update(self, action: Action) -> Runner:
        net, optimizer, step = self.stages[action.stage], self.optimizer, self._step
        low, high = (0, net.flat_size) if action.part is None else action.part.bounds(net.flat_size)
        weights, gradients = net.flat_parameters[low:high], net.flat_gradients[low:high]
        state = tuple(tensor[low:high] for tensor in self._state[action.stage])
        if self.captured is not None:
            into = self.captured.setdefault(action.stage, torch.zeros_like(net.flat_gradients))[low:high]
            return lambda: torch.mul(gradients, step.scale * self._clipping(), out=into)
        if optimizer.clip is None:
            return lambda: optimizer.update(weights, gradients, state, step.number, step.scale)
        return lambda: optimizer.update(weights, gradients, state, step.number, step.scale * self._clipping())

    def _clipping(self) -> float:
        if self.optimizer.clip is None:
            return 1.0
        return clip_factor(math.sqrt(self._step.squares) * self._step.scale, self.optimizer.clip)

    # -- communication -----------------------------------------------------------------------------------

    def _reduce(self, action: Action) -> Runner:
        gradients, comm = self.stages[action.stage].flat_gradients, self.comm
        return lambda: comm.post_all_reduce(gradients)

    def _norm(self, action: Action) -> Runner:
        gradients = [net.flat_gradients for net in self.stages.values()]
        split = self.program.plan.mesh.pipeline * self.program.plan.mesh.tensor > 1

        def norm() -> None:
            squares = torch.stack([torch.dot(g, g) for g in gradients]).sum().double().reshape(1)
            if split:
                self.comm.all_reduce(squares)
            self._step.squares = float(squares) / (self.program.plan.mesh.data if split else 1)

        return norm

    def _send_edge(self, action: Action) -> Runner:
        forward = action.kind == "SEND_F"
        key = ("A", action.stage + 1, action.mb) if forward else ("D", action.stage, action.mb)
        to, edges, comm = self._neighbour(action.stage + (1 if forward else -1)), self._edges, self.comm
        return lambda: comm.send(edges.pop(key), to)  # type: ignore[arg-type]

    def _receive_edge(self, action: Action) -> Runner:
        forward = action.kind == "RECV_F"
        key = ("A", action.stage, action.mb) if forward else ("D", action.stage + 1, action.mb)
        source, edges, comm = self._neighbour(action.stage - (1 if forward else -1)), self._edges, self.comm

        def take() -> None:
            edges[key] = comm.recv(None, source)  # type: ignore[index]

        return lambda: _Receive(take, self._inbox[source])

    def _neighbour(self, stage: int) -> int:
        """The rank that holds a stage, on this rank's data and tensor coordinates."""
        plan = self.program.plan
        return plan.mesh.rank(self.at._replace(pipeline=plan.place[stage]))

    def _part(self, action: Action) -> tuple[Tensor, int]:
        gradients = self.stages[action.stage].flat_gradients
        low, high = (0, len(gradients)) if action.part is None else action.part.bounds(len(gradients))
        assert action.peer is not None
        return gradients[low:high], self.program.plan.mesh.rank(self.at._replace(data=action.peer))

    def _send_part(self, action: Action) -> Runner:
        part, to = self._part(action)
        return lambda: self.comm.send(part, to)

    def _receive_part(self, action: Action) -> Runner:
        part, source = self._part(action)
        inbox, comm, spare = self._inbox[source], self.comm, torch.empty_like(part)

        def replace() -> None:
            comm.recv(part, source)

        def add() -> None:
            part.add_(comm.recv(spare, source))

        take = replace if action.kind == "RECV_G" else add
        return lambda: _Receive(take, inbox)


def _assign_slots(row: Sequence[Action]) -> dict[tuple[int, int], int]:
    """The lowest free slot for each (stage, microbatch), so that a stage keeps no more slots than its peak."""
    taken: dict[int, dict[int, int]] = {}
    slots: dict[tuple[int, int], int] = {}
    for action in row:
        held = taken.setdefault(action.stage, {})
        if action.kind == "F" and action.mb is not None:
            slot = next(i for i in range(len(held) + 1) if i not in held.values())
            slots[action.stage, action.mb] = held[action.mb] = slot
        elif action.kind in ("B", "W") and action.mb is not None:
            held.pop(action.mb, None)
    return slots
