"""Merge the gradients of unequal shards, in plain PyTorch: by a ring of sends and receives, and by all_reduce.

    torchrun --nproc-per-node 2 examples/pytorch_merging.py

No GPU is needed.  With GPUs: init_process_group("nccl"), torch.cuda.set_device(LOCAL_RANK), device = "cuda"; NCCL adds
on the GPU and chooses the merge itself.
"""

import torch
import torch.distributed as dist
from torch import nn

SAMPLES = 96


def ring_all_reduce(vector):
    """Add a vector over all ranks, in place: each sends an N-th at a time to its right neighbour only."""
    n, rank = dist.get_world_size(), dist.get_rank()
    parts = [vector[i * len(vector) // n : (i + 1) * len(vector) // n] for i in range(n)]
    for step in range(2 * (n - 1)):
        give, take = parts[(rank - step - 1) % n], parts[(rank - step - 2) % n]
        arrived = torch.empty_like(take)
        if n > 1:  # both at once: a ring of sends that wait for their receives would stop
            ways = [dist.P2POp(dist.isend, give.clone(), (rank + 1) % n),
                    dist.P2POp(dist.irecv, arrived, (rank - 1) % n)]  # fmt: skip
            for work in dist.batch_isend_irecv(ways):
                work.wait()
        take.copy_(take + arrived if step < n - 1 else arrived)  # first add, then copy what is finished


def flat(network):
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def main():
    dist.init_process_group("gloo")
    n, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)  # equal weights on all ranks, equal data for all to cut
    network = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).double()
    inputs, targets = torch.randn(SAMPLES, 20, dtype=torch.float64), torch.randint(0, 5, (SAMPLES,))
    loss = nn.CrossEntropyLoss(reduction="sum")  # sums are added; the mean is taken once, at the end

    loss(network(inputs), targets).backward()
    serial = flat(network) / SAMPLES

    bounds = [SAMPLES * i * i // (n * n) for i in range(n + 1)]  # shards of unequal sizes
    own = slice(bounds[rank], bounds[rank + 1])
    network.zero_grad()
    loss(network(inputs[own]), targets[own]).backward()
    by_ring, by_library = flat(network), flat(network)
    ring_all_reduce(by_ring)
    dist.all_reduce(by_library)
    for merged in (by_ring, by_library):
        torch.testing.assert_close(merged / SAMPLES, serial, rtol=1e-12, atol=1e-14)
    if rank == 0:
        sizes = [bounds[i + 1] - bounds[i] for i in range(n)]
        print(f"{n} ranks, shards of {sizes}: both merges give the serial gradient")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
