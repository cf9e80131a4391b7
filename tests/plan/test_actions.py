"""The action's text, the table of verbs, and what is refused."""

import pytest

from bpkit.plan import VERBS, Action, Part


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
