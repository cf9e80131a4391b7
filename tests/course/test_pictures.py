"""The pictures: what they draw is what the plan, the mesh or the network says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle

import bpkit as bp
from bpkit.measure import Ratio
from bpkit.measure.messages import messages
from bpkit.plan import Mesh, collective
from bpkit.plan.memory import Memory
from bpkit.plan.program import compile, compile_collective
from bpkit.plan.strategies.servers import ages
from bpkit.show.drawing import Drawing
from bpkit.show.looks import FILLS

ADDED, STORED = FILLS["communication"][0], FILLS["update"][0]
MLP = bp.nn.mlp([16, 32, 16, 32, 10], seed=0)
GPT = bp.nn.gpt(64, 16, width=32, heads=4, layers=4)
ASYNCHRONOUS = bp.plan.asynchronous_server(3, arrivals=[1, 2, 3, 1, 1, 2, 3, 3, 2], staleness=2)


def sequence(of: int = 2) -> bp.plan.Plan:
    """One worker's GPT on a tensor axis with sequence parallelism."""
    return bp.plan.tensor_parallel(bp.plan.serial(), of, bp.nn.tensor_layout(GPT, sequence=True))


def arrows(axes: Any) -> list[str]:
    """The colours of the arrows of a panel."""
    return [to_hex(patch.get_edgecolor()) for patch in axes.patches if isinstance(patch, FancyArrowPatch)]


# -- messages


@pytest.mark.parametrize("n", [3, 4, 8])
def test_a_ring_is_a_circle_in_which_each_rank_sends_to_the_next(n: int) -> None:
    figure = bp.course.draw_messages(collective("ring", n))
    panels = [axes for axes in figure.axes if axes.patches]
    assert [arrows(axes) for axes in panels] == [[ADDED] * n] * (n - 1) + [[STORED] * n] * (n - 1)
    assert all(sum(isinstance(patch, Circle) for patch in axes.patches) == n for axes in panels)
    first = re.search(r"Step 1: (.*?)\.", figure.alt)
    assert first and len(set(re.findall(r"rank (\d) to (\d)", first[1]))) == n
    assert all((int(a) + 1) % n == int(b) for a, b in re.findall(r"rank (\d) to (\d)", figure.alt))


@pytest.mark.parametrize(
    ("name", "n", "options"),
    [("tree", 7, {}), ("server", 4, {}), ("halving_doubling", 8, {}), ("hierarchical", 8, {"hosts": 2}),
     ("all_gather", 4, {})],
)  # fmt: skip
def test_every_message_of_a_plan_is_an_arrow(name: str, n: int, options: dict[str, int]) -> None:
    plan = collective(name, n, **options)
    found = messages(compile_collective(plan, 8 * n, 4), lambda *_: 1.0)
    figure = bp.course.draw_messages(plan)
    assert sum(len(arrows(axes)) for axes in figure.axes) == len(found)
    assert figure.alt.count(" to ") == len(found) + 1  # "who sends to whom"
    assert len(arrows(bp.course.draw_messages(plan, each=False).axes[0])) == len({(m.source, m.to) for m in found})


def test_a_tree_stands_in_levels_and_a_server_above_its_workers() -> None:
    def heights(plan: bp.plan.Plan) -> list[float]:
        axes = bp.course.draw_messages(plan, each=False).axes[0]
        return [round(patch.center[1], 6) for patch in axes.patches if isinstance(patch, Circle)]

    assert heights(collective("tree", 7)) == [1, 0, 0, -1, -1, -1, -1]
    assert heights(collective("server", 4)) == [1, -1, -1, -1]
    columns = [patch.center[0] for patch in bp.course.draw_messages(
        collective("hierarchical", 4, hosts=2), each=False).axes[0].patches if isinstance(patch, Circle)]  # fmt: skip
    assert columns[0] == columns[1] < columns[2] == columns[3]  # a host is a column


def test_a_plan_that_trains_is_no_picture_of_messages() -> None:
    with pytest.raises(ValueError, match="is not a collective by itself"):
        bp.course.draw_messages(bp.plan.data_parallel(2))


# -- what is held


def test_zero_draws_the_bytes_of_the_calculation() -> None:
    figure = bp.course.draw_zero(MLP, workers=4, states=2, units=4)
    filled = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle) and patch.get_fill()
              and patch.get_facecolor()[3] == 1]  # fmt: skip
    assert len(filled) == 4 * 4 * 3
    for level in range(4):
        plan = bp.plan.zero(4, level, units=4) if level else bp.plan.data_parallel(4, 4)
        memory = Memory(compile(plan, MLP), MLP.description, 1)
        for rank, at in enumerate(plan.mesh.coordinates()):
            own = memory.kept(at, 2)
            bars = filled[3 * (4 * level + rank) :][:3]
            assert [bar.get_height() for bar in bars] == [own["parameters"], own["gradients"], own["optimizer"]]
    totals = [float(found) for found in re.findall(r"Level \d: ([\d.]+) kB", figure.alt)]
    assert totals == sorted(totals, reverse=True) and len(totals) == 4


def test_a_mesh_draws_every_rank_and_says_its_groups() -> None:
    mesh = Mesh(data=2, pipeline=2, tensor=2)
    figure = bp.course.draw_groups(mesh)
    assert [text.get_text() for text in figure.axes[0].texts] == [str(rank) for rank in range(8)]
    assert "On the data axis go together 0 2; 1 3; 4 6; 5 7" in figure.alt
    assert "On the tensor axis go together 0 1; 2 3; 4 5; 6 7" in figure.alt
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["data", "tensor", "pipeline"]
    assert len(bp.course.draw_groups(Mesh(data=2, tensor=2)).legends[0].get_texts()) == 2
    with pytest.raises(ValueError, match="at most 64 ranks"):
        bp.course.draw_groups(Mesh(data=65))


@pytest.mark.parametrize("network", [MLP, GPT], ids=["mlp", "gpt"])
@pytest.mark.parametrize("tensor", [2, 4])
def test_the_parts_of_a_matrix_cover_it_once(network: bp.nn.Network, tensor: int) -> None:
    figure = bp.course.draw_split(network, tensor, last=12)
    how = [panel.get_title().split("\n") for panel in figure.axes]
    for (size, cut), panel in zip(how, figure.axes, strict=True):
        inputs, outputs = map(int, size.split(" x "))
        boxes = [(p.get_x(), p.get_y(), p.get_width(), p.get_height(), to_hex(p.get_facecolor()))
                 for p in panel.patches]  # fmt: skip
        if cut.startswith("cut"):
            assert sum(w * h for _, _, w, h, _ in boxes) == inputs * outputs
            assert len({fill for *_, fill in boxes}) == tensor
            assert all(h == inputs if cut == "cut by columns" else w == outputs for _, _, w, h, _ in boxes)
    assert [cut for _, cut in how][:2] == ["cut by columns", "cut by rows"]
    with pytest.raises(ValueError, match="has no product from layer 99 on"):
        bp.course.draw_split(network, tensor, first=99)


def test_staleness_is_that_of_the_plan() -> None:
    axes = bp.course.draw_staleness(ASYNCHRONOUS).axes[0]
    assert [int(text.get_text()) for text in axes.texts] == ages(ASYNCHRONOUS)
    assert [round(bar.get_width() - 0.92, 6) for bar in axes.patches] == ages(ASYNCHRONOUS)
    assert [round(bar.get_x() + bar.get_width() - 0.92) for bar in axes.patches] == list(range(9))
    assert list(axes.get_xticks()) == list(range(10))  # whole updates
    assert len(bp.course.draw_staleness(ASYNCHRONOUS, 4).axes[0].patches) == 4
    with pytest.raises(ValueError, match="has no server"):
        bp.course.draw_staleness(bp.plan.data_parallel(2))


def test_a_tied_tensor_is_an_arc_between_its_stages() -> None:
    figure = bp.course.draw_ties(bp.plan.one_f_one_b(4, 8), GPT)
    assert "embedding: stages 0 and 3" in figure.alt and len(arrows(figure.axes[0])) == 1
    assert figure.legends[0].get_texts()[0].get_text() == "embedding: gradients are added"
    one = bp.course.draw_ties(bp.plan.zb_v(2, 4), GPT)  # the first and the last stage are rank 0's
    assert one.legends[0].get_texts()[0].get_text() == "embedding: one copy on one rank"
    one.canvas.draw()
    patches = one.axes[0].patches  # the arc runs beside the stages, not through their names
    (arc,) = (patch for patch in patches if isinstance(patch, FancyArrowPatch))
    points = one.axes[0].transData.transform(arc.get_path().vertices)
    assert not any(patch.get_window_extent().contains(*point) for point in points
                   for patch in patches if isinstance(patch, Rectangle))  # fmt: skip
    untied = bp.course.draw_ties(bp.plan.gpipe(2, 2), MLP)
    assert "No tensor is on two stages" in untied.alt and not arrows(untied.axes[0])


def test_tokens_say_what_the_plan_does_between_stages() -> None:
    own, split, every = "own tokens, all columns", "all tokens, some of the columns", "all tokens, all columns"
    alt = bp.course.draw_tokens(sequence(), stages=range(1, 4)).alt
    assert f"stage 1: {own}, then GATHER_F; stage 2: {split}, then SCATTER_F" in alt
    whole = bp.plan.tensor_parallel(bp.plan.serial(), 2, bp.nn.tensor_layout(GPT))
    alt = bp.course.draw_tokens(whole, stages=range(1, 4)).alt
    assert f"stage 1: {every}; stage 2: {split}, then SUM_F" in alt
    with pytest.raises(ValueError, match="has no tensor axis"):
        bp.course.draw_tokens(bp.plan.serial())


# -- one look


PICTURES: dict[str, Callable[[], Drawing]] = {
    "ring": lambda: bp.course.draw_messages(collective("ring", 4)),
    "tree": lambda: bp.course.draw_messages(collective("tree", 7), each=False),
    "sixteen": lambda: bp.course.draw_messages(collective("halving_doubling", 16)),
    "zero": lambda: bp.course.draw_zero(MLP),
    "mesh": lambda: bp.course.draw_groups(Mesh(2, 2, 2)),
    "split": lambda: bp.course.draw_split(GPT, last=12),
    "staleness": lambda: bp.course.draw_staleness(ASYNCHRONOUS),
    "ties": lambda: bp.course.draw_ties(bp.plan.one_f_one_b(4, 8), GPT),
    "tokens": lambda: bp.course.draw_tokens(sequence()),
    "block": bp.course.draw_block,
    "ranks": lambda: bp.course.draw_mesh(Mesh(2, 2, 2), host=4),
    "stacks": lambda: bp.course.draw_stacks({"one": {"compute": 1, "idle": 2}, "two": {"compute": 2}}, "ms"),
    "buckets": lambda: bp.course.draw_buckets({"DDP": [[("a", 2.0), ("b", 0.5)], [("c", 1.5)]]}),
    "grid": lambda: bp.course.draw_grid([[[0.1, 0.2], [0.9, 0.8]]], ["step 0.1, momentum 0.9"], ["a", "b"], "read"),
    "curves": lambda: bp.course.draw_curves({"none": [(1, 2), (10, 20)]}, "x", "y", {"none": [(1, 2), (10, 21)]}),
    "ratios": lambda: bp.course.draw_ratios([("small", {"DDP": Ratio(1.2, 1.1, 1.4)})], "ratio"),
    "bars": lambda: bp.course.draw_bars({"GPipe": {"rank 0": 4, "rank 1": 4}}, "kept"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_text_is_text_nine_pixels_tall_on_a_telephone_and_drawn_alike_each_time(name: str) -> None:
    drawn = PICTURES[name]().svg()
    width = float(re.search(r'width="([\d.]+)pt"', drawn)[1])
    sizes = [float(size) for size in re.findall(r"font(?:-size)?:[^;]*?([\d.]+)px", drawn)]
    assert sizes and min(sizes) * 350 / width >= 9
    assert drawn == PICTURES[name]().svg()
    assert "<title>" in drawn and "#000000" not in drawn and "fill: #ffffff\"><text" not in drawn
