"""Collectives as plans: rows of sends and receives of parts, one row a rank.

Every algorithm here is a function of the number of ranks that returns one row of actions a rank, on one
stage.  ``collective`` makes a plan of it that can be run by itself; ``expand`` puts it in place of the
``REDUCE_GRAD`` of a training plan.

Symbols: n ranks, S bytes of the buffer, alpha seconds a message (latency), beta seconds a byte (inverse
bandwidth); every rank sends and receives one message at a time (Hockney's model, full duplex).  "Sent" is
what a rank sends; ``s_i`` is the size of part i of n, ``i*S//n`` to ``(i+1)*S//n``.  Times hold for parts of
equal size.  The algorithms and their costs are those of Thakur, Rabenseifner and Gropp (2005) where no other
source is named.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from bpkit.given import whole_numbers
from bpkit.plan.action import Action, Part
from bpkit.plan.mesh import Mesh
from bpkit.plan.plan import Plan

Rows = list[list[Action]]
Algorithm = Callable[[int, int], Rows]  # (ranks, stage) -> one row a rank


def _part(i: int, n: int) -> Part:
    return Part(i % n, i % n + 1, n)


def _send(stage: int, part: Part | None, to: int) -> Action:
    return Action(stage, "SEND_G", part=part, peer=to)


def _add(stage: int, part: Part | None, source: int) -> Action:
    return Action(stage, "ADD_G", part=part, peer=source)


def _take(stage: int, part: Part | None, source: int) -> Action:
    return Action(stage, "RECV_G", part=part, peer=source)


def reduce_scatter(n: int, stage: int = 0) -> Rows:
    """Ring reduce-scatter: rank r ends with the sum of part r.

    Steps n - 1.  Sent by rank r: ``S - s_r``.  Time ``(n - 1) (alpha + beta S/n)``.
    """
    return _round(n, stage, 1, _add)


def all_gather(n: int, stage: int = 0) -> Rows:
    """Ring all-gather: rank r begins with part r; every rank ends with all parts.

    Steps n - 1.  Sent by rank r: ``S - s_(r+1)``.  Time ``(n - 1) (alpha + beta S/n)``.
    """
    return _round(n, stage, 0, _take)


def _round(n: int, stage: int, behind: int, receive: Callable[[int, Part, int], Action]) -> Rows:
    """A ring in which rank r first sends part r - behind, and then what it received last."""
    rows: Rows = [[] for _ in range(n)]
    for k in range(behind, behind + n - 1):
        for r, row in enumerate(rows):
            row.append(_send(stage, _part(r - k, n), (r + 1) % n))
            row.append(receive(stage, _part(r - k - 1, n), (r - 1) % n))
    return rows


def ring(n: int, stage: int = 0) -> Rows:
    """Ring all-reduce: reduce-scatter, then all-gather (Patarasuk and Yuan 2009).

    Steps 2(n - 1).  Sent by rank r: ``2S - s_r - s_(r+1)``, which is ``2 (n-1)/n S`` where n divides S.  Time
    ``2 (n - 1) (alpha + beta S/n)``.
    """
    return [a + b for a, b in zip(reduce_scatter(n, stage), all_gather(n, stage), strict=True)]


def server(n: int, stage: int = 0, root: int = 0) -> Rows:
    """Parameter server on rank `root`: it adds what the others send, in rank order, and returns the sum.

    Steps 2(n - 1).  Sent: ``(n - 1) S`` by the root, S by each other rank.  Time ``2 (n - 1) (alpha + beta S)``,
    the root's link being the bottleneck.
    """
    rows: Rows = [[_send(stage, None, root), _take(stage, None, root)] if r != root else [] for r in range(n)]
    others = [r for r in range(n) if r != root]
    rows[root] = [_add(stage, None, r) for r in others] + [_send(stage, None, r) for r in others]
    return rows


def sharded_server(n: int, stage: int = 0) -> Rows:
    """Parameter servers on all ranks: rank r adds part r of everybody and returns it to everybody.

    Steps 2(n - 1).  Sent by rank r: ``(S - s_r) + (n - 1) s_r``.  Time ``2 (n - 1) (alpha + beta S/n)``.
    """
    rows: Rows = []
    for r in range(n):
        others = [(r + k) % n for k in range(1, n)]
        sources = [(r - k) % n for k in range(1, n)]
        row = [_send(stage, _part(q, n), q) for q in others] + [_add(stage, _part(r, n), q) for q in sources]
        row += [_send(stage, _part(r, n), q) for q in others] + [_take(stage, _part(q, n), q) for q in sources]
        rows.append(row)
    return rows


def tree(n: int, stage: int = 0) -> Rows:
    """Binary tree, a heap: sums go up to rank 0 (children of r: 2r + 1 and 2r + 2), the result comes down.

    With depth d = floor(log2 n), at most 4d messages follow each other.  Sent by rank r: S times its children,
    and S more where r > 0.  Time ``4 d (alpha + beta S)`` for a complete tree: a rank receives from its two
    children one after the other.
    """
    rows: Rows = []
    for r in range(n):
        children = [c for c in (2 * r + 1, 2 * r + 2) if c < n]
        parent = (r - 1) // 2
        row = [_add(stage, None, c) for c in children]
        row += [_send(stage, None, parent), _take(stage, None, parent)] * (r > 0)
        rows.append(row + [_send(stage, None, c) for c in children])
    return rows


def broadcast(n: int, stage: int = 0) -> Rows:
    """Binomial tree from rank 0: in each round every rank that has the buffer sends it to one that has not.

    Steps ceil(log2 n).  Sent in all: ``(n - 1) S``.  Time ``ceil(log2 n) (alpha + beta S)``.
    """
    rows: Rows = [[] for _ in range(n)]
    reach = 1
    while reach < n:
        for r in range(min(reach, n - reach)):
            rows[r].append(_send(stage, None, r + reach))
            rows[r + reach].append(_take(stage, None, r))
        reach *= 2
    return rows


def binomial(n: int, stage: int = 0) -> Rows:
    """Binomial tree: the rounds of `broadcast` backwards, adding, until rank 0 has the sum, and then `broadcast`.

    Steps ``2 ceil(log2 n)``.  Sent in all: ``2 (n - 1) S``; by rank 0 ``ceil(log2 n) S``.  Time
    ``2 ceil(log2 n) (alpha + beta S)``.
    """
    turned = {"SEND_G": "ADD_G", "RECV_G": "SEND_G"}
    return [[replace(a, kind=turned[a.kind]) for a in reversed(row)] + row for row in broadcast(n, stage)]


def halving_doubling(n: int, stage: int = 0) -> Rows:
    """Recursive halving, then recursive doubling, on any number of ranks.

    With q the largest power of two up to n: steps ``2 log2 q``, sent ``2 (q - 1)/q S`` by each rank, time
    ``2 log2(q) alpha + 2 (q-1)/q S beta``, where n = q.  Otherwise the first 2(n - q) ranks fold in pairs: the odd
    one gives its gradient to the even one and takes the result, S more each and two more steps of
    ``alpha + beta S`` (n = 3: sent 2S, S, S in 4 steps).
    """
    q = 1 << (n.bit_length() - 1)
    folded = n - q
    members = [2 * i for i in range(folded)] + list(range(2 * folded, n))
    rows: Rows = [[] for _ in range(n)]
    for i in range(folded):
        rows[2 * i + 1].append(_send(stage, None, 2 * i))
        rows[2 * i].append(_add(stage, None, 2 * i + 1))
    for i, r in enumerate(members):
        rows[r] += _halve_and_double(stage, i, members)
    for i in range(folded):
        rows[2 * i].append(_send(stage, None, 2 * i + 1))
        rows[2 * i + 1].append(_take(stage, None, 2 * i))
    return rows


def _halve_and_double(stage: int, i: int, members: Sequence[int]) -> list[Action]:
    """The row of member i of a power of two of members."""
    q, low, high = len(members), 0, len(members)
    down: list[Action] = []
    up: list[Action] = []
    distance = q // 2
    while distance:
        peer, middle = members[i ^ distance], (low + high) // 2
        keep, give = ((low, middle), (middle, high)) if not i & distance else ((middle, high), (low, middle))
        down += [_send(stage, Part(*give, q), peer), _add(stage, Part(*keep, q), peer)]
        up = [_send(stage, Part(*keep, q), peer), _take(stage, Part(*give, q), peer), *up]
        low, high = keep
        distance //= 2
    return down + up


def hierarchical(n: int, stage: int = 0, hosts: int = 2) -> Rows:
    """Rings inside each host, and rings across hosts for each part: fewer steps, and all ranks send across at once.

    With L = n / hosts ranks a host: a ring reduce-scatter inside the host, a ring all-reduce of part r across hosts
    among the ranks that hold it, a ring all-gather inside the host (Jia et al. 2018 for the idea).  Steps
    ``2 (L - 1) + 2 (hosts - 1)``.  Sent across hosts by a rank: ``2 (hosts-1)/hosts S/L``, by a host L
    times as much (a flat `ring` in the order of hosts: ``2 (n-1)/n S``, by one rank of a host).  Time, with the links
    inside and between hosts: ``2 (L-1) (alpha_in + beta_in S/L) + 2 (hosts-1) (alpha_out + beta_out S/n)``.

    Raises
    ------
    ValueError
        If the hosts do not divide the ranks.
    """
    if hosts < 1 or n % hosts:
        raise ValueError(f"hierarchical: {n} ranks do not divide into {hosts} hosts of equal size")
    per_host = n // hosts
    scatter, reduce, gather = reduce_scatter(per_host, stage), ring(hosts, stage), all_gather(per_host, stage)
    rows: Rows = []
    for r in range(n):
        host, local = divmod(r, per_host)
        inside, across = range(host * per_host, (host + 1) * per_host), range(local, n, per_host)
        # Across hosts, part i of the part that this rank holds.
        own = [replace(a, part=_part(local * hosts + a.part.lo, n)) for a in reduce[host] if a.part is not None]
        rows.append(_among(inside, scatter[local]) + _among(across, own) + _among(inside, gather[local]))
    return rows


def _among(members: Sequence[int], row: list[Action]) -> list[Action]:
    """A row of a collective of some members, written with their ranks."""
    return [replace(action, peer=members[action.peer or 0]) for action in row]


def all_to_all(n: int, stage: int = 0) -> Rows:
    """Pairwise exchange: part q of rank r and part r of rank q change places, for every pair.

    Steps n, each pair once in a round-robin whose step k leaves out a rank r with 2r = k modulo n (n = 2: one step).
    Sent by rank r: ``S - s_r``.  Parts must be of equal size.  Time ``n (alpha + beta S/n)``.
    """
    rows: Rows = [[] for _ in range(n)]
    for k in range(n):
        for r, row in enumerate(rows):
            peer = (k - r) % n
            if peer != r:
                row.append(Action(stage, "SWAP_G", part=_part(peer, n), peer=peer))
    return rows


#: What each algorithm does, by name: the purpose that the checker holds it to, and its rows.
_SUMS = (ring, server, sharded_server, tree, binomial, halving_doubling, hierarchical)
_OTHERS = (reduce_scatter, all_gather, broadcast, all_to_all)
ALGORITHMS: dict[str, tuple[str, Algorithm]] = {made.__name__: ("all_reduce", made) for made in _SUMS}
ALGORITHMS |= {made.__name__: (made.__name__, made) for made in _OTHERS}


def _algorithm(name: str, ranks: int, stage: int, options: dict[str, int]) -> Rows:
    if name not in ALGORITHMS:
        raise ValueError(f"unknown collective {name!r}: choose one of {', '.join(ALGORITHMS)}")
    (ranks,) = whole_numbers(f"{name}, a collective", ranks=ranks)
    options = dict(zip(options, whole_numbers(name, 0, **options), strict=True))
    return ALGORITHMS[name][1](ranks, stage, **options)  # type: ignore[call-arg]


def collective(name: str, ranks: int, **options: int) -> Plan:
    """A collective by itself, as a plan over one buffer.

    Parameters
    ----------
    name : str
        A key of `ALGORITHMS`.
    ranks : int
        Number of ranks.
    **options : int
        ``root`` of a server, ``hosts`` of a hierarchy.

    Raises
    ------
    ValueError
        If there is no such collective, or the numbers do not fit.
    """
    rows = _algorithm(name, ranks, 0, options)
    words = [str(ranks), *(f"{key}={value}" for key, value in options.items())]
    return Plan(f"{name}({', '.join(words)})", tuple(map(tuple, rows)), 1, Mesh(data=ranks), place=(0,), expanded=True,
                purpose=ALGORITHMS[name][0])  # fmt: skip


def expand(plan: Plan, name: str, **options: int) -> Plan:
    """The plan with each REDUCE_GRAD written out as sends and receives of parts.

    Parameters
    ----------
    plan : Plan
        A training plan.
    name : str
        An all-reduce of `ALGORITHMS`.

    Returns
    -------
    Plan
        With one row a (pipeline, data) coordinate.

    Raises
    ------
    ValueError
        If `name` is no all-reduce, or the plan was expanded before.
    """
    if ALGORITHMS.get(name, ("all_reduce",))[0] != "all_reduce":
        raise ValueError(f"expand needs an all-reduce, and {name} is none")
    if plan.expanded:
        raise ValueError(f"{plan.name} is expanded already")
    rows: list[list[Action]] = []
    for row in plan.rows:
        each: Rows = [[] for _ in range(plan.mesh.data)]
        for action in row:
            written = action.kind == "REDUCE_GRAD"
            every = _algorithm(name, plan.mesh.data, action.stage, options) if written else [[action]] * len(each)
            for out, part in zip(each, every, strict=True):
                out += part
        rows += each
    return replace(plan, name=f"{plan.name} by {name}", rows=tuple(map(tuple, rows)), expanded=True)
