"""The action's text, the table of verbs, and what is refused."""

import ast
import json
import re
from pathlib import Path

import pytest

from bpkit.course.figures.explorers import MODULES, bundle
from bpkit.plan import VERBS, Action, Part
from bpkit.plan.action import LOOKS
from bpkit.plan.checker.effects import COMPUTE, GROUP
from bpkit.show.drawing import TEXT
from bpkit.show.looks import FILLS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "text", ["2F0", "1SEND_B3", "0ADD_G[3/4]<3", "0SEND_G[1:3/4]>0", "12UPDATE", "0UPDATE[2/5]", "0REDUCE_GRAD"]
)
def test_text_reads_back(text):
    assert str(Action.parse(text)) == text


def test_every_kind_prints_and_reads_back():
    for kind, verb in VERBS.items():
        mb = 4 if verb.scope == "mb" else None
        part = Part(1, 2, 3) if verb.scope == "part" else None
        action = Action(7, kind, mb, part, 2 if verb.peer else None)
        assert Action.parse(str(action)) == action


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("2X0", "unknown kind of action 'X'"),
        ("F0", "is not an action"),
        ("2F", "needs a microbatch"),
        ("2ZERO1", "takes no microbatch"),
        ("0ADD_G[4/4]<1", "does not fit: parts of 4 run from 0 to 3"),
        ("0ADD_G[1/4]", "needs a? ?peer"),
        ("0UPDATE>1", "takes no peer"),
        ("0ADD_G[1/4]>1", "is written with '<'"),
        ("0F0[1/2]", "works on a whole stage"),
    ],
)
def test_wrong_text_is_refused_with_the_reason(text, why):
    with pytest.raises(ValueError, match=why):
        Action.parse(text)


@pytest.mark.parametrize(("size", "of"), [(10, 3), (7, 4), (3, 4), (0, 2), (64, 1)])
def test_parts_cover_a_buffer_and_differ_by_one(size, of):
    bounds = [Part(i, i + 1, of).bounds(size) for i in range(of)]
    assert bounds[0][0] == 0 and bounds[-1][1] == size
    assert all(a[1] == b[0] for a, b in zip(bounds, bounds[1:], strict=False))
    lengths = [high - low for low, high in bounds]
    assert max(lengths) - min(lengths) <= 1


def named_together() -> dict[str, list[str]]:
    """Where a list, a set or the keys of a dictionary name three or more kinds, by more than a letter each."""
    found = {}
    for path in sorted(ROOT.glob("bpkit/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
            kinds = [p.value for p in parts if isinstance(p, ast.Constant) and p.value in VERBS and len(p.value) > 1]
            if len(kinds) > 2:
                found[f"{path.relative_to(ROOT)}:{node.lineno}"] = kinds
    return found


def test_the_table_is_the_only_list_of_kinds():
    """Besides it only the checker's two registers, from kind to what it does."""
    assert {where.split(":")[0] for where in named_together()} == {"bpkit/plan/action.py",
                                                                   "bpkit/plan/checker/effects.py"}  # fmt: skip
    assert set(COMPUTE) | set(GROUP) | {k for k, v in VERBS.items() if v.stream in ("in", "out")} == set(VERBS)


def test_scripts_of_pages_take_kinds_from_the_table():
    """`UPDATE` alone is a word of a legend; F, B, I and W are letters of passes."""
    long = [kind for kind in VERBS if len(kind) > 1 and kind != "UPDATE"]
    for path in ROOT.glob("bpkit/course/figures/static/*.js"):
        code = "\n".join(line.split("//")[0] for line in path.read_text().splitlines() if not line.startswith("/**"))
        assert re.findall(rf"\b(?:{'|'.join(long)})\b", code) == [], path
    looks = json.loads(re.search(r"LOOKS = (\{.*?\});", bundle(*MODULES))[1])
    assert looks == {kind: verb.look for kind, verb in VERBS.items()}
    assert {looks[kind] for kind in ("GATHER_F", "SCATTER_B", "SWAP_G", "SUM_TIED", "NORM")} == {"communication"}


def test_every_look_has_its_colour_and_its_words():
    assert {verb.look for verb in VERBS.values()} == set(LOOKS)
    assert {look: FILLS[look] for look in LOOKS} == LOOKS and set(LOOKS) <= set(TEXT)
