"""The merging explorer: collectives step by step, as their plans say and the checker's multisets prove."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import anywidget
import traitlets

from bpkit.course.figures.explorers import bundle, stylesheet
from bpkit.measure.messages import Message, messages
from bpkit.plan import Part, collective
from bpkit.plan.checker.provenance import Holdings, Provenance
from bpkit.plan.program import Program, compile_collective

#: The all-reduces that the figure offers, in its order.
ALGORITHMS = ("server", "sharded_server", "tree", "binomial", "ring", "halving_doubling", "hierarchical")
WORKERS = range(2, 9)
HOSTS = 2
#: Modules of the figure, each after those that it imports.
MODULES = ("text", "dom", "data", "describe", "controls", "predict", "merging_words", "merging_strips", "merging")


def frames(program: Program) -> dict[str, Any]:
    """What every rank holds before the first step of a collective and after each, and the messages between.

    Messages that may run at the same time, by `bpkit.measure.messages`, make a step.  Who is in which part comes from
    the multisets on which `bpkit.plan.checker.check` runs the plan.

    Parameters
    ----------
    program : Program
        Of a collective by itself.

    Returns
    -------
    dict
        ``frames``: what all ranks hold, before the first step and after each: "0 02 0|1 1 01|12 2 2" is rank after rank
        and part after part, a part as the ranks whose contributions it holds, one digit each.  ``steps``: for each step
        its messages: "0 1 2 3 1120 1|..." is rank 0 to rank 1, parts 2 to 3 (exclusive), 1120 bytes, which the receiver
        adds (or 0: puts in place of its own).  ``parts``: into how many a buffer is cut.  Text, since it is stored in
        notebooks, where each number of a list takes a line.
    """
    plan, world = program.plan, Provenance(program.plan)
    ranks = [world.holdings(at) for at in plan.mesh.coordinates()]
    parts = max((action.part.of for row in plan.rows for action in row if action.part), default=1)
    firsts = [world.atoms.inside(Part(i, i + 1, parts))[0] for i in range(parts)]  # atoms of a part share their fate

    def members(rank: Holdings, atom: int) -> str:
        """The data ranks whose contributions are in an atom."""
        return "".join(str(one[0]) for one in world.named(rank.gradients[0][atom].there) if one)

    def held() -> str:
        return "|".join(" ".join(members(rank, atom) for atom in firsts) for rank in ranks)

    def described(message: Message) -> str:
        step, receive = program.rows[message.source][message.send], program.rows[message.to][message.receive]
        low, high, of = step.action.part or (0, 1, 1)
        span = f"{low * parts // of} {high * parts // of}"
        return f"{message.source} {message.to} {span} {step.payload} {int(receive.action.kind == 'ADD_G')}"

    shown, steps = [held()], []
    for _, group in groupby(messages(program, lambda *_: 1.0), key=lambda message: message.start):
        step = list(group)
        carried = [world.take(ranks[m.source], m.send, plan.rows[m.source][m.send]) for m in step]
        for m, content in zip(step, carried, strict=True):
            world.deliver(ranks[m.to], m.receive, content)
        shown.append(held())
        steps.append("|".join(described(m) for m in step))
    return {"parts": parts, "frames": shown, "steps": steps}


class Merging(anywidget.AnyWidget):
    """The figure of the ways to merge; made by `merging`, which describes it.

    What the reader does is synced: ``algorithm``, ``workers``, ``step``, ``prediction`` (by "ring/4":
    ``{"steps": 6, "bytes": 5040}``), ``shown`` (the same keys, of answers that were asked for) and ``skipped`` (all
    answers are shown).
    """

    _esm = bundle(*MODULES)
    _css = stylesheet("explorer") + stylesheet("merging")

    films: Any = traitlets.List().tag(sync=True)
    size_bytes = traitlets.Int().tag(sync=True)
    algorithm = traitlets.Unicode().tag(sync=True)
    workers = traitlets.Int().tag(sync=True)
    step = traitlets.Int(0).tag(sync=True)
    prediction = traitlets.Dict().tag(sync=True)
    shown = traitlets.List(traitlets.Unicode()).tag(sync=True)
    skipped = traitlets.Bool(False).tag(sync=True)

    def __repr__(self) -> str:
        return f"Merging({self.algorithm}, {self.workers} workers)"


def merging(algorithm: str = "ring", workers: int = 4, *, elements: int = 840, revealed: bool = False) -> Merging:
    """An interactive figure of an all-reduce: who sends what to whom, step by step, and what each rank then holds.

    The reader chooses the algorithm and 2 to 8 workers, predicts the steps and the bytes that rank 0 sends, and then
    goes through the steps.  Every state is also said in words and as a table.

    Parameters
    ----------
    algorithm : str
        One of `ALGORITHMS`, to open with.
    workers : int
        2 to 8, to open with; a hierarchy has two hosts, so an even number.
    elements : int
        Elements of each rank's buffer, of 4 bytes; 840 is divided by each number of workers.
    revealed : bool
        Show the steps without asking for a prediction.

    Raises
    ------
    ValueError
        If there is no such algorithm or number of workers.
    """
    options = {name: {"hosts": HOSTS} if name == "hierarchical" else {} for name in ALGORITHMS}
    films = [
        {"name": name, "workers": n,
         **frames(compile_collective(collective(name, n, **options[name]), elements, 4))}
        for name in ALGORITHMS for n in WORKERS if n % options[name].get("hosts", 1) == 0
    ]  # fmt: skip
    if (algorithm, workers) not in [(film["name"], film["workers"]) for film in films]:
        raise ValueError(f"no {algorithm!r} of {workers} workers: choose one of {', '.join(ALGORITHMS)}, and 2 to 8 "
                         "workers (hierarchical: an even number)")  # fmt: skip
    return Merging(films=films, size_bytes=4 * elements, algorithm=algorithm, workers=workers, skipped=revealed)
