"""The exercises of chapters 4.1b and 4.1c: sharded steps and memory, old gradients, what is left out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bpkit.course.exercises.trainer import watched
from bpkit.course.exercises.verdict import Bench, Wrong, need_function, need_numbers
from bpkit.plan import asynchronous_server
from bpkit.plan.strategies.servers import ages
from bpkit.run.transports.comm import Comm

#: Billions of parameters, and billions of bytes that a GPU has for them.
BILLIONS, ROOM = 7, 40
#: The workers whose gradients arrive, in order.
ARRIVALS = (1, 2, 3, 3, 1, 2)

# -- find the bug: a step that all must skip alike ---------------------------------------------------------


def _step(comm: Comm, answer: Callable[..., Any], bad: int | None) -> tuple[Tensor, Tensor]:
    """The weights of this rank after the step, and what they should be."""
    weights, gradient = torch.arange(3.0, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    if comm.rank == bad:
        gradient[1] = float("inf") if bad else float("nan")
    right = weights.clone() if bad is not None else weights - 0.5
    answer(watched(comm)[0], weights, gradient, 0.5)
    return weights, right


def _judge_careful(answer: Any) -> str:
    need_function(answer, "careful_step(comm, weights, gradient, lr)")
    with Bench(3) as bench:
        for bad in (None, 0, 2):
            case = "all gradients finite" if bad is None else f"a gradient that is not finite on rank {bad}"
            for rank, (found, right) in enumerate(bench.run(_step, answer, bad, case=case)):
                if not torch.equal(found, right):
                    did = "must make the step" if bad is None else "makes a step that rank " f"{bad} cannot make"
                    did = f"makes the step with {found.tolist()}" if rank == bad else did
                    raise Wrong(f"{case}: rank {rank} {did}")
    return "all ranks make the step, or all skip it"


# -- predict: on how many GPUs does it fit? ----------------------------------------------------------------


def _judge_gpus(answer: Any) -> str:
    said = need_numbers(answer, 3, "the GPUs with ZeRO 1, 2 and 3")
    for level, number in enumerate(said, 1):
        whole = sum((2, 2, 12)[: 3 - level])
        kept = [BILLIONS * (whole + (16 - whole) / n) for n in range(1, 99)]
        fewest = next(n for n, one in enumerate(kept, 1) if one <= ROOM)
        if number != fewest:
            way = "fewer do" if number > fewest else "it does not fit on so few"
            raise Wrong(f"ZeRO {level}, {number:g} GPUs: {way}; count what stays whole and what is divided")
    return "the fewest GPUs that hold 7 billion parameters in half of 80 billion bytes each"


# -- predict: how old is each gradient? --------------------------------------------------------------------


def _judge_ages(answer: Any) -> str:
    said = need_numbers(answer, len(ARRIVALS), "the age of each gradient in the order of arrival")
    right = ages(asynchronous_server(3, arrivals=list(ARRIVALS), staleness=1))
    for nth, (number, age) in enumerate(zip(said, right, strict=True), 1):
        if number != age:
            raise Wrong(f"arrival {nth}, worker {ARRIVALS[nth - 1]}: not {number:g}; count the updates since this "
                        "worker was last answered, or since the start")  # fmt: skip
    return f"the ages are {', '.join(map(str, right))}"


# -- fill in: the largest elements, with a memory -----------------------------------------------------------


def _judge_top(answer: Any) -> str:
    need_function(answer, "top_k(gradient, memory, k)")
    generator, n, k = torch.Generator().manual_seed(0), 12, 3
    memory, total, sent_all = torch.zeros(n), torch.zeros(n), torch.zeros(n)
    with Bench(1) as bench:
        for step in range(4):
            gradient = torch.randn(n, generator=generator)
            wanted = gradient + memory
            total += gradient
            given = bench.run(_apply, answer, gradient, memory, k, case=f"step {step}")[0]
            try:
                sent, memory = given
                filled, least = int((sent != 0).sum()), wanted.abs().topk(k).values[-1]
            except (TypeError, ValueError, AttributeError):
                raise Wrong("the answer returns two vectors: what is sent, and what is kept") from None
            sent_all += sent
            if filled > k:
                raise Wrong(f"step {step}: {filled} elements are sent, not {k}")
            if not torch.allclose(sent_all + memory, total, atol=1e-5):
                raise Wrong(f"step {step}: what was sent and what is kept do not add up to all gradients so far")
            if not torch.equal(sent != 0, wanted.abs() >= least):
                raise Wrong(f"step {step}: the elements sent are not the largest of gradient and memory together")
    return "few elements are sent, the largest, and nothing is lost"


def _apply(comm: Comm, answer: Callable[..., Any], *given: Any) -> Any:
    return answer(*given)


#: The exercises by name.
EXERCISES = {
    "careful_step": _judge_careful, "gpus_needed": _judge_gpus, "gradient_ages": _judge_ages, "top_k": _judge_top,
}  # fmt: skip
