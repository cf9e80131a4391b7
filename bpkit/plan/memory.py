"""What ranks hold, by calculation: for the places of their buffers, for a prediction, and for the room they take."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from bpkit.description.flat import ALIGNMENT, part_bounds
from bpkit.description.network import Description
from bpkit.plan.action import GIVES_P, Action, Part
from bpkit.plan.checker.atoms import Atoms
from bpkit.plan.mesh import Coordinate
from bpkit.plan.plan import Plan, scatters
from bpkit.plan.program import Program, of_rank, tied_copies

Channel = tuple[str, int]  # kind of the send, and stage


@dataclass(frozen=True)
class Memory:
    """What the ranks of a compiled plan hold.

    Parameters
    ----------
    program : Program
    network : Description
        For which it was compiled.
    rows : int
        Samples of a microbatch, at most.
    """

    program: Program
    network: Description
    rows: int

    def stages(self, tensor: int) -> tuple[Description, ...]:
        """All stages, as a tensor rank holds them."""
        return of_rank(self.program.plan, self.network, tensor).split(self.program.cuts, self.program.plan.place)

    def block(self, letter: str = "") -> tuple[dict[int, int], int]:
        """Where each stage begins in a rank's block for a letter of buffer, by itself or where others that share its
        room do (see `Plan.room`); and the block's elements.

        Every rank reserves as much as the rank that needs most, so that places mean the same on all.
        """
        plan, places, most = self.program.plan, dict[int, int](), 0
        for owned in map(plan.owned, range(plan.mesh.pipeline)):
            widths = plan.rooms(letter, {stage: self.program.sizes[stage] for stage in owned})
            starts = dict(zip(widths, accumulate(widths.values(), initial=0), strict=False))
            places |= {stage: starts[plan.room(letter, stage)] for stage in owned}
            most = max(most, sum(widths.values()))
        return places, most

    @cached_property
    def channels(self) -> dict[Coordinate, dict[Channel, tuple[int, int]]]:
        """For each rank, the messages under way at a time on each channel on which it sends, and elements of one.

        Rows of data replicas may differ in how far they receive ahead: a rank lends to the row that it sends to.
        """
        plan = self.program.plan
        parts = (self.network.opened() if plan.opened else self.network).split(self.program.cuts, plan.place)
        result: dict[Coordinate, dict[Channel, tuple[int, int]]] = {at: {} for at in plan.mesh.coordinates()}
        for at in result:
            for (kind, stage), count in self.program.loans[plan.row_index(at)].items():
                shape = parts[stage].input_shape if kind == "RECV_F" else parts[stage].output_shape
                channel = (kind.replace("RECV", "SEND"), stage - 1 if kind == "RECV_F" else stage + 1)
                result[plan.partner(at, Action(stage, kind, 0))][channel] = (count, self.rows * math.prod(shape))
        for number, (_, copies) in enumerate(tied_copies(parts)):
            for at in (at for at in result if at.pipeline in {plan.place[stage] for stage in copies}):
                result[at]["SUM_TIED", number] = (len(copies) - 1, max(p.stop - p.start for p in copies.values()))
        return result

    @property
    def lent(self) -> tuple[int, int]:
        """Elements, and messages, that any rank lends at a time, at most."""
        own = [list(channels.values()) for channels in self.channels.values()]
        most = max(sum(n * size for n, size in each) for each in own)
        return most, max(1, max(sum(n for n, _ in each) for each in own))

    def sums(self, at: Coordinate) -> dict[Action, int]:
        """Elements of memory of the tensor axis that a rank needs for each action of that axis."""
        return {step.action: step.given(self.rows) // self.network.itemsize for step in self.program.row(at)
                if step.action.verb.stream == "tensor"}  # fmt: skip

    def kept(self, at: Coordinate, states: int, half: bool = False) -> dict[str, int]:
        """Bytes of parameters, gradients, optimizer state and activations that a rank keeps.

        Activations are the rank's saved forwards at their peak (`Program.peak`), each of a microbatch's inputs and
        outputs of all layers; what a layer allocates for a moment is left out, as are messages.  With a transport whose
        ranks share memory, gathered parameters are one for all of them and take less.

        Parameters
        ----------
        states : int
            Numbers that the optimizer keeps for each parameter.
        half : bool
            Whether there are parameters and gradients in bfloat16 as well.
        """
        plan, size, row = self.program.plan, self.network.itemsize, self.program.plan.row(at)
        held = {stage: part for stage, part in enumerate(self.stages(at.tensor)) if plan.place[stage] == at.pipeline}
        own = {stage: part.flat_size for stage, part in held.items()}
        parts = {stage: len(range(*part_bounds(n, plan.mesh.data, at.data)))
                 for stage, n in own.items() if scatters(row, stage)}  # fmt: skip
        updated = sum((own | parts).values())
        gathered = plan.mesh.data > 1 and any(action.kind == "RESHARD" for action in row)
        gradients, parameters = (sum(plan.rooms(letter, own).values()) for letter in ("G", "P" if gathered else ""))
        edges = sum(cost.inputs + cost.outputs for part in held.values() for cost in part.costs())
        saved = edges * self.program.peak[plan.row_index(at)] // len(held)
        return {"parameters": size * (parameters + updated * gathered) + half * 2 * 2 * sum(own.values()),
                "gradients": size * (gradients + sum(parts.values())), "optimizer": size * updated * states,
                "activations": size * saved * self.rows}  # fmt: skip

    def shared(self) -> int:
        """Bytes of memory that all ranks see, of one host whose ranks share memory: what such a transport takes.

        Gradients and parameters where they are reduced, averaged or gathered, edges under way, and sums of the tensor
        axis; not what a compressor sends.
        """
        plan, size = self.program.plan, self.network.itemsize
        kinds, ranks = {action.kind for row in plan.rows for action in row}, plan.workers
        taken: list[tuple[int, int]] = []  # so many times so many bytes
        if plan.mesh.data > 1:
            taken.append((ranks, size * self.block("G")[1]))
            if kinds & GIVES_P:  # what is gathered lies there once for all that gather
                taken.append((ranks // (plan.mesh.data if "UNSHARD" in kinds else 1), size * self.block()[1]))
        if plan.mesh.pipeline > 1:
            elements, messages = self.lent
            taken += [(ranks, size * elements), (ranks, 2 * 8 * ranks * messages)]  # each end tells the other of places
        taken += [(1, size * sum(own.values())) for at in plan.mesh.coordinates() if (own := self.sums(at))]
        taken += [(ranks, 8)] * ("NORM" in kinds)
        return sum(n * -(-max(1, each) // ALIGNMENT) * ALIGNMENT for n, each in taken)


def updated(plan: Plan, at: Coordinate) -> list[tuple[Action, int]]:
    """What the rank at a coordinate updates, in pieces, each as an UPDATE, and how many data ranks update each."""
    rows, n = [plan.row(at._replace(data=data)) for data in range(plan.mesh.data)], plan.mesh.data
    found = [(data, a.stage, a.part or (Part(data, data + 1, n) if scatters(row, a.stage) else Part(0, 1, 1)))
             for data, row in enumerate(rows) for a in row if a.kind == "UPDATE"]  # fmt: skip
    atoms = Atoms(part for _, _, part in found)
    times = Counter((stage, atom) for _, stage, part in found for atom in atoms.inside(part))
    return [(Action(stage, "UPDATE", None, atoms.part(atom)), times[stage, atom])
            for data, stage, part in found if data == at.data for atom in atoms.inside(part)]  # fmt: skip
