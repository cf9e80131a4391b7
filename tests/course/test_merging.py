"""The merging explorer in Python: its frames against a simulation of our own. A browser tests the drawing."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("anywidget")

import bpkit as bp
from bpkit.course.figures.explorers import bundle
from bpkit.course.figures.merging import ALGORITHMS, MODULES, WORKERS, Merging, frames, merging
from bpkit.plan import Plan, PlanError, collective
from bpkit.plan.program import Program, compile_collective

SIZE = 840
CASES = [(name, n) for name in ALGORITHMS for n in WORKERS if name != "hierarchical" or n % 2 == 0]
ACTION = re.compile(r"0(SEND|ADD|RECV)_G(?:\[(\d+)(?::(\d+))?/(\d+)\])?[<>](\d)")


def compiled(name: str, n: int, size: int = SIZE) -> Program:
    options = {"hosts": 2} if name == "hierarchical" else {}
    return compile_collective(collective(name, n, **options), size, 4)


def read(text: str) -> tuple[str, range, int]:
    """An action's text: what it does, the elements, the peer."""
    found = ACTION.fullmatch(text)
    assert found, text
    kind, low, high, of, peer = found.groups()
    if of is None:
        return kind, range(SIZE), int(peer)
    start, end = int(low), int(high or int(low) + 1)
    return kind, range(start * SIZE // int(of), end * SIZE // int(of)), int(peer)


def simulated(plan: Plan) -> list[list[list[frozenset[int]]]]:
    """Who is in each element of each rank before each step and at the end: the plan's text, run in lockstep.

    In a step every rank sends the first message and takes the first message that it has not yet, if no earlier action
    on the same elements is still to be done.
    """
    rows = [[read(word) for word in line.split()[1:]] for line in str(plan).splitlines() if line.startswith("row")]
    held = [[frozenset([rank])] * SIZE for rank in range(len(rows))]
    seen = [[list(row) for row in held]]

    def first(rank: int, sends: bool) -> int | None:
        for at, (kind, elements, _) in enumerate(rows[rank]):
            if (kind == "SEND") == sends:
                earlier = [action for action in rows[rank][:at] if action[1].start < elements.stop
                           and elements.start < action[1].stop and not (sends and action[0] == "SEND")]
                return None if earlier else at
        return None

    while any(rows):
        pairs = []
        for rank, row in enumerate(rows):
            send = first(rank, True)
            if send is None:
                continue
            to = row[send][2]
            take = first(to, False)
            if take is not None and rows[to][take][2] == rank:
                pairs.append((rank, send, to, take))
        assert pairs, "nothing moves"
        before = [list(row) for row in held]
        for rank, _, to, take in pairs:
            kind, elements, _ = rows[to][take]
            for i in elements:
                assert kind == "RECV" or not before[to][i] & before[rank][i], "added twice"
                held[to][i] = before[rank][i] | (before[to][i] if kind == "ADD" else frozenset())
        gone = {(rank, send) for rank, send, _, _ in pairs} | {(to, take) for _, _, to, take in pairs}
        rows = [[action for at, action in enumerate(row) if (rank, at) not in gone] for rank, row in enumerate(rows)]
        seen.append([list(row) for row in held])
    return seen


@pytest.mark.parametrize(("name", "n"), CASES)
def test_frames_are_what_a_simulation_on_sets_gives(name: str, n: int) -> None:
    program = compiled(name, n)
    found, wanted = frames(program), simulated(program.plan)
    assert len(found["frames"]) == len(wanted) == len(found["steps"]) + 1
    parts = found["parts"]
    for shown, buffers in zip(found["frames"], wanted, strict=True):
        for text, elements in zip(shown.split("|"), buffers, strict=True):
            assert len(text.split()) == parts
            for part, members in enumerate(text.split()):
                here = set(elements[part * SIZE // parts:(part + 1) * SIZE // parts])
                assert here == {frozenset(map(int, members))} and len(set(members)) == len(members)


@pytest.mark.parametrize(("name", "n"), CASES)
@pytest.mark.parametrize("size", [SIZE, 11])
def test_messages_are_those_of_the_plan(name: str, n: int, size: int) -> None:
    program = compiled(name, n, size)
    found = frames(program)
    whole = "".join(map(str, range(n)))
    assert set(found["frames"][-1].replace("|", " ").split()) == {whole}, "at the end all hold the whole sum"
    steps = [[list(map(int, text.split())) for text in step.split("|")] for step in found["steps"]]
    messages = [message for step in steps for message in step]
    for rank, row in enumerate(program.rows):
        sent = sum(size_bytes for source, _, _, _, size_bytes, _ in messages if source == rank)
        assert sent == sum(step.payload for step in row if step.counted)
        added = sum(adds for _, to, _, _, _, adds in messages if to == rank)
        assert added == sum(step.action.kind == "ADD_G" for step in row)
    for _, _, low, high, bytes_, _ in messages:
        assert bytes_ == 4 * (high * size // found["parts"] - low * size // found["parts"])
    for step in steps:
        for end in (0, 1):
            assert len({m[end] for m in step}) == len(step), "a rank sends one message and receives one at a time"


def test_the_numbers_of_steps() -> None:
    steps = {name: len(frames(compiled(name, 8))["steps"]) for name in ALGORITHMS}
    assert steps == {"server": 14, "sharded_server": 14, "tree": 9, "binomial": 6, "ring": 14, "halving_doubling": 6,
                     "hierarchical": 8}


def test_a_wrong_plan_is_never_shown() -> None:
    text = str(collective("ring", 3)).replace("0ADD_G", "0RECV_G", 1)
    with pytest.raises(PlanError, match="end as"):
        compile_collective(Plan.parse(text), SIZE, 4)


def test_it_opens_as_asked_with_the_answer_hidden() -> None:
    figure = bp.course.merging("tree", 5)
    assert isinstance(figure, Merging) and repr(figure) == "Merging(tree, 5 workers)"
    assert (figure.step, figure.skipped, figure.shown, figure.size_bytes) == (0, False, [], 3360)
    assert merging(revealed=True).skipped
    films = {(film["name"], film["workers"]): film for film in figure.films}
    assert list(films) == CASES and films["ring", 3]["frames"] == frames(compiled("ring", 3))["frames"]


@pytest.mark.parametrize(("algorithm", "workers"), [("star", 4), ("ring", 1), ("ring", 9), ("hierarchical", 5)])
def test_refuses_what_it_has_not(algorithm: str, workers: int) -> None:
    with pytest.raises(ValueError, match="choose one of server, .*hierarchical"):
        merging(algorithm, workers)


def test_the_bundle_is_one_module_and_every_word_is_in_a_catalogue() -> None:
    source = bundle(*MODULES)
    assert Merging._esm == source
    assert not [line for line in source.splitlines() if line.startswith("import ")]
    own = bundle("merging_words", "merging_strips", "merging")
    used: set[Any] = set(re.findall(r'\bsay\(\s*"(\w+)"', own)) | set(ALGORITHMS)
    used |= {f"about{name[0].upper()}{name[1:]}" for name in ALGORITHMS}
    used |= {key for pair in re.findall(r'\? "(\w+)" : "(\w+)"', own) for key in pair}
    catalogue = set(re.findall(r"^\s+(\w+): ", bundle("merging_words", "merging"), re.MULTILINE))
    assert len(used) > 40 and used <= catalogue, used - catalogue
