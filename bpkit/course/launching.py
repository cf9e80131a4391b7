"""PyTorch's own programs on the workers of a cluster: each worker plays a process that torchrun started."""

import datetime
import os
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bpkit.nn import Network
from bpkit.run.cluster import Cluster
from bpkit.run.transports.comm import Comm
from bpkit.run.transports.distributed import loopback

_ACKED = 120  # place of tcpi_bytes_acked in Linux's struct tcp_info (uapi/linux/tcp.h), since Linux 4.1


def launch(cluster: Cluster, function: Callable[..., Any], *arguments: Any, backend: str | None = None,
           patience: float = 60.0) -> list[Any]:
    """Run a function on each worker as if ``torchrun`` had started the worker; return what each gave.

    Parameters
    ----------
    cluster : Cluster
        Of one host, on the CPU.
    function : callable
        Called with the arguments; also one of a notebook's cell.
    backend : str, optional
        ``"gloo"``: a process group stands while the function runs, and is destroyed behind it. Left out, the function
        starts its own.
    patience : float
        Seconds after which a collective of that process group gives up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return cluster.call(_as_process, port, backend, patience, function, arguments, timeout=120)


def _as_process(comm: Comm, port: int, backend: str | None, patience: float, function: Callable[..., Any],
                arguments: tuple[Any, ...]) -> Any:
    """What a process finds that torchrun started on one host; then the function."""
    rank, size = str(comm.rank), str(comm.size)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    loopback()  # gloo uses this host's own interface
    if backend is None:
        return function(*arguments)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=patience))
    try:
        return function(*arguments)
    finally:  # after the function, since a DDP model that outlives its group may hang
        dist.destroy_process_group()


def in_torch(network: Network) -> nn.Sequential:
    """The linear layers of a network with ReLU between them, with the same parameters, made of ``torch.nn``."""
    layers: list[nn.Module] = []
    for weight in network.parameters()[::2]:
        layers += [nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    for parameter, value in zip(model.parameters(), network.parameters(), strict=True):
        parameter.data.copy_(value)
    return model


def vector(tensors: Iterable[Tensor]) -> Tensor:
    """The elements of all tensors, one after another."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def serial_gradient(network: Network, inputs: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the mean loss by one backward pass in this process, as one vector in layer order."""
    _, d_outputs = network.loss.value_and_gradient(network.forward(inputs), targets)
    network.backward(d_outputs)
    return vector(network.gradients()) / len(targets)


def off(gradient: Tensor, wanted: Tensor) -> float:
    """How far one vector is from another, as a share of the other's length."""
    return float((gradient - wanted).norm() / wanted.norm())


def socket_bytes() -> int:
    """Bytes that peers have acknowledged on all TCP connections of this process, as Linux counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            end = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed meanwhile, as the folder's own descriptor
            continue
        with end:
            if end.family in (socket.AF_INET, socket.AF_INET6) and end.type == socket.SOCK_STREAM:
                info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("<Q", info, _ACKED)[0]
    return total
