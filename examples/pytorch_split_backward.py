"""A backward in two halves in plain PyTorch: send the gradient of the inputs first, compute that of the weights later.

    torchrun --nproc-per-node 2 examples/pytorch_split_backward.py

No GPU is needed.  It is made for gloo: under NCCL the messages between two ranks run one after another and may wait for
their receiver, so there each send is posted together with the receive beside it, by dist.batch_isend_irecv.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, linear

WIDTH, BATCH, MICROBATCHES, STEPS, CLIP = 64, 96, 8, 20, 1.0


class Later:
    """What is to be done for weights when there is time."""

    work = []

    @classmethod
    @torch.no_grad()
    def do(cls, jobs=None):
        for _ in range(len(cls.work) if jobs is None else min(jobs, len(cls.work))):
            weight, x, dy = cls.work.pop(0)
            weight.grad = dy.T @ x if weight.grad is None else weight.grad + dy.T @ x  # W


class Halved(torch.autograd.Function):
    """x W^T, whose backward computes the gradient of x alone and notes what that of W needs."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.weight = weight
        return linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        Later.work.append((ctx.weight, ctx.saved_tensors[0], dy))
        return dy @ ctx.weight, None  # I


class Layer(nn.Module):
    def __init__(self, rows, last=False):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(rows, WIDTH) / WIDTH**0.5), last

    def forward(self, x):
        y = Halved.apply(x, self.weight)
        return y if self.last else y.relu()


def layers():
    torch.manual_seed(0)
    return [*[Layer(WIDTH) for _ in range(7)], Layer(10, last=True)]


def step(stage, rank, size, inputs, targets):
    """All forwards, then all input halves; weight halves fill the time until the next gradient has come."""
    first, last, kept, handles, total = rank == 0, rank == size - 1, [], [], 0.0
    for x, t in zip(inputs.chunk(MICROBATCHES), targets.chunk(MICROBATCHES), strict=True):
        if not first:
            x = torch.empty(len(t), WIDTH)
            dist.recv(x, rank - 1)
        x.requires_grad_()
        y = stage(x)
        if last:
            y = cross_entropy(y, t, reduction="sum") / BATCH
            total += float(y.detach())
        else:
            handles.append((dist.isend(y.detach(), rank + 1), y))
        kept.append((x, y))
    for x, y in kept:
        gradient = None if last else torch.empty_like(y)
        if not last:
            coming = dist.irecv(gradient, rank + 1)
            Later.do(len(Later.work) // 2)  # W, while the gradient is on its way
            coming.wait()
        y.backward(gradient)  # I
        if not first:
            handles.append((dist.isend(x.grad, rank - 1), x))
    Later.do()  # the rest of W
    for handle, _ in handles:
        handle.wait()
    return total


def step_with_validation(stage, optimizer):
    """Update at once, and roll back when the norm of all ranks says so (Qi et al. 2024: post-validation, in small).

    An optimizer that keeps something itself (momentum, Adam) has to be rolled back with the weights.
    """
    before = [p.detach().clone() for p in stage.parameters()]
    square = torch.stack([p.grad.square().sum() for p in stage.parameters()]).sum().detach()
    coming = dist.all_reduce(square, async_op=True)  # nobody waits for it here
    optimizer.step()
    coming.wait()  # in a pipeline: when the first forward of the next step is done
    norm = float(square.sqrt())
    if not norm <= CLIP:  # too long, or not finite
        with torch.no_grad():
            for p, old in zip(stage.parameters(), before, strict=True):
                p.copy_(old)
                p.grad.mul_(CLIP / norm)
        if norm < float("inf"):  # else there is no right update: the step is left out
            optimizer.step()
    return norm


def main():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    inputs = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1))  # your data
    targets = inputs[:, :10].argmax(1)
    everything = layers()
    stage = nn.Sequential(*everything[8 * rank // size : 8 * (rank + 1) // size])
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.5)
    alone = nn.Sequential(*layers())  # the same training in one process, to compare
    its, clipped = torch.optim.SGD(alone.parameters(), lr=0.5), 0
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = step(stage, rank, size, inputs, targets)
        clipped += step_with_validation(stage, optimizer) > CLIP
        its.zero_grad()
        its_loss = cross_entropy(alone(inputs), targets)
        its_loss.backward()
        Later.do()
        nn.utils.clip_grad_norm_(alone.parameters(), CLIP)
        its.step()
    if rank == size - 1:
        one = float(its_loss.detach())
        print(f"loss {loss:.6f} by {size} processes, {one:.6f} by one; rolled back {clipped} times")
        assert abs(loss - one) < 1e-3 and 0 < clipped < STEPS
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
