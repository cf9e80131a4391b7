"""1F1B in plain PyTorch: each process holds a run of layers; microbatches pass from one to the next.

    torchrun --nproc-per-node 2 examples/pytorch_1f1b.py

No GPU is needed.  It is made for gloo: under NCCL the messages between two ranks run one after another and may wait for
their receiver, so there each send is posted together with the receive beside it, by dist.batch_isend_irecv.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

WIDTH, BATCH, MICROBATCHES, STEPS = 64, 96, 8, 20


def layers(count):
    torch.manual_seed(0)  # all processes make the same network, and keep their part
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(count - 1)] + [nn.Linear(WIDTH, 10)]


class Pipeline:
    """One rank's stage, and what it does in a step."""

    def __init__(self, rank, size, count=8):
        self.first, self.last, self.rank = rank == 0, rank == size - 1, rank
        self.warm = size - rank - 1  # forwards before the first backward
        self.stage = nn.Sequential(*layers(count)[count * rank // size : count * (rank + 1) // size])
        self.kept, self.sent, self.loss = {}, [], 0.0

    def send(self, tensor, to):
        # With gloo this does not wait for the receiver: two ranks that both wait to send would wait for ever.
        self.sent.append((dist.isend(tensor, to), tensor))

    def forward(self, k, x, t):
        if not self.first:
            x = torch.empty(BATCH // MICROBATCHES, WIDTH)
            dist.recv(x, self.rank - 1)
            x.requires_grad_()
        y = self.stage(x)
        if self.last:
            y = cross_entropy(y, t, reduction="sum") / BATCH  # of the whole batch: microbatches add up
            self.loss += float(y.detach())
        else:
            self.send(y.detach(), self.rank + 1)
        self.kept[k] = x, y

    def backward(self, k):
        x, y = self.kept.pop(k)  # frees the activations
        gradient = None
        if not self.last:
            gradient = torch.empty_like(y)
            dist.recv(gradient, self.rank + 1)
        y.backward(gradient)
        if not self.first:
            self.send(x.grad, self.rank - 1)

    def step(self, inputs, targets):
        self.loss, done = 0.0, 0
        for k, (x, t) in enumerate(zip(inputs.chunk(MICROBATCHES), targets.chunk(MICROBATCHES), strict=True)):
            self.forward(k, x, t)
            if k >= self.warm:  # one forward, one backward
                self.backward(done)
                done += 1
        for k in range(done, MICROBATCHES):
            self.backward(k)
        for handle, _ in self.sent:
            handle.wait()
        self.sent.clear()


def main():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    made = torch.Generator().manual_seed(1)
    inputs = torch.randn(BATCH, WIDTH, generator=made)  # your data
    targets = inputs[:, :10].argmax(1)
    pipeline = Pipeline(rank, size)
    optimizer = torch.optim.SGD(pipeline.stage.parameters(), lr=0.5)
    alone = nn.Sequential(*layers(8))  # the same training in one process, to compare
    its = torch.optim.SGD(alone.parameters(), lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        pipeline.step(inputs, targets)
        optimizer.step()
        its.zero_grad()
        loss = cross_entropy(alone(inputs), targets)
        loss.backward()
        its.step()
    if rank == size - 1:
        print(f"loss {pipeline.loss:.6f} by {size} processes, {float(loss.detach()):.6f} by one")
        assert abs(pipeline.loss - float(loss.detach())) < 1e-4
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
