"""The exercises of chapters 3.2a and 3.2b."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bpkit.course.exercises import ring
from bpkit.course.exercises.verdict import Bench, Wrong, need_function, need_numbers
from bpkit.data import digits
from bpkit.nn import Network, mlp
from bpkit.run.transports.comm import Comm

RANKS, ELEMENTS = 3, 10
LEARNING_RATE = 0.5
# A count in float32 is no fault: the comparison allows for its rounding.
TOLERANCE = 1e-6
#: (samples of each rank, steps).
SHARDS = (((4, 4, 4), 1), ((6, 4, 2), 1), ((7, 5, 0), 1), ((6, 4, 2), 3))


# -- predict: what does each rank send? --------------------------------------------------------------------


def _judge_ring_sends(answer: Any) -> str:
    numbers = need_numbers(answer, RANKS, "what ranks 0, 1 and 2 send")
    counted = ring.counted(RANKS, ELEMENTS)
    if numbers == counted:
        return f"the workers' own counters say {', '.join(map(str, counted))} elements too"
    if numbers == [4 * one for one in counted]:
        raise Wrong("these are bytes, at 4 an element; the question asks for elements")
    if any(one != int(one) for one in numbers):
        raise Wrong("2(n - 1)/n S is the mean over ranks; a chunk holds whole elements, so the ranks differ")
    if sorted(numbers) == sorted(counted):
        raise Wrong("the numbers are right, but not their ranks: which chunk is the large one, and who sends it twice?")
    if numbers == [(RANKS - 1) * ELEMENTS] * RANKS:
        raise Wrong("so much sends a ring of whole vectors; this one sends one chunk a step")
    wrong = next(rank for rank in range(RANKS) if numbers[rank] != counted[rank])
    raise Wrong(f"rank {wrong} does not send {numbers[wrong]:g} elements: write down the chunk that it sends in each "
                f"of its {2 * (RANKS - 1)} steps, and add up their sizes")  # fmt: skip


# -- predict and fill in: unequal shards -------------------------------------------------------------------


def _judge_sample_weight(answer: Any) -> str:
    (number,) = need_numbers([answer], 1, "how many times as much")
    if number == 80 / 4:
        return "1/(4 x 4) of the average is one sample of the last shard, 1/(4 x 80) one of the first"
    if number == 4 / 80:
        raise Wrong("that is how many times as much one of the first counts")
    if number == 1:
        raise Wrong("so it would be in the gradient of the mean loss of the whole batch; here means are averaged")
    raise Wrong("what weight has the mean of a shard in the average, and what weight has a sample in the mean?")


def _judge_merge_means(answer: Any) -> str:
    need_function(answer, "merge_means(means, sizes)")
    for sizes in ((4, 4, 4), (6, 4, 2), (7, 5, 0), (0, 1, 9)):
        sums = [torch.arange(1.0, 6.0, dtype=torch.float64) * size * (rank + 1) ** 2 for rank, size in enumerate(sizes)]
        wanted = torch.stack(sums).sum(0) / sum(sizes)
        try:
            found = torch.as_tensor(answer([s / size for s, size in zip(sums, sizes, strict=True)], list(sizes)))
        except Exception as error:  # whatever an answer raises
            raise Wrong(f"shards of {sizes}: it raises {type(error).__name__}: {error}") from error
        if found.shape != wanted.shape or not found.isfinite().all():
            raise Wrong(f"shards of {sizes}: the result is not a vector of {len(wanted)} finite numbers")
        if not torch.allclose(found.double(), wanted, rtol=1e-9):
            times = float(found.double().norm() / wanted.norm())
            raise Wrong(f"shards of {sizes}: the result is {times:.3g} times as long as the gradient of the mean loss "
                        "of all samples")  # fmt: skip
    return "equal, unequal and empty shards give the gradient of the mean loss of the whole batch"


# -- find the bug: a training step -------------------------------------------------------------------------


def _network() -> Network:
    return mlp([64, 16, 10], seed=1, dtype=torch.float64)


def _serial(network: Network, inputs: Tensor, targets: Tensor, steps: int) -> Tensor:
    """Parameters after serial steps on the mean loss of the whole batch."""
    for _ in range(steps):
        _, dy = network.loss.value_and_gradient(network.forward(inputs), targets)
        network.backward(dy)
        network.flat_parameters -= LEARNING_RATE / len(targets) * network.flat_gradients
    return network.flat_parameters


def _run_steps(comm: Comm, answer: Callable[..., Any], network: Network, inputs: Tensor, targets: Tensor,
               shards: Sequence[int], steps: int) -> Tensor:  # fmt: skip
    x, t = inputs.split(list(shards))[comm.rank], targets.split(list(shards))[comm.rank]
    for _ in range(steps):
        answer(comm, network, x, t, LEARNING_RATE)
    return network.flat_parameters.clone()


def _judge_train_step(answer: Any) -> str:
    need_function(answer, "train_step(comm, network, inputs, targets, lr)")
    data = digits(torch.float64)
    with Bench(RANKS) as bench:
        for shards, steps in SHARDS:
            x, t = data.inputs[: sum(shards)], data.targets[: sum(shards)]
            case = f"shards of {', '.join(map(str, shards))}" + (f", {steps} steps" if steps > 1 else "")
            before = _network().flat_parameters
            wanted = _serial(_network(), x, t, steps) - before
            ends = bench.run(_run_steps, answer, _network(), x, t, shards, steps, case=case)
            _same_on_all(ends, case)
            _judge_change(ends[0] - before, wanted, shards, steps, case)
    return "the weights equal those of the serial run, for equal, unequal and empty shards, and after three steps"


def _same_on_all(ends: list[Tensor], case: str) -> None:
    for rank, end in enumerate(ends):
        if not bool(end.isfinite().all()):
            raise Wrong(f"{case}: rank {rank} ends with weights that are not numbers: was an empty shard divided?")
        if not torch.equal(end, ends[0]):
            raise Wrong(f"{case}: rank {rank} ends with other weights than rank 0, so the workers train different "
                        "networks: each must apply the same merged gradient")  # fmt: skip


def _judge_change(change: Tensor, wanted: Tensor, shards: Sequence[int], steps: int, case: str) -> None:
    """Compare the change of the weights with the serial one."""
    scale = wanted.norm()
    if (change - wanted).norm() <= TOLERANCE * scale:
        return
    if not bool(change.any()):
        raise Wrong(f"{case}: the weights do not change")
    if steps > 1:
        raise Wrong(f"{case}: one step equals serial, {steps} do not: something of one step is left over in the next")
    factor = float(change @ wanted / (wanted @ wanted))
    if (change - factor * wanted).norm() <= TOLERANCE * abs(factor) * scale:
        raise Wrong(f"{case}: the change of the weights has the right direction, but is {_times(factor, sum(shards))}")
    if len(set(shards)) > 1:
        raise Wrong(f"{case}: equal shards give the serial weights, these do not: it is a mean of means; divide the "
                    "sum of all gradients once, by the number of samples of all shards together")  # fmt: skip
    raise Wrong(f"{case}: the change of the weights is not the serial one, in direction or in size")


def _times(factor: float, samples: int) -> str:
    """A factor in words, with its likely reason."""
    known = {1 / RANKS: f"{RANKS} times too small: divided by the samples of all ranks, and then by the ranks again",
             RANKS: f"{RANKS} times too large: the means of {RANKS} shards are added and not divided",
             samples: f"{samples} times too large: the sum over all samples is not divided by their number",
             1 / samples: f"{samples} times too small: it is divided twice by the number of samples",
             -1.0: "turned round: subtract the gradient"}  # fmt: skip
    for value, text in known.items():
        if abs(factor - value) <= TOLERANCE * abs(value):
            return text
    return f"{factor:.4g} times as large as the serial one"


#: The exercises by name.
EXERCISES: dict[str, Callable[[Any], str]] = {
    "ring_sends": _judge_ring_sends,
    "ring_all_reduce": ring.judge,
    "ring_to_the_left": partial(ring.judge, to_the_left=True),
    "sample_weight": _judge_sample_weight,
    "merge_means": _judge_merge_means,
    "train_step": _judge_train_step,
}
