"""Pictures of chapter 4.2 say what they show, and the count of what autograd keeps is exact."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp


def test_mesh_names_each_rank_at_its_place() -> None:
    mesh = bp.plan.one_f_one_b(2, 4, data=2).mesh
    drawn = bp.course.draw_mesh(mesh, host=2)
    assert "rank 2: stage 1, part 0, shard 0" in drawn.alt and "Hosts of 2 ranks" in drawn.alt
    assert all(f"rank {rank}" in drawn.svg() for rank in range(4))


def test_bars_hold_every_value() -> None:
    drawn = bp.course.draw_bars({"GPipe": {"rank 0": 4, "rank 1": 4}, "1F1B": {"rank 0": 2, "rank 1": 1}}, "kept")
    assert drawn.alt == "Bars, kept. GPipe: rank 0 4, rank 1 4; 1F1B: rank 0 2, rank 1 1."
    assert sorted(bar.get_width() for bar in drawn.axes[0].patches) == [1, 2, 4, 4]
    with pytest.raises(ValueError, match="at least one value"):
        bp.course.draw_bars({"GPipe": {}}, "kept")


def test_block_has_both_skips() -> None:
    assert bp.course.draw_block().svg().count(">skip<") == 2


def test_saved_bytes_count_storages_once_and_what_is_let_go() -> None:
    x, weight = torch.ones(4, 8), torch.ones(8, 8, requires_grad=True)
    with bp.course.SavedBytes(weight) as saved:
        y = x @ weight  # keeps x
        z = (y * y).sum()  # keeps y, twice
        assert saved.now == saved.peak == 4 * (x.numel() + y.numel())
        z.backward()
        assert saved.now == 0 < saved.peak
        again = (x @ weight).sum()
        assert saved.now == 4 * x.numel() and saved.peak == 4 * (x.numel() + y.numel())
    del again
    assert saved.now == 0
