"""What ranks do with each other, on every transport and 1 to 4 ranks, against sums computed here."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from bpkit.description.flat import part_bounds
from bpkit.run.processes.pool import Pool
from bpkit.run.transports.comm import Comm

from .pools import shared_pool

SIZES = [1, 7, 1000, 300_001]  # uneven parts, an empty part, and more than one scratch row holds
RANKS = [1, 2, 3, 4]


@pytest.fixture(params=["shm", "gloo"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=RANKS)
def pool(request: pytest.FixtureRequest, backend: str) -> Pool:
    return shared_pool(backend, request.param)


def values(rank: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a rank contributes: different for each rank, and inexact to add."""
    generator = torch.Generator().manual_seed(1000 * rank + n)
    if dtype.is_floating_point:
        return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 100, (n,), generator=generator).to(dtype)


def total(size: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The sum in rank order."""
    result = values(0, n, dtype)
    for rank in range(1, size):
        result = result + values(rank, n, dtype)
    return result


def close(found: torch.Tensor, wanted: torch.Tensor, backend: str) -> bool:
    """Equal to the bit in shared memory; gloo adds in an order of its own."""
    if backend == "shm":
        return torch.equal(found, wanted)
    return torch.allclose(found.double(), wanted.double(), rtol=1e-5, atol=1e-5)


def reduce_both(comm: Comm, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    private, born = values(comm.rank, n, dtype), comm.empty(n, dtype)
    born.copy_(private)
    assert comm.all_reduce(private) is private and comm.all_reduce(born) is born
    return private, born.clone()


@pytest.mark.parametrize("n", SIZES)
def test_all_reduce(pool: Pool, n: int) -> None:
    results = pool.call(reduce_both, n, torch.float32)
    for private, born in results:
        assert close(private, total(pool.workers, n), pool.backend)
        assert close(born, total(pool.workers, n), pool.backend)
        assert torch.equal(private, results[0][0]) and torch.equal(born, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                                   torch.uint8], ids=str)  # fmt: skip
@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_all_reduce_of_other_types(backend: str, dtype: torch.dtype) -> None:
    for private, born in shared_pool(backend, 2).call(reduce_both, 1001, dtype):
        assert torch.equal(private, total(2, 1001, dtype)) and torch.equal(born, total(2, 1001, dtype))


def reduce_slices(comm: Comm) -> list[torch.Tensor]:
    """Slices of memory of all ranks, in turn and twice; a strided view; a scalar; nothing."""
    whole = comm.empty(1000)
    whole.copy_(values(comm.rank, 1000))
    comm.all_reduce(whole[100:400])
    comm.all_reduce(whole[100:400])
    comm.all_reduce(whole[500:900].view(20, 20))
    strided = values(comm.rank, 30).view(5, 6)
    comm.all_reduce(strided[:, ::2])
    scalar = comm.all_reduce(torch.tensor(comm.rank + 1.0))
    return [whole.clone(), strided, scalar, comm.all_reduce(torch.empty(0))]


def test_all_reduce_of_slices(pool: Pool) -> None:
    n = pool.workers
    for rank, (whole, strided, scalar, nothing) in enumerate(pool.call(reduce_slices)):
        own, summed = values(rank, 1000), total(n, 1000)
        assert torch.equal(whole[:100], own[:100]) and torch.equal(whole[900:], own[900:])
        assert torch.allclose(whole[100:400], n * summed[100:400], atol=1e-4)
        assert torch.allclose(whole[500:900], summed[500:900], atol=1e-5)
        assert torch.allclose(strided[:, ::2], total(n, 30).view(5, 6)[:, ::2], atol=1e-5)
        assert torch.equal(strided[:, 1::2], values(rank, 30).view(5, 6)[:, 1::2])
        assert scalar.shape == () and float(scalar) == n * (n + 1) / 2
        assert nothing.numel() == 0


def parts(comm: Comm, n: int, born: bool) -> list[torch.Tensor]:
    def fresh() -> torch.Tensor:
        tensor = comm.empty(n) if born else torch.empty(n)
        return tensor.copy_(values(comm.rank, n))

    scattered = comm.reduce_scatter(fresh()).clone()
    gathered = comm.all_gather(fresh()).clone()
    last = comm.broadcast(fresh(), comm.size - 1).clone()
    return [scattered, gathered, last]


@pytest.mark.parametrize("born", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_parts(pool: Pool, n: int, born: bool) -> None:
    size = pool.workers
    expected = torch.cat([values(r, n)[slice(*part_bounds(n, size, r))] for r in range(size)])
    for rank, (scattered, gathered, last) in enumerate(pool.call(parts, n, born)):
        lo, hi = part_bounds(n, size, rank)
        assert close(scattered, total(size, n)[lo:hi], pool.backend)
        assert torch.equal(gathered, expected)
        assert torch.equal(last, values(size - 1, n))


def post_three(comm: Comm) -> tuple[list[torch.Tensor], int]:
    """Three posted sums, of which the last is waited for first; a blocking sum, a send and a recv between."""
    tensors = [comm.empty(n).copy_(values(comm.rank, n)) for n in (10, 70_000, 333)]
    tensors.append(values(comm.rank, 12))  # private
    handles = [comm.post_all_reduce(t) for t in tensors]
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if comm.size > 1:
        comm.send(torch.full((1,), comm.rank), after)
        assert int(comm.recv(None, before)) == before
    handles[2].wait()
    handles[0].wait()
    polls = 0
    while not handles[1].poll():
        polls += 1
    handles[3].wait()
    extra = torch.ones(5)
    unwaited = comm.post_all_reduce(comm.empty(3))
    comm.all_reduce(extra)
    assert unwaited.poll() or comm.name != "shm"  # a blocking sum comes after the posted ones
    unwaited.wait()
    return [*(t.clone() for t in tensors), extra], polls


def test_posted_sums(pool: Pool) -> None:
    for tensors, _ in pool.call(post_three):
        for tensor in tensors[:-1]:
            assert close(tensor, total(pool.workers, tensor.numel()), pool.backend)
        assert torch.equal(tensors[-1], torch.full((5,), float(pool.workers)))


def post_then_receive(comm: Comm) -> bool:
    """Rank 0 blocks in recv, and must do its share of the posted sum there."""
    tensor = comm.empty(100_000).fill_(1.0)
    handle = comm.post_all_reduce(tensor)
    if comm.rank == 0:
        comm.recv(None, 1)
    handle.wait()
    if comm.rank == 1:
        comm.send(torch.zeros(1), 0)
    return bool((tensor == comm.size).all())


def test_a_blocked_rank_does_its_share(backend: str) -> None:
    assert all(shared_pool(backend, 2).call(post_then_receive))


def all_send_then_receive(comm: Comm, n: int) -> bool:
    """Every rank sends to all others, then receives: more than any mailbox holds."""
    others = [r for r in range(comm.size) if r != comm.rank]
    for other in others:
        for copy in range(3):
            comm.send(values(10 * comm.rank + copy, n), other)
    ok = True
    for other in others:
        buffer = torch.empty(n)
        assert comm.recv(buffer, other) is buffer
        ok &= torch.equal(buffer, values(10 * other, n))
        for copy in (1, 2):
            ok &= torch.equal(comm.recv(None, other), values(10 * other + copy, n))
    return ok


@pytest.mark.parametrize("n", [1, 1500, 700_000])
def test_everyone_sends_then_receives(pool: Pool, n: int) -> None:
    assert all(pool.call(all_send_then_receive, n))


def send_kinds(comm: Comm) -> list[torch.Tensor] | int:
    kinds = [torch.tensor(3.5), torch.empty(0, 4), torch.arange(24).view(2, 3, 4), torch.ones(3, dtype=torch.bool),
             torch.ones(2, 2, dtype=torch.bfloat16), torch.arange(12.0).view(3, 4).t()]  # fmt: skip
    if comm.rank == 1:
        for kind in kinds:
            comm.send(kind, 0)
            kind.zero_()  # sent means copied
        return comm.sent
    received = [comm.recv(None, 1) for _ in kinds[:-1]]
    return [*received, comm.recv(torch.empty(3, 4).t().contiguous().t().t(), 1)]


def test_shapes_and_types_travel(backend: str) -> None:
    pool = Pool(2, backend)
    with pool:
        received, sent = pool.call(send_kinds)
    wanted = [torch.tensor(3.5), torch.empty(0, 4), torch.arange(24).view(2, 3, 4), torch.ones(3, dtype=torch.bool),
              torch.ones(2, 2, dtype=torch.bfloat16), torch.arange(12.0).view(3, 4).t()]  # fmt: skip
    for found, want in zip(received, wanted, strict=True):
        assert found.dtype == want.dtype and found.shape == want.shape and torch.equal(found, want)
    assert sent == 4 + 0 + 24 * 8 + 3 + 4 * 2 + 12 * 4  # payload alone is counted


def misuse(comm: Comm) -> list[str]:
    messages = []
    for action in (
        lambda: comm.send(torch.ones(1), comm.rank),
        lambda: comm.send(torch.ones(1), comm.size),
        lambda: comm.recv(None, -1),
        lambda: comm.send([1.0], 1 - comm.rank),
        lambda: comm.all_reduce(torch.ones(3, device="meta")),
        lambda: comm.empty(-1),
        lambda: comm.broadcast(torch.ones(1), 5),
        lambda: comm.send(torch.ones([1] * 9), 1 - comm.rank),
    ):
        try:
            action()
        except (ValueError, TypeError) as error:
            messages.append(str(error))
    comm.send(torch.ones(3), 1 - comm.rank)
    try:
        comm.recv(torch.ones(4), 1 - comm.rank)
    except ValueError as error:
        messages.append(str(error))
    comm.received_from[1 - comm.rank] += 1  # the refused message has been taken
    return messages


def test_misuse_is_refused(backend: str) -> None:
    with Pool(2, backend) as pool:
        messages = pool.call(misuse)[0]
    for found, want in zip(messages, [
        "send: rank 0 is not one of the other ranks (0 to 1, this is rank 0)", "send: rank 2", "recv: rank -1",
        "send takes a torch.Tensor, not list", f"the {backend} transport carries cpu tensors", "empty: -1 elements",
        "broadcast: root 5 is not a rank (0 to 1)", "a tensor of 9 dimensions; at most 8 travel",
        "recv from rank 1: the message is torch.float32 (3,), the buffer is torch.float32 (4,)",
    ], strict=True):  # fmt: skip
        assert want in found


def waits(comm: Comm) -> tuple[int, int]:
    import time

    comm.barrier()
    before = comm.waited
    if comm.rank == 0:
        time.sleep(0.2)
    comm.barrier()
    return comm.waited - before, comm.size


def test_waiting_is_measured(backend: str) -> None:
    first, second = (ns / 1e9 for ns, _ in shared_pool(backend, 2).call(waits))
    assert first < 0.1 < 0.15 < second < 1.0


def by_a_group_for_each_direction(comm: Comm) -> list[float]:
    """Messages as NCCL's go: those to lower ranks by a group of their own, all connections made beforehand."""
    comm._down = dist.new_group()
    comm._meet()
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    values = torch.full((3000,), float(comm.rank))
    sent = comm.post_send(values, right)
    comm.post_recv(values, left).wait()
    sent.wait()
    comm.send(values, left)
    return [float(values[-1]), float(comm.recv(None, right)[0])]


def test_messages_go_by_a_group_for_each_direction() -> None:
    with Pool(4, "gloo") as pool:
        assert pool.call(by_a_group_for_each_direction) == [[(r - 1) % 4, r] for r in range(4)]
