"""The action, and the one table that says what each kind of action does.

A plan is, for every rank, a list of actions.  An action has no rank in it; what it reads,
writes and frees, on which stream it runs and over which axis of the mesh it communicates is
fixed by its *kind*, in :data:`VERBS`.  The checker, the simulator and the executor all read
that table, and nothing else.

Notation is that of ``torch.distributed.pipelining`` (``2F0``, ``1SEND_B3``, ``0REDUCE_GRAD``),
extended where it has no word: a part of a gradient is written ``[i/n]`` or ``[lo:hi/n]``, a
peer ``>3`` (to) or ``<3`` (from).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NamedTuple

from bpkit.description.flat import part_bounds


class Part(NamedTuple):
    """Parts ``lo`` to ``hi`` (exclusive) of a flat buffer cut into ``of`` parts, counted from 0.

    Part ``i`` of ``n`` of a buffer of ``S`` elements is ``i*S//n : (i+1)*S//n``: parts differ by at
    most one element and always cover the buffer.
    """

    lo: int
    hi: int
    of: int

    def bounds(self, size: int) -> tuple[int, int]:
        """Element bounds of this part in a buffer of `size` elements."""
        return part_bounds(size, self.of, self.lo, self.hi)

    def __str__(self) -> str:
        span = f"{self.lo}" if self.hi == self.lo + 1 else f"{self.lo}:{self.hi}"
        return f"[{span}/{self.of}]"


class Touch(NamedTuple):
    """A buffer that an action touches: its letter, and the stage and microbatch relative to the action.

    Letters: ``A`` activation on a stage's input edge, ``D`` gradient on that edge, ``S`` what a forward
    saved, ``K`` what the input half kept for the weight half, ``G`` gradient of the parameters, ``R``
    this rank's part of it after a scatter, ``P`` parameters, ``N`` the global norm.
    ``edge`` is 1 for the stage's output edge.
    """

    letter: str
    edge: int = 0


@dataclass(frozen=True)
class Verb:
    """One row of the table: how actions of one kind behave.

    Parameters
    ----------
    stream : {"compute", "out", "in", "data", "tensor"}
        Actions of one rank and one stream run in the order of the row.
    axis : {None, "data", "pipeline", "tensor", "all"}
        The mesh axis over which the action communicates.
    reads, writes, frees : tuple of Touch
        Buffers.  A buffer that is both read and written is updated in place.
    scope : {"stage", "mb", "part"}
        Which coordinates an action carries.
    peer : {"", ">", "<"}
        ``>`` sends to a peer, ``<`` receives from one.
    look : str
        A key of :data:`LOOKS`: how figures draw it, and what their legends call it.
    bytes : {"", "sent", "native"}
        What it gives to the wire: nothing; what is sent as it stands, so that bytes are counted at the send; or what a
        native collective takes, of which payload is known and nothing is counted.
    """

    stream: str
    axis: str | None = None
    reads: tuple[Touch, ...] = ()
    writes: tuple[Touch, ...] = ()
    frees: tuple[Touch, ...] = ()
    scope: str = "stage"
    peer: str = ""
    look: str = "other"
    bytes: str = ""

    def touches(self, letters: str) -> bool:
        """Whether it reads or writes a buffer of one of these letters."""
        return any(touch.letter in letters for touch in self.reads + self.writes)


#: What figures tell apart: its fill and the colour of text on it, mid-tones that stand out from any page.
LOOKS: Final = {"forward": ("#8ab6de", "#10263b"), "backward": ("#3a73ad", "#ffffff"), "other": ("#868e96", "#101418"),
                "input_half": ("#2c7873", "#ffffff"), "weight_half": ("#7b5ea7", "#ffffff"),
                "communication": ("#d0622f", "#ffffff"), "update": ("#3f7f6b", "#ffffff")}


def _touches(text: str) -> tuple[Touch, ...]:
    """``"A A+ S"`` to touches; ``+`` is the stage's output edge."""
    return tuple(Touch(word[0], int(word.endswith("+"))) for word in text.split())


def _verb(stream: str, axis: str | None, reads: str, writes: str, frees: str, scope: str, counts: str = "",
          peer: str = "", look: str = "communication") -> Verb:  # fmt: skip
    return Verb(stream, axis, _touches(reads), _touches(writes), _touches(frees), scope, peer, look, counts)


def _compute(reads: str, writes: str, frees: str, scope: str, look: str = "other") -> Verb:
    return _verb("compute", None, reads, writes, frees, scope, look=look)


VERBS: Final[dict[str, Verb]] = {
    #       kind          reads, writes, frees, scope, look
    "ZERO": _compute("", "G R", "", "stage"),
    "F": _compute("A P", "A+ S", "", "mb", "forward"),
    "LOSS": _compute("A+", "D+", "A+", "mb"),
    "B": _compute("D+ S A P G", "D G", "D+ S A", "mb", "backward"),
    "I": _compute("D+ S A P", "D K", "", "mb", "input_half"),
    "W": _compute("K D+ S A G", "G", "K D+ S A", "mb", "weight_half"),
    "RECOMPUTE": _compute("A P", "S", "", "mb", "forward"),
    "UPDATE": _compute("G R N P", "P", "", "part", "update"),
    #       kind       stream, axis, reads, writes, frees, scope, bytes, peer
    "SEND_F": _verb("out", "pipeline", "A+", "", "A+", "mb", "sent"),
    "RECV_F": _verb("in", "pipeline", "", "A", "", "mb"),
    "SEND_B": _verb("out", "pipeline", "D", "", "D", "mb", "sent"),
    "RECV_B": _verb("in", "pipeline", "", "D+", "", "mb"),
    "SUM_F": _verb("tensor", "tensor", "A+", "A+", "", "mb", "native"),
    "SUM_B": _verb("tensor", "tensor", "D", "D", "", "mb", "native"),
    "GATHER_F": _verb("tensor", "tensor", "A+", "A+", "", "mb", "native"),
    "GATHER_B": _verb("tensor", "tensor", "D", "D", "", "mb", "native"),
    "SCATTER_F": _verb("tensor", "tensor", "A+", "A+", "", "mb", "native"),
    "SCATTER_B": _verb("tensor", "tensor", "D", "D", "", "mb", "native"),
    "SUM_G": _verb("tensor", "tensor", "G", "G", "", "stage", "native"),
    "SUM_TIED": _verb("out", "pipeline", "G", "G", "", "stage", "sent"),
    "REDUCE_GRAD": _verb("data", "data", "G", "G", "", "stage", "native"),
    "SCATTER_GRAD": _verb("data", "data", "G R", "G R", "", "stage", "native"),
    "UNSHARD": _verb("data", "data", "P", "P", "", "stage", "native"),
    "RESHARD": _verb("data", None, "P", "P", "", "stage"),
    "AVERAGE": _verb("data", "data", "P", "P", "", "stage", "native"),
    "NORM": _verb("data", "all", "G R", "N", "", "stage", "native"),
    "SEND_G": _verb("out", "data", "G", "", "", "part", "sent", ">"),
    "ADD_G": _verb("in", "data", "G", "G", "", "part", "", "<"),
    "RECV_G": _verb("in", "data", "", "G", "", "part", "", "<"),
    "SWAP_G": _verb("out", "data", "G", "G", "", "part", "sent", ">"),
    "SEND_P": _verb("out", "data", "P", "", "", "part", "sent", ">"),
    "RECV_P": _verb("in", "data", "", "P", "", "part", "", "<"),
}

#: Kinds that give parameters to other data ranks.
GIVES_P: Final = frozenset(k for k, verb in VERBS.items() if verb.axis == "data" and verb.bytes and verb.touches("P"))

#: Forwards and backwards, whole and in halves.
PASSES: Final = frozenset(k for k, v in VERBS.items() if v.stream == "compute" and v.touches("S"))

#: Collectives of the tensor axis on an edge: a sum, or what brings together or takes apart the ranks' own tokens.
ON_EDGES: Final = frozenset(kind for kind, verb in VERBS.items() if verb.stream == "tensor" and verb.scope == "mb")

#: Kinds that give an edge away: to another pipeline rank, or to a collective of the tensor axis.
GIVES: Final = frozenset(kind for kind, verb in VERBS.items() if verb.bytes and verb.touches("AD"))

#: Which RECV takes what a SEND gives, with the step in stages from sender to receiver.
PARTNERS: Final[dict[str, tuple[tuple[str, ...], int]]] = {
    "SEND_F": (("RECV_F",), 1), "SEND_B": (("RECV_B",), -1),
    "SEND_G": (("ADD_G", "RECV_G"), 0), "SEND_P": (("RECV_P",), 0)}  # fmt: skip

_PATTERN = re.compile(r"(?P<stage>\d+)(?P<kind>[A-Z]+(?:_[A-Z]+)*)(?P<mb>\d+)?"
                      r"(?:\[(?P<lo>\d+)(?::(?P<hi>\d+))?/(?P<of>\d+)\])?(?:(?P<way>[<>])(?P<peer>\d+))?")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Action:
    """One action of one rank, for example ``2F0``: the forward of stage 2 on microbatch 0.

    Parameters
    ----------
    stage : int
        Stage, counted from 0 over the whole network.
    kind : str
        A key of :data:`VERBS`.
    mb : int, optional
        Microbatch, for kinds that work on one.
    part : Part, optional
        Part of the stage's flat buffer, for kinds that work on parts; None is the whole.
    peer : int, optional
        Coordinate of the partner on the kind's axis, for sends and receives of parts.

    Raises
    ------
    ValueError
        If the kind is unknown, or a coordinate is missing, superfluous or out of range.
    """

    stage: int
    kind: str
    mb: int | None = None
    part: Part | None = None
    peer: int | None = None

    def __post_init__(self) -> None:
        verb = VERBS.get(self.kind)
        if verb is None:
            raise ValueError(f"unknown kind of action {self.kind!r}: a kind is one of {', '.join(VERBS)}")
        if (self.mb is None) == (verb.scope == "mb"):
            needs = "needs a microbatch" if verb.scope == "mb" else "takes no microbatch"
            raise ValueError(f"{self}: {self.kind} {needs}, for example 0{self.kind}{'0' * (verb.scope == 'mb')}")
        if self.part is not None:
            lo, hi, of = self.part
            if verb.scope != "part":
                raise ValueError(f"{self}: {self.kind} works on a whole stage and takes no part")
            if not 0 <= lo < hi <= of:
                raise ValueError(f"{self}: part {self.part} does not fit: parts of {of} run from 0 to {of - 1}")
        if (self.peer is None) == bool(verb.peer):
            raise ValueError(f"{self}: {self.kind} {'needs' if verb.peer else 'takes no'} peer")

    @property
    def verb(self) -> Verb:
        """The row of the table for this kind."""
        return VERBS[self.kind]

    def __str__(self) -> str:
        mb = "" if self.mb is None else str(self.mb)
        way = VERBS[self.kind].peer or ">" if self.kind in VERBS else ">"
        return f"{self.stage}{self.kind}{mb}{self.part or ''}" + ("" if self.peer is None else f"{way}{self.peer}")

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read what ``str`` prints.

        Raises
        ------
        ValueError
            If `text` is not an action.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not an action: write <stage><KIND><microbatch>, for example 2F0 "
                             "or 0ADD_G[3/4]<3")  # fmt: skip
        number = {k: int(v) for k, v in match.groupdict().items() if v is not None and k not in ("kind", "way")}
        part = Part(number["lo"], number.get("hi", number["lo"] + 1), number["of"]) if "of" in number else None
        action = cls(number["stage"], match["kind"], number.get("mb"), part, number.get("peer"))
        if match["way"] and match["way"] != action.verb.peer:
            raise ValueError(f"{text!r}: {action.kind} is written with {action.verb.peer!r}, as in {action}")
        return action


class Buffer(NamedTuple):
    """A buffer of one rank: letter, stage (edge for A and D; -1 for the one of all stages), microbatch."""

    letter: str
    stage: int
    mb: int | None


def buffer(action: Action, touch: Touch) -> Buffer:
    """The buffer of the action's rank that `touch` means."""
    if touch.letter == "N":
        return Buffer("N", -1, None)
    mb = action.mb if touch.letter in "ADSK" else None
    return Buffer(touch.letter, action.stage + touch.edge, mb)
