"""What each kind of communication does on a rank: closures that post it and return its handle."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bpkit.optim import square_sum
from bpkit.plan.action import Action, Buffer, buffer
from bpkit.run.engine.compression import reducer
from bpkit.run.engine.host import Runner, StepData
from bpkit.run.engine.memory import Buffers
from bpkit.run.transports.comm import Comm, Handle, Then

ON_GRADIENTS = frozenset({"ZERO", "B", "W", "REDUCE_GRAD", "SCATTER_GRAD", "SEND_G", "ADD_G", "RECV_G", "SWAP_G",
                          "SUM_G", "SUM_TIED", "UPDATE"})  # fmt: skip


@dataclass
class Communication:
    """Binds the communication of one row to a rank's buffers and groups.

    Parameters
    ----------
    buffers : Buffers
    step : StepData
        Filled before each step.
    """

    buffers: Buffers
    step: StepData
    _edges: dict[tuple[str, int, int | None], Tensor] = field(default_factory=dict)
    _borrowed: dict[tuple[str, int, int | None], Then] = field(default_factory=dict)

    def _touch(self, stage: int, after: int) -> str:
        """The kind of the next action on a stage's gradient; empty at the end of the row."""
        row = self.buffers.row[after + 1 :]
        return next((a.kind for a in row if a.stage == stage and a.kind in ON_GRADIENTS), "")

    # -- collectives -------------------------------------------------------------------------------------

    def _reduce(self, action: Action, index: int) -> Runner:
        buffers, gradients, comm = self.buffers, self.buffers.gradients[action.stage], self.buffers.groups.data
        if comm.size == 1:
            return lambda: None
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
        buffers, mesh = self.buffers, self.buffers.program.plan.mesh
        summed = mesh.pipeline * mesh.tensor > 1 or (bool(buffers.reduced) and mesh.data > 1)
        # In the sum over all ranks a gradient that was not scattered stands once for each data rank.
        gradients = [(buffers.reduced.get(s, buffers.gradients[s]), buffers.counted(s),
                      mesh.data if summed and s not in buffers.reduced else 1) for s in buffers.stages]  # fmt: skip
        squares = buffers.squares

        def norm() -> Handle | None:
            for stage in buffers.stages:
                buffers.clean(stage)
            parts = [square_sum(g if mask is None else g * mask) / times for g, mask, times in gradients]
            squares.copy_(torch.stack(parts).sum())
            return buffers.groups.world.post_all_reduce(squares) if summed else None

        return norm

    def _edge(self, action: Action) -> tuple[Buffer, Tensor, Comm]:
        """The edge that a collective on the tensor axis works on, its memory and its transport."""
        return buffer(action, action.verb.writes[0]), self.buffers.sums[action], self.buffers.groups.tensor

    def _sum_edge(self, action: Action, index: int) -> Runner:
        (key, memory, comm), edges = self._edge(action), self._edges

        def sum_edge() -> Handle:
            share = edges[key]
            flat = memory[: share.numel()]
            edges[key] = flat.view(share.shape)
            edges[key].copy_(share)
            return comm.post_all_reduce(flat)

        return sum_edge

    def _gather_edge(self, action: Action, index: int) -> Runner:
        """Own tokens of all ranks, side by side in memory, to whole samples."""
        (key, memory, comm), edges = self._edge(action), self._edges
        if comm.size == 1:
            return lambda: None
        whole = torch.empty_like(memory)

        def gather_edge() -> Handle:
            own = edges[key]
            flat = memory[: comm.size * own.numel()]
            parts = flat.view(comm.size, *own.shape)
            parts[comm.rank] = own
            rows, tokens, width = own.shape
            joined = whole[: flat.numel()].view(rows, comm.size, tokens, width)
            edges[key] = joined.flatten(1, 2)
            return Then(comm.post_all_gather(flat), then=lambda: joined.copy_(parts.transpose(0, 1)))

        return gather_edge

    def _scatter_edge(self, action: Action, index: int) -> Runner:
        """Shares of whole samples to the sum of this rank's own tokens."""
        (key, memory, comm), edges = self._edge(action), self._edges
        if comm.size == 1:
            return lambda: None
        out = torch.empty(len(memory) // comm.size, dtype=memory.dtype, device=memory.device)

        def scatter_edge() -> Handle:
            share = edges[key]
            flat, own = memory[: share.numel()], out[: share.numel() // comm.size]
            rows, tokens, width = share.shape
            parts = flat.view(comm.size, rows, tokens // comm.size, width)
            parts.copy_(share.view(rows, comm.size, -1, width).transpose(0, 1))
            edges[key] = own.view(parts.shape[1:])
            return comm.post_reduce_scatter(flat, own, False)

        return scatter_edge

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
            return Then(comm.post_all_reduce(memory), then=put_back)

        return sum_gradients if shares else (lambda: None)

    def _sum_tied(self, action: Action, index: int) -> Runner:
        buffers, plan, at = self.buffers, self.buffers.program.plan, self.buffers.at
        copies = [buffers.gradients[stage][place] for stage in plan.tied if stage in buffers.stages
                  for place in buffers.stages[stage].tied_slices().values()]  # fmt: skip
        peers = {plan.mesh.rank(at._replace(pipeline=plan.place[stage])) for stage in plan.tied}
        others, channel = sorted(peers - {buffers.groups.world.rank}), buffers.edges

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
            received = channel.receive(copies[0].shape, copies[0].dtype, others[0], copies[0].add_)

            def finish() -> None:
                received.release()
                spread()

            return Then(sent, received, then=finish)

        return sum_tied

    # -- messages ----------------------------------------------------------------------------------------

    def _send_edge(self, action: Action, index: int) -> Runner:
        key = buffer(action, action.verb.reads[0])
        to, edges, channel = self._partner(action), self._edges, self.buffers.edges
        assert channel is not None
        return lambda: channel.send((action.kind, action.stage), edges.pop(key), to)

    def _receive_edge(self, action: Action, index: int) -> Runner:
        key, mb = buffer(action, action.verb.writes[0]), action.mb or 0
        source, channel, step = self._partner(action), self.buffers.edges, self.step
        net, take = self.buffers.stages[action.stage], partial(self._edges.__setitem__, key)
        shape = net.output_shape if action.verb.writes[0].edge else net.input_shape
        assert channel is not None

        def receive() -> Then:
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

    def _partner(self, action: Action) -> int:
        plan = self.buffers.program.plan
        return plan.mesh.rank(plan.partner(self.buffers.at, action))

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
