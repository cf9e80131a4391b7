"""Tensor parallelism in plain PyTorch: two layers cut in columns and rows, with one sum there and one back.

    torchrun --nproc-per-node 2 examples/pytorch_tensor.py

No GPU is needed.  With GPUs: init_process_group("nccl"), torch.cuda.set_device(LOCAL_RANK), tensors on "cuda".
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, linear

WIDTH, HIDDEN, BATCH, STEPS, CLIP = 64, 256, 96, 20, 1.0


class SumBack(torch.autograd.Function):
    """Nothing on the way there; on the way back the sum over ranks.  Stands before columns."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        dx = dx.contiguous()
        dist.all_reduce(dx)
        return dx


class SumThere(torch.autograd.Function):
    """The sum over ranks on the way there, nothing on the way back.  Stands behind rows."""

    @staticmethod
    def forward(ctx, share):
        share = share.clone()
        dist.all_reduce(share)
        return share

    @staticmethod
    def backward(ctx, dz):
        return dz


class Pair(nn.Module):
    """Two linear layers with a ReLU between; this rank holds some rows of the first matrix, columns of the second."""

    def __init__(self, first, second, rank, size):
        super().__init__()
        self.up = nn.Parameter(first.weight.detach().chunk(size)[rank].clone())
        self.up_bias = nn.Parameter(first.bias.detach().chunk(size)[rank].clone())
        self.down = nn.Parameter(second.weight.detach().chunk(size, 1)[rank].clone())
        self.bias = nn.Parameter(second.bias.detach().clone())  # whole on each rank, and equal

    def forward(self, x):
        hidden = linear(SumBack.apply(x), self.up, self.up_bias).relu()
        return SumThere.apply(linear(hidden, self.down)) + self.bias  # the bias once, after the sum


def clip_by_global_norm(pair):
    """Of what is split, every rank's share; of what is whole on each rank, once."""
    square = sum(p.grad.square().sum() for p in (pair.up, pair.up_bias, pair.down))
    dist.all_reduce(square)
    norm = float((square + pair.bias.grad.square().sum()).sqrt())
    for p in pair.parameters():
        p.grad.mul_(min(1.0, CLIP / norm))


def main():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # all processes make the same network, and keep their part
    alone = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    pair = Pair(alone[0], alone[2], rank, size)
    inputs = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1))  # your data: the same on each rank
    targets = inputs[:, :10].argmax(1)
    optimizer, its = (torch.optim.SGD(model.parameters(), lr=0.5) for model in (pair, alone))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(pair(inputs), targets)
        loss.backward()
        clip_by_global_norm(pair)
        optimizer.step()
        its.zero_grad()
        its_loss = cross_entropy(alone(inputs), targets)
        its_loss.backward()
        nn.utils.clip_grad_norm_(alone.parameters(), CLIP)
        its.step()
    if rank == 0:
        print(f"loss {float(loss.detach()):.6f} by {size} processes, {float(its_loss.detach()):.6f} by one")
        assert abs(float(loss.detach()) - float(its_loss.detach())) < 1e-4
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
