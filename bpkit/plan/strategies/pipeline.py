"""Pipelines: stages of the network on different ranks, microbatches passed from one to the next.

A schedule is a rank's order of F, B, I and W, written as a word; everything else is added by passes.  Times in the
tables and formulas: F, I and W of a rank's whole share of the network, B = I + W, equal on all ranks, communication
free.  p ranks, m microbatches; rank r counts from 0.  The *bubble* is a rank's time without work in a step; its
formulas are for steps that follow one another (period less work) unless they say otherwise.

A skip connection that crosses stages would need an edge of its own.  None can: a network is a list of layers, a
`Residual` is one layer, and stages are cut between layers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import index
from typing import TypedDict, Unpack

from bpkit.given import whole_numbers
from bpkit.plan.action import Action
from bpkit.plan.mesh import Mesh
from bpkit.plan.passes import communicate, complete, losses, recompute, refine, update_each
from bpkit.plan.plan import Plan
from bpkit.plan.strategies.data_parallel import call_text


class Options(TypedDict, total=False):
    """What every pipeline of this module also takes.

    Parameters
    ----------
    data : int
        Replicas of the pipeline; the gradients of a stage are reduced after its last backward and its SEND_B.
    buckets : int
        Parts into which each stage is cut: buckets to reduce one by one, and units to compute again.
    merge : str
        As in `data_parallel`.
    recompute : bool
        Keep only each stage's input, and run its forward again before the backward (Chen et al. 2016,
        arXiv:1604.06174).  Costs one F a microbatch.
    cuts : sequence of int
        Layers at which stages 1, 2, ... start, such as ``bp.nn.balanced_cuts(bp.measure.layer_times(net, x), 4)``
        gives for measured times; without it stages are balanced by counted operations.  Of the parts, with `buckets`.
    """

    data: int
    buckets: int
    merge: str
    recompute: bool
    cuts: Sequence[int]


def naive(workers: int, **options: Unpack[Options]) -> Plan:
    """Layer split: one rank works at a time.

    ::

        rank 0  F0 .  .  .  .  .  .  B0 B0
        rank 1  .  F0 .  .  .  B0 B0 .  .
        rank 2  .  .  F0 B0 B0 .  .  .  .

    Bubble (p-1)(F+B); one microbatch of activations a rank.
    """
    return scheduled("naive", lambda rank: "FB", range(workers), 1, options, workers)


def gpipe(workers: int, microbatches: int, **options: Unpack[Options]) -> Plan:
    """All forwards, then all backwards (Huang et al. 2019, arXiv:1811.06965).

    ::

        rank 0  F0 F1 F2 .  .  .  B0 B0 B1 B1 B2 B2
        rank 1  .  F0 F1 F2 B0 B0 B1 B1 B2 B2 .  .

    Bubble (p-1)(F+B), of a makespan of (m+p-1)(F+B).  Activations of m microbatches on each rank.
    """
    (microbatches,) = whole_numbers("gpipe", microbatches=microbatches)
    return scheduled("gpipe", lambda rank: "F" * microbatches + "B" * microbatches, range(workers), microbatches,
                     options, workers, microbatches)  # fmt: skip


def one_f_one_b(workers: int, microbatches: int, **options: Unpack[Options]) -> Plan:
    """After p-r-1 forwards, one forward and one backward in turn (PipeDream-Flush: Narayanan et al. 2021).

    ::

        rank 0  F0 F1 .  .  B0 B0 F2 B1 B1 .  B2 B2
        rank 1  .  F0 B0 B0 F1 B1 B1 F2 B2 B2 .  .

    Bubble (p-1)(F+B), makespan (m+p-1)(F+B), as GPipe; activations of only min(m, p-r) microbatches
    (arXiv:2006.09503).
    """
    return scheduled("one_f_one_b", lambda rank: _one_f_one_b(workers - rank - 1, microbatches), range(workers),
                     microbatches, options, workers, microbatches)  # fmt: skip


def _one_f_one_b(warm: int, microbatches: int) -> str:
    """Forwards beyond the last microbatch are left out when the word is numbered, so that m < p needs no case."""
    return "F" * warm + "FB" * microbatches


def interleaved(workers: int, microbatches: int, chunks: int = 2, **options: Unpack[Options]) -> Plan:
    """1F1B in which each rank holds v chunks, stage s on rank s mod p (Narayanan et al. 2021, arXiv:2104.04473).

    Forwards run in groups of p microbatches, chunk by chunk; 2(p-r-1) + (v-1)p of them come first (Megatron-LM's
    rule).  With p = 2, v = 2, m = 2, where small letters are of the second chunk::

        rank 0  F0 F1 f0 f1 .  .  b0 b0 .  b1 b1 B0 B0 B1 B1
        rank 1  .  F0 F1 f0 b0 b0 f1 b1 b1 B0 B0 B1 B1 .  .

    Bubble (p-1)(F+B)/v where p divides m.  Activations, in shares of a rank's whole stage, where p divides m > p:
    (2(p-r-1) + (v-1)p + 1)/v.  Each microbatch is sent v times as often.  Where p does not divide m the last group
    is smaller.
    """
    given = {"workers": workers, "microbatches": microbatches, "chunks": chunks}
    workers, microbatches, chunks = whole_numbers("interleaved", **given)
    order = [chunk for _ in range(0, microbatches, workers) for chunk in range(chunks) for _ in range(workers)]
    forwards, backwards = [f"F{c}" for c in order], [f"B{chunks - 1 - c}" for c in order]

    def word(rank: int) -> list[str]:
        warm = min(2 * (workers - rank - 1) + (chunks - 1) * workers, len(order))
        pairs = zip(forwards[warm:], backwards, strict=False)
        return forwards[:warm] + [w for pair in pairs for w in pair] + backwards[len(order) - warm :]

    place = [stage % workers for stage in range(workers * chunks)]
    return scheduled("interleaved", word, place, microbatches, options, workers, microbatches, chunks)


def pipedream(workers: int, microbatches: int) -> Plan:
    """1F1B without a flush: each microbatch's gradient is applied at once (Narayanan et al. 2019, SOSP).

    The plan is a whole run of m microbatches.  Each UPDATE holds one; rank r's backward of it uses the parameters of
    its forward, which are kept (weight stashing), min(m, p-r) versions of them.  So the gradient is up to p-r-1
    updates old when it is applied, and the class is *defined*.  With an update after each B::

        rank 0  F0 F1 .  .  B0 B0 F2 B1 B1 .  B2 B2
        rank 1  .  F0 B0 B0 F1 B1 B1 F2 B2 B2 .  .

    No bubble but the first and the last p-1 microbatches.
    """
    workers, microbatches = whole_numbers("pipedream", workers=workers, microbatches=microbatches)
    rows = tuple(_numbered(_one_f_one_b(workers - rank - 1, microbatches), (rank,), microbatches)
                 for rank in range(workers))  # fmt: skip
    plan = Plan(call_text("pipedream", workers, microbatches), rows, workers, Mesh(pipeline=workers), microbatches,
                holds="one", staleness=workers - 1, stashed=True)  # fmt: skip
    return update_each(communicate(losses(plan)))


def scheduled(name: str, word: Callable[[int], Iterable[str]], place: Sequence[int], m: int, options: Options,
              *args: int) -> Plan:  # fmt: skip
    """The plan whose rank r runs ``word(r)``."""
    workers, m, data, buckets = whole_numbers(
        name, workers=args[0], microbatches=m, data=options.get("data", 1), buckets=options.get("buckets", 1))
    rows = tuple(_numbered(word(rank), [s for s, at in enumerate(place) if at == rank], m) for rank in range(workers))
    plan = Plan(call_text(name, *args, **options), rows, len(place), Mesh(data, workers), m,
                options.get("merge", "mean"))  # fmt: skip
    plan = refine(plan, buckets)
    if "cuts" in options:
        plan = replace(plan, cuts=tuple(map(index, options["cuts"])))
    return complete(recompute(plan) if options.get("recompute") else plan)


def _numbered(word: Iterable[str], stages: Sequence[int], microbatches: int) -> tuple[Action, ...]:
    """A word such as ``F0 F0 B0`` as actions: a letter and the chunk (0 where there is none).

    Each letter of a chunk takes the next microbatch; those beyond the last are left out.
    """
    count: Counter[str] = Counter()
    row = []
    for letter in word:
        mb, count[letter] = count[letter], count[letter] + 1
        if mb < microbatches:
            row.append(Action(stages[int(letter[1:] or 0)], letter[0], mb))
    return tuple(row)
