"""Record how training scales on this machine, for the pages that have no kernel.

    python tools/record.py --out book/measurements/NAME.json [--name "what readers call this machine"]

Writes one file an experiment, NAME-small-strong.json and so on, each in the format of bp.scaling, which
bp.course.explorer reads, alone or as a folder; and pipelines-NAME.json, which bp.course.pipelines reads.  It takes
about eight minutes; let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bpkit as bp
from bpkit.course.figures.pipelines import SCHEDULES
from bpkit.course.figures.schedules import equal_stages, schedules


def experiments(quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is recorded: the chapter's network, and one whose compute outweighs its communication."""
    plan = partial(bp.plan.data_parallel, buckets=3)
    short: dict[str, Any] = {"steps": 4, "warmup": 1, "repetitions": 2, "target": None} if quick else {}
    small = bp.nn.mlp([64, 512, 512, 10], seed=0)
    large = bp.nn.mlp([64, 1024, 1024, 1024, 10], seed=0)
    for scaling in ("strong", "weak"):
        yield f"small-{scaling}", {"network": small, "scaling": scaling, "batch": 256, "plan": plan, **short}
    # Digits has 1,437 training samples: four times 256 is the largest weak batch.
    for scaling, batch in (("strong", 1024), ("weak", 256)):
        settings = {"steps": 10, "warmup": 3, "repetitions": 5, "evaluate_every": 10, **short}
        yield f"large-{scaling}", {"network": large, "scaling": scaling, "batch": batch, "plan": plan, **settings}
    # Chapter 4.1, over gloo, where communication costs something.
    plans = {"one-bucket": bp.plan.data_parallel, "three-buckets": plan}
    plans |= {f"zero{level}": partial(bp.plan.zero, level=level, units=3) for level in (1, 3)}
    for label, maker in plans.items():
        yield f"trainer-{label}", {"network": large, "backend": "gloo", "batch": 1024, "plan": maker, **settings}
    # Chapter 4.2: a language model, cut along one axis or two.
    text = bp.data.text(length=32)
    gpt = bp.nn.gpt(text.vocabulary, 32, width=128, heads=4, layers=4, seed=0)
    split = partial(bp.plan.tensor_parallel, layout=bp.nn.tensor_layout(gpt))
    makers: dict[str, Any] = {
        "data": plan,
        "pipeline": partial(bp.plan.one_f_one_b, microbatches=8),
        "tensor": lambda n: split(bp.plan.serial(), n),
        "data-pipeline": lambda n: bp.plan.one_f_one_b(2, 8, data=n // 2),
        "pipeline-tensor": lambda n: split(bp.plan.one_f_one_b(n // 2, 8), 2),
    }
    settings = {"steps": 8, "warmup": 2, "repetitions": 4, **short, "target": None}
    for label, maker in makers.items():
        yield f"gpt-{label}", {"network": gpt, "data": text, "batch": 64, "plan": maker, **settings}


def pipelines(name: str | None, quick: bool) -> str:
    """Every schedule of chapter 3.3's figure on 1, 2 and 4 workers, as JSON with a line for each plan."""
    plans = [make(p, m) for p in (1, 2, 4) for m in (4, 8) for make in SCHEDULES.values()]
    runs: dict[str, Any] = {"steps": 3, "warmup": 1, "repetitions": 1} if quick else {"repetitions": 5}
    found = schedules(equal_stages(), bp.data.digits(), list(dict.fromkeys(plans)), name=name, **runs)
    points = ",\n".join(json.dumps(point) for point in found.pop("points"))
    return json.dumps(found, indent=1, ensure_ascii=False).removesuffix("\n}") + f',\n "points": [\n{points}\n ]\n}}\n'


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Record how training scales on this machine.")
    parser.add_argument(
        "--out", type=Path, required=True, help="what the files are called: NAME.json gives NAME-small-strong.json, ..."
    )
    parser.add_argument("--name", help="what readers shall call this machine")
    parser.add_argument("--only", default="", metavar="TEXT", help="record only experiments whose name begins so")
    parser.add_argument("--quick", action="store_true", help="a few steps, to try this tool")
    given = parser.parse_args()
    if os.getloadavg()[0] > 0.5:
        print(f"the load of this machine is {os.getloadavg()[0]:.1f}: others compute too, and the figures will show it")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    data, start = bp.data.digits(), time.monotonic()
    for label, settings in experiments(given.quick):
        if not label.startswith(given.only):
            continue
        measured = bp.scaling(**{"data": data, "workers": [1, 2, 4], "name": given.name, **settings})
        path = measured.save(given.out.with_name(f"{given.out.stem}-{label}.json"))
        print(f"{measured}\n{path}\n", flush=True)
    if "pipelines".startswith(given.only):
        path = given.out.with_name(f"pipelines-{given.out.stem}.json")
        path.write_text(pipelines(given.name, given.quick), encoding="utf-8")
        print(path)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
