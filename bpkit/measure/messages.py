"""The messages of a compiled collective, one by one, in the time of a model of the link."""

from collections.abc import Callable
from typing import NamedTuple

from bpkit.plan.checker.check import order
from bpkit.plan.program import Program


class Message(NamedTuple):
    """One message: seconds from the collective's start, and two ranks, each with its action's index in its row."""

    start: float
    end: float
    source: int
    send: int
    to: int
    receive: int


def messages(program: Program, seconds: Callable[[int, int, int], float],
             gamma_s_per_byte: float = 0.0) -> list[Message]:  # fmt: skip
    """When each message starts and ends, if every rank sends one and receives one at a time.

    That is Hockney's model, full duplex.  A message starts when both of its actions may, that is when whatever they
    wait for has ended, and both end with it.  With a second for every message, its start is the number of its step.

    Parameters
    ----------
    program : Program
        Of a collective by itself.
    seconds : callable
        Time of a message from `source` to `to` of so many bytes: ``seconds(source, to, size_bytes)``.
    gamma_s_per_byte : float
        Time to add a byte that came.  Where the receiver adds, the message ends when it has added; the sender goes on
        before that.

    Returns
    -------
    list of Message
        In the order of their starts.

    Raises
    ------
    ValueError
        If the plan trains: its actions take time too, which no model of a link gives.
    """
    if program.plan.purpose == "train":
        raise ValueError(f"{program.plan.name} is not a collective by itself")
    ends: list[dict[int, float]] = [{} for _ in program.rows]  # of each rank: action -> when it ended
    found: list[Message] = []
    for (source, send), (to, receive) in order(program.plan):
        waits = [ends[r][i] for r, at in ((source, send), (to, receive)) for i in program.rows[r][at].waits]
        start = max(waits, default=0.0)
        size = program.rows[source][send].payload
        ends[source][send] = sent = start + seconds(source, to, size)
        verb = program.plan.rows[to][receive].verb
        adds = verb.stream == "in" and bool(verb.reads)
        ends[to][receive] = end = sent + gamma_s_per_byte * size * adds
        found.append(Message(start, end, source, send, to, receive))
    return sorted(found)
