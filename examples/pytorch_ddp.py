"""Data-parallel training with PyTorch's DDP, on GPUs or without:

torchrun --nproc-per-node 2 examples/pytorch_ddp.py
"""

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

MICROBATCHES, EPOCHS = 4, 5


def main() -> None:
    local_rank = int(os.environ["LOCAL_RANK"])  # the number of this process on its host
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)  # before anything that says only "cuda"
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        train(device)
    finally:
        dist.destroy_process_group()


def train(device: torch.device) -> None:
    size = dist.get_world_size()
    inputs = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0))
    samples = TensorDataset(inputs, inputs[:, :10].argmax(1))  # your data set
    sampler = DistributedSampler(samples, drop_last=True)  # no sample twice
    loader = DataLoader(samples, batch_size=64, sampler=sampler)
    network = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)  # your network
    model = DDP(network, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)  # another order each epoch
        for x, t in loader:
            x, t = x.to(device), t.to(device)
            count = torch.tensor(float(len(t)), device=device)  # tokens, where the loss is over tokens
            dist.all_reduce(count)
            optimizer.zero_grad()
            total, parts = 0.0, list(zip(x.chunk(MICROBATCHES), t.chunk(MICROBATCHES), strict=True))
            for i, (xi, ti) in enumerate(parts):
                with nullcontext() if i == len(parts) - 1 else model.no_sync():  # the gradient travels once
                    loss = cross_entropy(model(xi), ti, reduction="sum") / count
                    (loss * size).backward()  # DDP averages over the workers; this makes it a sum
                    total += loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # once merged, not before
            optimizer.step()
        total = torch.as_tensor(total)
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: loss of the last batch {total:.3f}")
    if dist.get_rank() == 0:
        torch.save(network.state_dict(), os.devnull)  # one rank saves; all have the same


if __name__ == "__main__":
    main()
