"""What each kind of communication does on a rank: it is posted, and its handle comes back."""

from functools import partial

import torch
from torch import Tensor

from bpkit.optim import square_sum
from bpkit.plan.action import Action, Buffer, buffer
from bpkit.plan.memory import updated
from bpkit.run.engine.compression import reducer
from bpkit.run.engine.context import Call, Rank, nothing, runs
from bpkit.run.transports.comm import Comm, Handle, Then

# -- gradients and parameters, over the data axis ----------------------------------------------------------


@runs("REDUCE_GRAD")
def reduce(rank: Rank, action: Action, index: int) -> Call:
    """Sum a stage's gradient over the data ranks; compressed, where that is asked for."""
    buffers, comm = rank.buffers, rank.groups.data
    gradients = buffers.gradients[action.stage]
    if not len(gradients):
        return nothing
    if buffers.compress is not None:
        compressed = reducer(buffers.compress, buffers.stages[action.stage], comm)
        buffers.encoded += compressed.payload
        return compressed
    return partial(comm.post_all_reduce, gradients)


@runs("SCATTER_GRAD")
def scatter(rank: Rank, action: Action, index: int) -> Call:
    """Sum a stage's gradient over the data ranks, each of which keeps, or adds up, its own part."""
    gradients, reduced = rank.buffers.gradients[action.stage], rank.buffers.reduced[action.stage]
    post = partial(rank.groups.data.post_reduce_scatter, gradients, reduced, index not in rank.overwriting)

    def post_and_empty() -> None:
        post().wait()
        gradients.zero_()

    return nothing if not len(gradients) else post_and_empty if index in rank.emptying else post


@runs("UNSHARD")
def unshard(rank: Rank, action: Action, index: int) -> Call:
    """Make a stage's parameters whole, of every data rank's part."""
    return partial(rank.buffers.gather, action.stage)


@runs("RESHARD")
def reshard(rank: Rank, action: Action, index: int) -> Call:
    """Nothing: the buffer of the whole parameters is free for the next stage, that is all."""
    return nothing


@runs("AVERAGE")
def average(rank: Rank, action: Action, index: int) -> Call:
    """Bring a stage's parameters to their mean over the data ranks."""
    flat, comm = rank.buffers.masters[action.stage], rank.groups.data

    def mean() -> None:
        comm.all_reduce(flat).div_(comm.size)

    return mean


@runs("NORM")
def norm(rank: Rank, action: Action, index: int) -> Call:
    """Sum the squares of the whole gradient: of what each rank updates, over every axis on which that is split."""
    buffers, summed = rank.buffers, bool(rank.buffers.program.row(rank.buffers.at)[index].payload)
    # In the sum over all ranks a gradient stands once for each data rank that updates it.
    pieces = [(buffers.update_of(action)[1], buffers.counted(action), times if summed else 1)
              for action, times in updated(rank.plan, buffers.at)]  # fmt: skip

    def sum_squares() -> Handle | None:
        for stage in buffers.stages:
            buffers.clean(stage)
        buffers.squares.zero_()
        for gradient, mask, times in pieces:
            buffers.squares += square_sum(gradient if mask is None else gradient * mask) / times
        return rank.groups.world.post_all_reduce(buffers.squares) if summed else None

    return sum_squares


# -- parts of gradients and parameters, between data ranks ---------------------------------------------------


def _part(rank: Rank, action: Action) -> tuple[Tensor, int]:
    """The part that an action names, and its peer on the data axis."""
    flat = (rank.buffers.gradients if action.verb.touches("G") else rank.buffers.masters)[action.stage]
    low, high = (0, len(flat)) if action.part is None else action.part.bounds(len(flat))
    return flat[low:high], action.peer or 0


@runs("SEND_G", "SEND_P")
def send_part(rank: Rank, action: Action, index: int) -> Call:
    """Send a part to a peer, which reads it where it lies."""
    part, to = _part(rank, action)
    return partial(rank.groups.data.post_send, part, to) if len(part) else nothing


@runs("ADD_G", "RECV_G", "RECV_P")
def receive_part(rank: Rank, action: Action, index: int) -> Call:
    """Take a peer's part in place of one's own, or add it."""
    part, source = _part(rank, action)
    adds = bool(action.verb.reads)
    return partial(rank.groups.data.post_recv, part, source, adds) if len(part) else nothing


@runs("SWAP_G")
def swap(rank: Rank, action: Action, index: int) -> Call:
    """Exchange a part with a peer: what is sent is buffered, so neither waits for the other to read."""
    (part, peer), comm = _part(rank, action), rank.groups.data

    def exchange() -> None:
        comm.send(part, peer)
        comm.recv(part, peer)

    return exchange


# -- edges, between pipeline ranks ---------------------------------------------------------------------------


def _partner(rank: Rank, action: Action) -> int:
    return rank.plan.mesh.rank(rank.plan.partner(rank.buffers.at, action))


@runs("SEND_F", "SEND_B")
def send_edge(rank: Rank, action: Action, index: int) -> Call:
    """Send an edge to the next stage, or back to the one before."""
    key, channel, to = buffer(action, action.verb.reads[0]), (action.kind, action.stage), _partner(rank, action)
    edges, messages = rank.edges, rank.buffers.edges
    assert messages is not None
    return lambda: messages.send(channel, edges.pop(key), to)


@runs("RECV_F", "RECV_B")
def receive_edge(rank: Rank, action: Action, index: int) -> Call:
    """Borrow an edge from where the stage before, or after, has written it."""
    touch, mb, source, step = action.verb.writes[0], action.mb or 0, _partner(rank, action), rank.step
    key, messages, net = buffer(action, touch), rank.buffers.edges, rank.buffers.stages[action.stage]
    shape, take = net.output_shape if touch.edge else net.input_shape, partial(rank.edges.__setitem__, key)
    assert messages is not None

    def receive() -> Then:
        loan = rank.borrowed[key] = messages.receive((len(step.inputs[mb]), *shape), net.dtype, source, take)
        return loan

    return receive


@runs("SUM_TIED")
def sum_tied(rank: Rank, action: Action, index: int) -> Call:
    """Add the gradients of each tied tensor's copies, on all ranks in the order of ranks: to the same bits."""
    buffers, messages, me = rank.buffers, rank.buffers.edges, rank.groups.world.rank
    assert messages is not None
    sums = []
    for number, (_, copies) in enumerate(buffers.copied):
        ranks = {rank.plan.mesh.rank(buffers.at._replace(pipeline=rank.plan.place[stage])): stage for stage in copies}
        if me in ranks:
            own = buffers.gradients[ranks[me]][copies[ranks[me]]]
            sums.append((("SUM_TIED", number), own, sorted(ranks), sorted({*ranks} - {me})))

    def exchange() -> Handle:
        found: dict[tuple[tuple[str, int], int], Tensor] = {(way, me): own for way, own, _, _ in sums}
        sent = [messages.send(way, own, peer) for way, own, _, others in sums for peer in others]
        loans = [messages.receive(own.shape, own.dtype, peer, partial(found.__setitem__, (way, peer)))
                 for way, own, _, others in sums for peer in others]  # fmt: skip

        def add() -> None:
            for way, own, (first, second, *others), _ in sums:
                total = found[way, first] + found[way, second]
                for peer in others:
                    total += found[way, peer]
                own.copy_(total)
            for loan in loans:
                loan.release()

        return Then(*sent, *loans, then=add)

    return exchange


# -- edges and gradients, over the tensor axis ---------------------------------------------------------------


def _edge(rank: Rank, action: Action) -> tuple[Buffer, Tensor, Comm]:
    """The edge that a collective on the tensor axis works on, its memory and its transport."""
    return buffer(action, action.verb.writes[0]), rank.buffers.sums[action], rank.groups.tensor


@runs("SUM_F", "SUM_B")
def sum_edge(rank: Rank, action: Action, index: int) -> Call:
    """Bring an edge, of which each tensor rank has a share, to the sum."""
    (key, memory, comm), edges = _edge(rank, action), rank.edges

    def sum_shares() -> Handle:
        share = edges[key]
        flat = memory[: share.numel()]
        edges[key] = flat.view(share.shape).copy_(share)
        return comm.post_all_reduce(flat)

    return sum_shares


@runs("GATHER_F", "GATHER_B")
def gather_edge(rank: Rank, action: Action, index: int) -> Call:
    """Bring own tokens of all tensor ranks, side by side in memory, to whole samples."""
    (key, memory, comm), edges = _edge(rank, action), rank.edges
    whole = torch.empty_like(memory)

    def gather() -> Handle:
        own = edges[key]
        flat = memory[: comm.size * own.numel()]
        parts = flat.view(comm.size, *own.shape)
        parts[comm.rank] = own
        rows, tokens, width = own.shape
        joined = whole[: flat.numel()].view(rows, comm.size, tokens, width)
        edges[key] = joined.flatten(1, 2)
        return Then(comm.post_all_gather(flat), then=lambda: joined.copy_(parts.transpose(0, 1)))

    return gather


@runs("SCATTER_F", "SCATTER_B")
def scatter_edge(rank: Rank, action: Action, index: int) -> Call:
    """Bring shares of whole samples to the sum of this rank's own tokens."""
    (key, memory, comm), edges = _edge(rank, action), rank.edges
    out = torch.empty(len(memory) // comm.size, dtype=memory.dtype, device=memory.device)

    def scatter_shares() -> Handle:
        share = edges[key]
        flat, own = memory[: share.numel()], out[: share.numel() // comm.size]
        rows, tokens, width = share.shape
        parts = flat.view(comm.size, rows, tokens // comm.size, width)
        parts.copy_(share.view(rows, *parts.shape[:1], *parts.shape[2:]).transpose(0, 1))
        edges[key] = own.view(parts.shape[1:])
        return comm.post_reduce_scatter(flat, own, False)

    return scatter_shares


@runs("SUM_G")
def sum_gradients(rank: Rank, action: Action, index: int) -> Call:
    """Sum only the gradients of which each tensor rank has a share: brought together, summed, and put back."""
    shares, memory, comm = rank.buffers.shares[action.stage], rank.buffers.sums[action], rank.groups.tensor
    places = memory.split([len(share) for share in shares])

    def sum_shares() -> Handle:
        torch._foreach_copy_(places, shares)
        return Then(comm.post_all_reduce(memory), then=partial(torch._foreach_copy_, shares, places))

    return sum_shares if shares else nothing
