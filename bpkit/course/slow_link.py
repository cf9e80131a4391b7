"""Training over a link that is really slow: a transport that waits as long as its bytes would take on such a link."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from bpkit.compress import Compressor
from bpkit.data import Dataset
from bpkit.nn import Network
from bpkit.optim import SGD
from bpkit.run.cluster import Cluster
from bpkit.run.engine.compression import reducer
from bpkit.run.transports.comm import Comm, Handle, Then


class Throttled:
    """A transport behind a link of a given rate: each collective also waits for the time of the bytes that it sends.

    A worker of n sends 2 (n-1)/n S bytes to sum S of them, and (n-1)/n S to gather S in all: what a ring sends. The
    wait is a sleep. It comes on top of what the transport beneath takes, and latency is not modelled.

    Parameters
    ----------
    comm : Comm
        Carries the data.
    rate : float
        Bytes a second that a worker can send; ``inf`` for no wait.
    """

    def __init__(self, comm: Comm, rate: float) -> None:
        self._comm, self._rate, self.sent = comm, rate, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def _wait(self, tensor: Tensor, share: float) -> None:
        count = share * (self._comm.size - 1) / self._comm.size * tensor.numel() * tensor.element_size()
        self.sent += count
        if count / self._rate > 0:
            time.sleep(count / self._rate)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, then the wait of a ring."""
        result = self._comm.all_reduce(tensor)
        self._wait(tensor, 2.0)
        return result

    def post_all_reduce(self, tensor: Tensor) -> Handle:
        """As `all_reduce`; waits when it is waited for."""
        return Then(self._comm.post_all_reduce(tensor), then=lambda: self._wait(tensor, 2.0))

    def post_all_gather(self, tensor: Tensor) -> Handle:
        """The parts of all ranks; waits when it is waited for."""
        return Then(self._comm.post_all_gather(tensor), then=lambda: self._wait(tensor, 1.0))


def step_over(cluster: Cluster, network: Network, data: Dataset, compress: Compressor | None, *, batch: int,
              rate: float = float("inf"), steps: int = 5) -> tuple[float, float]:
    """Train by SGD with one bucket over a throttled link.

    Parameters
    ----------
    cluster : Cluster
        Its workers exchange the gradient, with the library's own compression.
    network, data, compress, batch
        As in ``Cluster.train``.
    rate : float
        Bytes a second that a worker can send.
    steps : int
        After one that warms up.

    Returns
    -------
    seconds : float
        Of a step: the median on rank 0.
    sent : float
        Bytes that a worker sends in a step, where collectives are rings.
    """
    found: tuple[float, float] = cluster.call(_train, network, data, compress, batch, rate, steps)[0]
    return found


def _train(comm: Comm, network: Network, data: Dataset, compress: Compressor | None, batch: int, rate: float,
           steps: int) -> tuple[float, float]:  # fmt: skip
    link: Any = Throttled(comm, rate)
    merge = reducer(compress, network, link) if compress else None
    optimizer, seconds = SGD(0.1), []
    state = optimizer.state(network.flat_parameters)
    for step in range(steps + 1):
        comm.barrier()
        begin = time.perf_counter()
        x, t = (part.tensor_split(comm.size)[comm.rank] for part in data.batch(step, batch))
        _, d_outputs = network.loss.value_and_gradient(network.forward(x), t)
        network.backward(d_outputs)
        if merge is None:
            link.all_reduce(network.flat_gradients)
        elif handle := merge():
            handle.wait()
        optimizer.update(network.flat_parameters, network.flat_gradients, state, step, 1 / batch)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:]), link.sent / (steps + 1)


def delayed_sgd(network: Network, data: Dataset, *, lr: float, momentum: float, staleness: int, batch: int,
                updates: int) -> float:  # fmt: skip
    """Train in this process with gradients that are `staleness` updates old; return the test accuracy.

    Update t uses the gradient at the parameters after update t - 1 - staleness (the first ones, at the initial
    parameters), each of another batch: what a server does whose workers take turns.
    """
    network = network.copy()
    history = [network.flat_parameters.clone()]
    current, velocity = network.flat_parameters.clone(), torch.zeros_like(network.flat_parameters)
    for update in range(updates):
        network.flat_parameters.copy_(history[0])
        inputs, targets = data.batch(update, batch)
        _, d_outputs = network.loss.value_and_gradient(network.forward(inputs), targets)
        network.backward(d_outputs)
        velocity.mul_(momentum).add_(network.flat_gradients, alpha=1 / batch)
        current.sub_(velocity, alpha=lr)
        history = [*history, current.clone()][-1 - staleness :]
    network.flat_parameters.copy_(current)
    return float(network.accuracy(data.test_inputs, data.test_targets))
