"""Which device a cluster's workers compute on, and why it cannot be had."""

import os
import socket

import torch

DEVICES = ("auto", "cpu", "cuda")


def gpus() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def no_gpu() -> str:
    """Why this process sees no GPU, and what helps."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a build without CUDA: install one with it (environment.yml does)"
    why = "torch.cuda.is_available() says so"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # a driver that is too old, or none: the text says which
        why = str(error)
    if visible is not None and "driver" not in why:
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs: unset it, or name some, as in CUDA_VISIBLE_DEVICES=0"
    return why


def check_interface() -> None:
    """Refuse a network interface for gloo that is not here."""
    asked, here = os.environ.get("GLOO_SOCKET_IFNAME", ""), [name for _, name in socket.if_nameindex()]
    for name in filter(None, asked.split(",")):
        if name.split(":")[0] not in here:
            raise ValueError(f"GLOO_SOCKET_IFNAME={asked!r}: no network interface {name!r} is here, there are "
                             f"{', '.join(here)}; name one of them, or unset it to use the loopback")


def choose(workers: int, backend: str, device: str) -> str:
    """The device that a cluster's workers compute on, ``"cpu"`` or ``"cuda"``.

    Raises
    ------
    ValueError, RuntimeError
        For a device or a transport that cannot be had here.
    """
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}: choose one of {', '.join(map(repr, DEVICES))}")
    if device == "cpu" and backend == "nccl":
        raise ValueError("backend 'nccl' connects GPUs, and device='cpu' takes none: use backend='shm' or 'gloo'")
    if device == "cpu" or (device == "auto" and backend in ("shm", "gloo")):
        return "cpu"
    found = gpus()
    if backend == "nccl" and workers > found:
        raise ValueError(f"backend 'nccl' needs one GPU a worker: {workers} workers, {found} GPUs here, and NCCL "
                         "refuses two ranks on one GPU; use backend='shm' or 'gloo', for CPU workers, or with "
                         "device='cuda' for several workers on one GPU"
                         + ("" if found else f". No GPU is to be seen: {no_gpu()}"))
    if device == "cuda" and not found:
        raise RuntimeError(f"device 'cuda': no GPU is to be seen: {no_gpu()}")
    return "cuda" if device == "cuda" or backend == "nccl" or workers <= found else "cpu"
