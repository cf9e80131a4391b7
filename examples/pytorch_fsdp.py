"""Sharded training with PyTorch's FSDP2 and mixed precision, on GPUs or without:

torchrun --nproc-per-node 2 examples/pytorch_fsdp.py
"""

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy

STEPS, BATCH = 60, 64


def main() -> None:
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        train(device)
    finally:
        dist.destroy_process_group()


def train(device: torch.device) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # FSDP2 broadcasts nothing: all must begin alike
    model = nn.Sequential(*[part for _ in range(3) for part in (nn.Linear(64, 64), nn.ReLU())], nn.Linear(64, 10))
    model.to(device)
    # Compute and gather in bfloat16; sum gradients, keep weights and update in float32.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (size,))  # two dimensions make it hybrid: (replicas, shards)
    for layer in model:
        if isinstance(layer, nn.Linear):  # a group: what is gathered at a time
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after fully_shard: it keeps state of shards only
    data = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x = torch.randn(BATCH, 64, generator=data)
        x, t = (part.chunk(size)[rank].to(device) for part in (x, x[:, :10].argmax(1)))
        loss = cross_entropy(model(x).float(), t)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # sums the squares over the shards itself
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step + 1}: loss {mean.item() / size:.3f}")
    if folder := os.environ.get("CHECKPOINT"):  # each rank writes its shards
        checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)


if __name__ == "__main__":
    main()
