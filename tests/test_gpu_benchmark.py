"""benchmarks/gpu.py, tried out on the processor: what it compares, the form of its record, and who is shown it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bpkit as bp

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _gpu_device  # noqa: E402
import _gpu_peers as peers  # noqa: E402

import gpu  # noqa: E402

CPU = torch.device("cpu")
ROW = {"group", "case", "peer", "ours_s", "peer_s", "ratio", "repetitions", "spread", "interval", "info"}


def run(tmp_path: Path, *options: str) -> dict[str, Any]:
    """The record of a quick run."""
    file = tmp_path / "gpu-tried.json"
    command = [sys.executable, "benchmarks/gpu.py", "--quick", "--json", str(file), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("cpu"), "--device", "cpu")


def test_a_record_says_what_was_measured_and_where(record: dict[str, Any]) -> None:
    assert record["format"] == "bpkit-gpu/1" and record["quick"] and record["device"]["type"] == "cpu"
    assert {"cpu", "gpus", "torch", "date"} <= set(record["machine"])
    for row in record["rows"]:
        assert set(row) >= ROW and row["ours_s"] > 0 and row["peer_s"] > 0
        assert row["repetitions"] == (3 if row["group"] in ("data parallel", "pipeline") else 5)
    for row in (row for row in record["rows"] if row["group"] == "roofline"):
        bound = max(row["flops"] / row["product_flops_per_s"], row["bytes"] / row["copy_bytes_per_s"])
        assert row["peer_s"] >= bound * (1 - 1e-9)  # the median of the larger of each pair


def test_a_run_is_in_a_row_or_is_said_to_be_missing(record: dict[str, Any]) -> None:
    found = {(row["group"], row["case"], row["peer"]) for row in record["rows"]}
    missing = {(entry["case"], entry["peer"]): entry["why"] for entry in record["not_run"]}
    for case in gpu.REHEARSED:
        label = f"{case.name}, fp32"
        for peer in (gpu.FUSED, gpu.FOREACH, gpu.AGAIN):
            assert ("serial", label, peer) in found
        assert ("roofline", label, "roofline") in found
        for peer in (gpu.COMPILED, gpu.OURS_GRAPHED, gpu.GRAPHED, gpu.REDUCED):
            assert missing[label, peer] in ("CUDA graphs need a GPU", "--quick leaves compilation out")
    assert "compute capability" in missing["every network, tf32", "all"]
    assert {"data parallel", "pipeline"} <= {group for group, *_ in found}


def test_nothing_is_wanted_of_a_processor(record: dict[str, Any]) -> None:
    assert all(row["info"] and "wanted" not in row for row in record["rows"])


def test_one_gpu_says_that_two_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    clock, kept = gpu.Clock(CPU, 0.001), gpu.Record(cuda=True)
    clock.cuda = True
    gpu.parallel(clock, 1, 1, kept)
    assert kept.rows == [] and len(kept.not_run) == 2 * len(gpu.PARALLEL)
    assert {entry["why"] for entry in kept.not_run} == {"needs two GPUs, and there is 1"}


def test_what_is_wanted_of_a_gpu() -> None:
    kept, case, net = gpu.Record(cuda=True), gpu.REHEARSED[0], gpu.REHEARSED[0].network(CPU, torch.float32)
    times = {name: [1.0, 1.0] for name in (gpu.OURS, gpu.AGAIN, gpu.FOREACH, gpu.COMPILED, "product", "copy")}
    times |= {gpu.FUSED: [2.0, 2.0], gpu.OURS_GRAPHED: [0.5, 0.5], gpu.GRAPHED: [0.4, 0.4]}
    gpu.serial_rows(kept, case, case.name, "fp32", net, gpu.Roof(gpu.Clock(CPU, 1e-4), torch.float32), times)
    wanted = {row["peer"]: row.get("wanted") for row in kept.rows}
    assert wanted == {gpu.FUSED: None, gpu.FOREACH: 1.5, gpu.COMPILED: 0.9, gpu.AGAIN: None, "roofline": None,
                      f"{gpu.GRAPHED} (ours too)": None}  # fmt: skip
    ratios = {row["peer"]: row["ratio"] for row in kept.rows}
    assert ratios[gpu.FUSED] == 2.0 and ratios[f"{gpu.GRAPHED} (ours too)"] == pytest.approx(0.8)


# Whether the comparison is fair


@pytest.mark.parametrize("case", gpu.REHEARSED, ids=lambda case: case.family)
def test_peers_train_as_we_do(case: gpu.Case) -> None:
    net = case.network(CPU, torch.float32)
    own, model, (x, t) = net.copy(), case.model(), case.data(net)
    steps = gpu.our_step(own, x, t), peers.step(model, net, x, t, False, fused=True)
    for _ in range(3):
        losses = [float(step()) for step in steps]
        gpu.agree("case", "peer", [losses[0] / t.numel()], losses[1:], 1e-5)
    ours = [p for i, p in enumerate(own.parameters()) if own.owners[i] == i]
    moved = [p for i, p in enumerate(net.parameters()) if net.owners[i] == i]
    for a, b, start in zip(ours, model.parameters(), moved, strict=True):
        assert float((a - b.detach()).abs().max()) < 1e-2 * float((a - start).abs().max()) + 1e-7


@pytest.mark.parametrize("theirs", [[1.0, 1.1], [float("nan"), 1.0]])
def test_a_peer_that_computes_something_else_is_refused(theirs: list[float]) -> None:
    with pytest.raises(gpu.Disagreement, match="case: our losses are .1.0, 1.0., those of peer"):
        gpu.agree("case", "peer", [1.0, 1.0], theirs, 1e-4)


@pytest.mark.parametrize("case", gpu.REHEARSED, ids=lambda case: case.family)
def test_the_step_never_waits_for_the_device(case: gpu.Case) -> None:
    """A tensor on "meta" has no numbers: whoever reads one on the host, or mixes devices, raises."""
    net = case.network(torch.device("meta"), torch.float32)
    step = gpu.our_step(net, *case.data(net))
    assert step().device.type == step().device.type == "meta"


def test_flops_and_bytes_by_hand() -> None:
    """Linear(4, 3), ReLU, Linear(3, 2) with biases; the first input half is not computed."""
    net = bp.nn.mlp((4, 3, 2))
    first = (24 + 3) + (24 + 3)  # F and W
    relu, last = 3 + 3, (12 + 2) + 12 + (12 + 2)
    assert gpu.flops(net) == first + relu + last
    edges = 2 * (4 + 3) + 2 * (3 + 3) + 3 * (3 + 2)
    parameters = (2 + 5) * 15 + (3 + 5) * 8
    assert gpu.bytes_moved(net, 10) == 4 * (10 * edges + parameters)


class FakeEvent:
    """Notes what is asked of it, as a CUDA event."""

    log: list[str]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, end: FakeEvent) -> float:
        return 6.0  # milliseconds


def test_a_gpu_is_timed_by_events_and_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEvent.log = log = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    clock = _gpu_device.Clock(torch.device("cuda"), 1.0)
    assert clock.once(lambda: log.append("run"), 3) == pytest.approx(2e-3)
    assert log == ["record", "run", "run", "run", "record", "wait"]


def test_precision_is_put_back() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyError), gpu.precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        raise KeyError
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


# Where it goes, and who is shown it


def test_only_a_whole_record_of_a_gpu_goes_to_the_pages() -> None:
    found = {"type": "cuda", "name": "NVIDIA H100 80GB HBM3", "count": 1}
    place = ROOT / "book/measurements"
    assert gpu.destination(found, False) == place / "gpu-nvidia-h100-80gb-hbm3.json"
    assert gpu.destination({**found, "count": 4}, False) == place / "gpu-4x-nvidia-h100-80gb-hbm3.json"
    assert gpu.destination(found, True).parent == gpu.destination({"type": "cpu"}, False).parent == ROOT / "build/bench"


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(tmp_path / "gpu.json")])
    gpu.main()
    assert "nothing to measure without a GPU: " in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_reasons_name_no_folders() -> None:
    kept = gpu.Record(cuda=False)
    kept.skip("case", "peer", "no compiler in /opt/some/folder/bin/g++, stop\nand more")
    assert kept.not_run == [{"case": "case", "peer": "peer", "why": "no compiler in g++, stop"}]


def as_of_a_gpu(record: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The record as it would be if its device were a GPU; only tests may do this."""
    rows = [{**row, "info": False, "wanted": 1.0} for row in record["rows"]]
    device = {"type": "cuda", "name": "Pretended <GPU>", "count": 2}
    return {**record, "rows": rows, "device": device, "quick": False, **more}


def test_the_pages_show_gpus_only(record: dict[str, Any], tmp_path: Path) -> None:
    assert bp.course.gpu_figures(tmp_path) is None
    file = tmp_path / "gpu-tried.json"
    refused = [record, {**record, "quick": False}, as_of_a_gpu(record, quick=True), as_of_a_gpu(record, rows=[]),
               as_of_a_gpu(record, device=record["device"]), as_of_a_gpu(record, format="another")]  # fmt: skip
    for one in refused:
        file.write_text(json.dumps(one))
        assert bp.course.gpu_figures(tmp_path) is None
    file.write_text(json.dumps(as_of_a_gpu(record)))
    figures, some = bp.course.gpu_figures(tmp_path), bp.course.gpu_figures(tmp_path, "roofline")
    assert figures is not None and some is not None
    assert repr(figures).startswith("Recorded on 2 x Pretended <GPU>, 20")
    assert "Pretended &lt;GPU&gt;" in figures._repr_html_() and "<GPU>" not in figures._repr_html_()
    assert len(figures.machines[0][1]) == len(record["rows"])
    assert {row[1] for row in some.machines[0][1]} == {"roofline"}


def test_records_beside_the_pages_are_of_gpus() -> None:
    records = list((ROOT / "book/measurements").glob("gpu-*.json"))
    assert bool(records) != ("no figure from a GPU in this book yet" in (ROOT / "book/gpu.md").read_text())
    for path in records:
        found = json.loads(path.read_text())
        assert found["device"]["type"] == "cuda" and not found["quick"] and found["rows"], path.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_graphs_run_too(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert found["device"]["type"] == "cuda"
    graphed = {row["case"] for row in found["rows"] if row["peer"] == f"{gpu.GRAPHED} (ours too)"}
    assert {f"{case.name}, fp32" for case in gpu.CASES if case.small} <= graphed


# The page "Running this on GPU machines"


@pytest.mark.parametrize("processes", [1, 2])
def test_the_script_for_several_hosts_trains(processes: int, tmp_path: Path) -> None:
    page = (ROOT / "book/gpu.md").read_text()
    (script,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "init_process_group" in block]
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # Without GPUs, also where there are some: with one, NCCL would refuse the second process.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(re.fullmatch(r"test accuracy (\d+)%\n", done.stdout)[1]) > 93
