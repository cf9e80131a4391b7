"""DDP that sends fewer bytes: 16-bit sums, or factors of low rank with error feedback, on GPUs or without:

torchrun --nproc-per-node 2 examples/pytorch_compression.py [none|bf16|powersgd]
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

STEPS, BATCH = 60, 64


def main(how: str) -> None:
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        train(how, device)
    finally:
        dist.destroy_process_group()


def train(how: str, device: torch.device) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(device))
    if how == "bf16":  # half the bytes; each addition on the way rounds to 8 bits
        model.register_comm_hook(None, default_hooks.bf16_compress_hook)
    elif how == "powersgd":  # two narrow matrices for each, after ten plain steps; keeps what it did not send
        state = PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=10)
        model.register_comm_hook(state, powerSGD_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x = torch.randn(BATCH, 64, generator=data)
        x, t = (part.chunk(size)[rank].to(device) for part in (x, x[:, :10].argmax(1)))
        optimizer.zero_grad()
        loss = cross_entropy(model(x), t)
        loss.backward()
        optimizer.step()
        if step % 20 == 19 and rank == 0:
            print(f"step {step + 1}: loss {loss.item():.3f} on rank 0")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "powersgd")
