"""Bytes that the kernel says left a worker's sockets, against what gloo's transport counted as sent."""

from __future__ import annotations

import sys
import time

import pytest
import torch

import bpkit as bp
from bpkit.course.launching import socket_bytes
from bpkit.plan.program import Program, compile_collective
from bpkit.plan.strategies.collectives import collective
from bpkit.run.engine import rank as training
from bpkit.run.transports.comm import Comm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO counts bytes on Linux only")

MESSAGES, QUIET = 20, 0.05  # seconds, after which nothing is under way any more


def messages(comm: Comm, elements: int, late: int) -> tuple[int, int]:
    """Post messages from rank 0 to rank 1, rank `late` last; what the kernel and what `comm` counted, in bytes."""
    comm.barrier()
    time.sleep(QUIET)
    kernel, ours = socket_bytes(), comm.sent
    tensors = [torch.ones(elements) for _ in range(MESSAGES)]
    time.sleep(QUIET * (1 + 2 * (comm.rank == late)))
    posted = [comm.post_send(t, 1) if comm.rank == 0 else comm.post_recv(t, 0) for t in tensors]
    time.sleep(3 * QUIET * (comm.rank != late))
    for handle in posted:
        handle.wait()
    time.sleep(2 * QUIET)
    return socket_bytes() - kernel, comm.sent - ours


def collectives(comm: Comm, program: Program, tensors: list[torch.Tensor]) -> tuple[int, int, int]:
    """Run a collective several times; bytes by the kernel, bytes by `comm`, and messages."""
    training.collective(comm, program, tensors, 1)  # connects what is not connected yet
    comm.barrier()
    time.sleep(QUIET)
    kernel, ours, count = socket_bytes(), comm.sent, sum(comm.sent_to)
    training.collective(comm, program, tensors, MESSAGES)
    time.sleep(2 * QUIET)
    return socket_bytes() - kernel, comm.sent - ours, sum(comm.sent_to) - count


@pytest.fixture(scope="module")
def cluster():
    with bp.Cluster(2, backend="gloo", timeout=30) as made:
        yield made


@pytest.fixture(scope="module")
def header(cluster: bp.Cluster) -> int:
    """Bytes of gloo's header, which is all that a receiver sends for a message: measured, the same for all sizes."""
    kernel = [cluster.call(messages, size, 0)[1][0] for size in (1, 10_007)]
    assert kernel[0] == kernel[1] and kernel[0] % MESSAGES == 0
    return kernel[0] // MESSAGES


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("size", [1, 10_007])
def test_the_kernel_sent_our_payload_and_two_headers_a_message(cluster, header, size, late):
    """gloo announces a message in a frame by itself, and puts a header before the payload."""
    (kernel, ours), (_, received) = cluster.call(messages, size, late)
    assert (ours, received) == (4 * size * MESSAGES, 0)
    print(f"{MESSAGES} messages of {4 * size} bytes: counted {ours}, the kernel sent {kernel}; a header is {header}")
    assert kernel == ours + 2 * header * MESSAGES


@pytest.mark.parametrize("name", ["ring", "server", "halving_doubling"])
def test_the_kernel_sent_what_a_collective_counted(cluster, header, name):
    """Less the three headers of a message (two at its sender, one at its receiver) only barriers are left."""
    program = compile_collective(collective(name, 2), 20_011, 4)
    found = cluster.call(collectives, program, [torch.ones(20_011)] * 2)
    for rank, (kernel, ours, count) in enumerate(found):
        arrived = found[1 - rank][2]
        left = kernel - ours - header * (2 * count + arrived)
        print(f"{name}, rank {rank}: counted {ours} in {count} messages, the kernel sent {kernel}; {left} for barriers")
        assert ours == MESSAGES * program.payload(program.plan.mesh.coordinate(rank))
        assert left % header == 0 and 0 <= left <= 4 * header * (MESSAGES + 1)
