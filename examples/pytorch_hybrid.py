"""Two axes in plain PyTorch: blocks cut by tensor parallelism, copies of them on a data axis, held against one process.

    torchrun --nproc-per-node 2 examples/pytorch_hybrid.py      (two tensor ranks)
    torchrun --nproc-per-node 4 examples/pytorch_hybrid.py      (two copies of two tensor ranks)

No GPU is needed.  With GPUs: init_process_group("nccl"), torch.cuda.set_device(LOCAL_RANK), and "cuda" for "cpu".
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WIDTH, BLOCKS, BATCH, STEPS = 32, 3, 16, 10


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


def whole(tensor):
    """A gradient or parameter of which each rank has a part, put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main():
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    tensor = 2 if size % 2 == 0 else 1
    # Tensor ranks count fastest: they talk most, and shall lie next to each other, on one computer.
    mesh = init_device_mesh("cpu", (size // tensor, tensor), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)  # every rank builds the same model, then keeps its part of it
    alone = nn.Sequential(*[Block() for _ in range(BLOCKS)]).double()
    model = copy.deepcopy(alone)
    for block in model:  # first by outputs, second by inputs: one sum behind both
        parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    optimizer, reference = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(alone.parameters(), lr=0.1)
    copies, group = mesh["data"].size(), mesh["data"].get_group()
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    total = sum(p.numel() for p in alone.parameters())
    print(f"rank {dist.get_rank()} at {mesh.get_coordinate()} holds {held:,} of {total:,}", flush=True)
    for step in range(STEPS):
        made = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, WIDTH, generator=made, dtype=torch.float64)
        mine = x.chunk(copies)[mesh["data"].get_local_rank()]  # tensor ranks of a copy read the same shard
        loss = (model(mine) - mine.flip(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():  # merge along the data axis only; shards are equal, so the mean is right
            local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            dist.all_reduce(local, group=group)
            local.div_(copies)
        reference.zero_grad()
        (alone(x) - x.flip(-1)).square().mean().backward()
        for mine_p, p in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(mine_p.grad), p.grad, rtol=1e-9, atol=1e-12)
        optimizer.step()
        reference.step()
    if dist.get_rank() == 0:
        print(f"{STEPS} steps, loss {loss.item():.3f}: the gradient of one process at each of them", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
