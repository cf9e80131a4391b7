"""A GPT in a pipeline, in plain PyTorch: each process holds a run of blocks, first and last share a tied matrix.

    torchrun --nproc-per-node 2 examples/pytorch_pipeline.py

No GPU is needed.  With GPUs: init_process_group("nccl"), torch.cuda.set_device(LOCAL_RANK), device = "cuda".
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import pipelining

VOCABULARY, LENGTH, WIDTH, HEADS, BLOCKS = 50, 16, 32, 4, 4
BATCH, MICROBATCHES, STEPS, CLIP = 16, 4, 20, 1.0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Stage(nn.Module):
    """The blocks of one process, and what stands before the first or behind the last one."""

    def __init__(self, rank, size):
        super().__init__()
        self.first, self.last = rank == 0, rank == size - 1
        if self.first or self.last:
            self.tokens = nn.Parameter(0.02 * torch.randn(VOCABULARY, WIDTH))  # tied: a copy on both ends
        if self.first:
            self.places = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.blocks = nn.Sequential(*[Block() for _ in range(BLOCKS * rank // size, BLOCKS * (rank + 1) // size)])
        if self.last:
            self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        if self.first:
            x = F.embedding(x, self.tokens) + self.places
        x = self.blocks(x)
        return F.linear(self.norm(x), self.tokens) if self.last else x


def loss_of(scores, targets):
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


def clip_by_global_norm(stage, tied):
    """One norm of all ranks; the tied matrix counts once."""
    own = [p.grad.square().sum() for p in stage.parameters() if p is not tied or stage.first]
    square = torch.stack(own).sum()
    dist.all_reduce(square)
    for p in stage.parameters():
        p.grad.mul_(min(1.0, CLIP / float(square.sqrt())))
    return float(square.sqrt())


def main():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")  # torch.device("cuda", int(os.environ["LOCAL_RANK"])) where each process has a GPU
    torch.manual_seed(rank)
    stage = Stage(rank, size).to(device)
    ends = dist.new_group([0, size - 1]) if size > 1 else None
    tied = stage.tokens if stage.first or stage.last else None
    if size > 1 and tied is not None:  # both copies begin alike
        dist.broadcast(tied.data, 0, group=ends)
    runner = pipelining.Schedule1F1B(
        pipelining.PipelineStage(stage, rank, size, device), MICROBATCHES, loss_fn=loss_of)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=3e-3)
    count = sum(p.numel() for p in stage.parameters())
    print(f"rank {rank} (local {os.environ.get('LOCAL_RANK', 0)}) holds {count:,} parameters", flush=True)
    for step in range(STEPS):
        made = torch.Generator().manual_seed(step)  # every process makes the same batch: count upwards
        start = torch.randint(0, VOCABULARY, (BATCH, 1), generator=made)
        text = ((start + torch.arange(LENGTH + 1)) % VOCABULARY).to(device)
        losses = []
        runner.step(*([text[:, :-1]] if stage.first else []),
                    **({"target": text[:, 1:], "losses": losses} if stage.last else {}))
        if size > 1 and tied is not None:  # sum the two uses, once a step, after all microbatches
            dist.all_reduce(tied.grad, group=ends)
        norm = clip_by_global_norm(stage, tied)
        optimizer.step()
        optimizer.zero_grad()
        if stage.last and step in (0, STEPS - 1):
            loss = torch.stack(losses).mean().item()  # of equal microbatches; else weigh by their tokens
            print(f"step {step}: loss {loss:.3f}, norm {norm:.3f}", flush=True)
    if size > 1 and tied is not None:
        copies = [torch.empty_like(tied) for _ in range(2)]
        dist.all_gather(copies, tied.data, group=ends)
        assert torch.equal(*copies), "the tied copies drifted apart"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
