"""Where a rank's parameters, gradients and optimizer state lie, as a plan needs them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bpkit.compress import Compressor
from bpkit.description.flat import part_bounds
from bpkit.nn import Loss, Network, VocabularyCrossEntropy
from bpkit.optim import Optimizer
from bpkit.plan.action import GIVES_P, Action
from bpkit.plan.memory import Memory
from bpkit.plan.plan import Plan, scatters
from bpkit.plan.program import Program, tied_copies
from bpkit.run.engine.groups import Groups
from bpkit.run.transports.comm import Edges, Handle, Then
from bpkit.run.whole import rank_network


@dataclass
class Buffers:
    """The memory of one rank for one run of a plan.

    Gradients are born where they are reduced.  Parameters that a plan gathers lie once in memory of all ranks,
    where there is such memory, so that gathering moves nothing; elsewhere each rank keeps its part (level 3 of ZeRO)
    or the whole.

    Attributes
    ----------
    stages : dict of int to Network
        This rank's stages.
    gradients : dict of int to Tensor
        Flat gradient of each stage; stages may share buffers in turn.
    reduced : dict of int to Tensor
        This rank's part of the reduced gradient, where the plan scatters.
    masters : dict of int to Tensor
        The parameters that this rank updates: its part where the plan scatters, else the whole.
    """

    program: Program
    network: Network
    groups: Groups
    optimizer: Optimizer
    rows: int = 0  # samples of a microbatch, at most
    compress: Compressor | None = None
    encoded: int = 0  # payload bytes of a step, where gradients are compressed
    halves: int = 0  # bytes of parameters and gradients in bfloat16, beside those in float32
    stages: dict[int, Network] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    reduced: dict[int, Tensor] = field(default_factory=dict)
    masters: dict[int, Tensor] = field(default_factory=dict)
    _copies: dict[int, list[Network]] = field(default_factory=dict)
    _padding: dict[int, Tensor] = field(default_factory=dict)  # where other stages leave values in shared buffers
    gathered_parts: bool = False  # whether whole parameters exist only between UNSHARD and RESHARD
    one_copy: bool = False  # whether parameters are one for all ranks of the host

    def __post_init__(self) -> None:
        plan = self.program.plan
        self.at = plan.mesh.coordinate(self.groups.world.rank)
        self.row, self.sizes = plan.row(self.at), Memory(self.program, self.network.description, self.rows)
        own = rank_network(plan, self.network, self.at.tensor)
        parts, self.loss = own.split(self.program.cuts, plan.place), self._own_loss(own)
        self.copied = tied_copies([part.description for part in parts])
        self.stages = {stage: parts[stage] for stage in plan.owned(self.at.pipeline)}
        for net in self.stages.values():  # running statistics are summands: the first that trains has the start
            net.flat_buffers.mul_(self.at.data == min({*range(plan.mesh.data)} - {*plan.servers}))
        kinds = {action.kind for row in plan.rows for action in row}
        if plan.mesh.data > 1:
            self._place_gradients(plan)
            self._place_parameters(plan, kinds)
        for stage, net in self.stages.items():
            net.bind()  # to what others lend, where that lies now
            self.gradients[stage] = net.flat_gradients
            self._own_part(stage, net)
        self.state = {stage: self.optimizer.state(self.masters[stage]) for stage in self.stages}
        self.edges: Edges | None = None
        if plan.mesh.pipeline > 1:
            self.edges = self.groups.world.edges(self.sizes.channels[self.at], *self.sizes.lent, self.network.dtype)
        self._make_sums()
        self.squares = self.groups.world.empty(1, torch.float64) if "NORM" in kinds else torch.empty(0)

    def _own_loss(self, own: Network) -> Loss:
        """The loss; where each tensor rank has some of the classes, one that sums over them."""
        if not isinstance(own.loss, VocabularyCrossEntropy):
            return own.loss
        comm = self.groups.apart(self.program.plan.mesh, "tensor", "loss")

        def reduce(values: Tensor, how: str) -> Tensor:
            if how == "sum":
                return comm.all_reduce(values)
            every = values.new_empty(comm.size, values.numel())
            every[comm.rank] = values.flatten()
            return comm.all_gather(every.view(-1)).view(every.shape).amax(0).view(values.shape)

        return replace(own.loss, reduce=reduce)

    # -- placing -----------------------------------------------------------------------------------------

    def _place_gradients(self, plan: Plan) -> None:
        places, size = self.sizes.block("G")
        block = self.groups.data.empty(size, self.network.dtype)
        for stage, net in self.stages.items():
            net.bind(gradients=block[places[stage] :][: net.flat_size])

    def _place_parameters(self, plan: Plan, kinds: set[str]) -> None:
        if not kinds & GIVES_P:
            return
        places, size = self.sizes.block()
        block = self.groups.data.shared(size, self.network.dtype) if "UNSHARD" in kinds else None
        self.one_copy = block is not None
        if block is None:
            self.gathered_parts = "RESHARD" in kinds
            places, size = self.sizes.block("P" if self.gathered_parts else "")
            block = self.groups.data.empty(size, self.network.dtype)
        for stage, net in self.stages.items():
            if self.gathered_parts:
                self.masters[stage] = net.flat_parameters[slice(*self.own_bounds(net.flat_size))].clone()
            net.bind(parameters=block[places[stage] :][: net.flat_size])
        if self.one_copy:
            self.groups.data.barrier()  # everybody has written the same initial values

    def _make_sums(self) -> None:
        """Memory of the tensor axis for each sum of the row, and the gradients of which this rank has a share."""
        self.shares = {a.stage: self.stages[a.stage].shares() for a in self.row if a.kind == "SUM_G"}
        wanted = self.sizes.sums(self.at)
        block = self.groups.tensor.empty(sum(wanted.values()), self.network.dtype) if wanted else torch.empty(0)
        self.sums = dict(zip(wanted, block.split(list(wanted.values())), strict=True))

    def copies(self, counts: dict[int, int]) -> dict[int, list[Network]]:
        """Each stage so many times (once where nothing is said): parameters of their own, one gradient."""
        for stage, net in self.stages.items():
            self._copies[stage] = [net, *(net.copy() for _ in range(counts.get(stage, 1) - 1))]
            for other in self._copies[stage][1:]:
                other.bind(gradients=net.flat_gradients, buffers=net.flat_buffers)
                other._skips = net._skips  # whose ends may stand in two stages
        return self._copies

    def own_bounds(self, size: int) -> tuple[int, int]:
        """This rank's part of a flat buffer."""
        return part_bounds(size, self.program.plan.mesh.data, self.at.data)

    def _own_part(self, stage: int, net: Network) -> None:
        """What this rank updates, and where its part of a scattered gradient goes."""
        low, high = 0, net.flat_size
        if scatters(self.row, stage):
            low, high = self.own_bounds(net.flat_size)
            self.reduced[stage] = torch.zeros_like(net.flat_gradients[low:high])
            if self.program.plan.gradient_buffers:
                self._padding[stage] = _padding(net)[low:high].nonzero().flatten()
        if not self.gathered_parts:
            self.masters[stage] = net.flat_parameters[low:high]

    def counted(self, update: Action) -> Tensor | None:
        """Which elements of what an UPDATE applies count in the gradient's norm: ones and zeros; None is all.

        What several tensor ranks hold counts on the first, a tied tensor where it is first used.
        """
        plan, stage, net = self.program.plan, update.stage, self.stages[update.stage]
        split = {*plan.partial_outputs, *plan.partial_inputs, *plan.own_tokens}
        again = [copies[stage] for _, copies in self.copied if stage in copies and stage > min(copies)]
        if self.at.tensor == 0 and not again:
            return None
        mask = torch.ones_like(net.flat_gradients)
        if self.at.tensor and stage not in split:
            mask.zero_()
        for share in net.shares() if self.at.tensor else ():
            low = (share.data_ptr() - net.flat_gradients.data_ptr()) // share.element_size()
            mask[low : low + len(share)] = 0.0
        for place in again:
            mask[place] = 0.0
        assert update.part is not None
        return mask[slice(*update.part.bounds(net.flat_size))]

    # -- using -------------------------------------------------------------------------------------------

    def update_of(self, action: Action) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Parameters, gradient and optimizer state that an UPDATE works on."""
        stage = action.stage
        weights, state = self.masters[stage], self.state[stage]
        gradient = self.reduced.get(stage, self.gradients[stage])
        if action.part is not None:
            size = self.stages[stage].flat_size
            start = self.own_bounds(size)[0] if stage in self.reduced else 0  # this rank's part may come in pieces
            part = slice(*(bound - start for bound in action.part.bounds(size)))
            return weights[part], gradient[part], tuple(tensor[part] for tensor in state)
        return weights, gradient, state

    def clean(self, stage: int) -> None:
        """Make the padding of a reduced gradient zero again, where stages share gradient buffers."""
        if stage in self._padding and len(self._padding[stage]):
            self.reduced[stage].index_fill_(0, self._padding[stage], 0.0)

    def gather(self, stage: int) -> Handle:
        """Start to make a stage's parameters whole."""
        flat = self.stages[stage].flat_parameters
        if not len(flat):
            return Then()
        if self.gathered_parts:
            flat[slice(*self.own_bounds(len(flat)))] = self.masters[stage]
        return self.groups.data.post_all_gather(flat)

    def whole(self, stage: int) -> Tensor:
        """A stage's parameters after the last step, whole; all ranks of the data axis call it in the same order."""
        if self.gathered_parts:
            self.gather(stage).wait()
        elif self.one_copy:
            self.groups.data.barrier()  # everybody has updated its part
        return self.stages[stage].flat_parameters.clone()

    def memory(self) -> dict[str, int]:
        """Bytes that hold parameters, gradients and optimizer state on this rank, shared memory included.

        Parameters that are one for all ranks of the host are divided by the number of ranks.
        """

        def distinct(tensors: list[Tensor]) -> int:
            return sum({t.data_ptr(): t.numel() * t.element_size()
                        for t in sorted(tensors, key=len) if len(t)}.values())  # fmt: skip

        parameters = distinct([net.flat_parameters for nets in self._copies.values() for net in nets])
        if self.gathered_parts:
            parameters += distinct(list(self.masters.values()))
        if self.one_copy:
            parameters //= self.program.plan.mesh.data
        whole = [net.flat_gradients for net in self.stages.values()]
        state = [tensor for tensors in self.state.values() for tensor in tensors]
        halves = {"bfloat16": self.halves} if self.halves else {}
        return {"parameters": parameters, "gradients": distinct(whole) + distinct(list(self.reduced.values())),
                "optimizer": distinct(state), **halves}  # fmt: skip


def _padding(net: Network) -> Tensor:
    """Ones where the flat gradient belongs to no tensor; the gradient is overwritten."""
    net.flat_gradients.fill_(1.0)
    for gradient in net.gradients():
        gradient.zero_()
    return net.flat_gradients.clone()


class OneBuffer(Buffers):
    """The buffer of a collective by itself."""

    def __init__(self, program: Program, groups: Groups, dtype: torch.dtype) -> None:
        self.program, self.groups = program, groups
        self.at = program.plan.mesh.coordinate(groups.world.rank)
        self.row = program.plan.row(self.at)
        self.stages, self.reduced, self.masters, self._padding, self._copies = {}, {}, {}, {}, {}
        self.gradients = {0: groups.data.empty(program.sizes[0], dtype)}
