"""What a scaling measurement holds, and the file it is recorded in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bpkit.measure import table
from bpkit.measure.comparison import FEWEST, Ratio, ratio, said
from bpkit.measure.reports import Parts, Spread

FORMAT = "bpkit-scaling/1"

Event = tuple[int, str, float, float, float, float]  # rank, cell, start, end, wait, CPU time (-1: not taken)


@dataclass(frozen=True)
class Point:
    """What was measured with one number of workers.

    ``step_s``, ``throughput``, ``parts``, ``hidden_communication``, ``bytes_sent``, ``payload_bytes``,
    ``memory_bytes`` (None in old records) and ``algorithm`` are those of `bpkit.measure.Report`, over the timed steps
    of all repetitions.

    Parameters
    ----------
    workers, batch : int
        ``batch`` is the global batch.
    step_s : Spread
        Median and quartiles are over all timed steps; ``samples`` are the medians of the repetitions.
    speedup : float
        Throughput over the throughput of the best serial run: the repetition of the serial plan, of the same
        measurement, with the smallest median step time.  With a fixed global batch (strong scaling) this is the
        ratio of step times.  One worker's speedup is below 1 by the serial runs' own spread.
    efficiency : float
        ``speedup / workers``.
    time_to_accuracy_s : float or None
        Sum of the step times until the target accuracy on the test samples, in one run from the start,
        evaluations left out.  It is known to the interval between evaluations.  None: not reached, or not asked.
    steps_to_accuracy : int or None
    final_loss : float
        Loss of the last timed step.
    timeline : tuple of (rank, cell, start, end, wait, cpu)
        The timed step whose duration is nearest to the median; microseconds from its first start.
        ``cpu`` is -1 where it was not taken; records of before 2026-12 do not have it.
    """

    workers: int
    batch: int
    step_s: Spread
    throughput: float
    speedup: float
    efficiency: float
    parts: Parts
    hidden_communication: float
    bytes_sent: int | None
    payload_bytes: int
    algorithm: str
    time_to_accuracy_s: float | None
    steps_to_accuracy: int | None
    final_loss: float
    timeline: tuple[Event, ...]
    memory_bytes: int | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Point:
        """Read what ``to_json`` of a `Scaling` wrote."""
        step = values["step_s"]
        made = {"step_s": Spread(step["median"], step["q1"], step["q3"], tuple(step["samples"])),
                "parts": Parts(**values["parts"]),
                "timeline": tuple(tuple(event) for event in values["timeline"])}  # fmt: skip
        return cls(**{**values, **made})


@dataclass(frozen=True)
class Scaling:
    """A measured scaling experiment: ``machine`` and ``experiment`` describe it, ``points`` hold it."""

    machine: dict[str, Any]
    experiment: dict[str, Any]
    points: tuple[Point, ...]

    @property
    def noise(self) -> Ratio | None:
        """The same work against itself: each repetition over the one before it, of all counts together.

        Speedups that differ by less than its interval are not told apart by so many repetitions.  None where there are
        fewer than ten such pairs.
        """
        pairs = [pair for point in self.points for pair in pairwise(point.step_s.samples)]
        return ratio(*zip(*((after, before) for before, after in pairs), strict=True)) if len(pairs) >= FEWEST else None

    def point(self, workers: int) -> Point:
        """The point of a number of workers.

        Raises
        ------
        KeyError
            If it was not measured.
        """
        for point in self.points:
            if point.workers == workers:
                return point
        raise KeyError(f"{workers} workers were not measured: there are {[p.workers for p in self.points]}")

    def to_json(self) -> dict[str, Any]:
        """The measurement as it is recorded."""
        points = json.loads(json.dumps([asdict(point) for point in self.points]))
        noise = None if self.noise is None else asdict(self.noise)
        return {"format": FORMAT, "machine": self.machine, "experiment": self.experiment, "noise": noise,
                "points": points}  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write the measurement to a file."""
        target = Path(path)
        target.write_text(_indented(self.to_json()), encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Scaling:
        """Read a measurement from a file.

        Raises
        ------
        ValueError
            If it is not in this format.
        """
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f'{Path(path).name} is not a measurement of bp.scaling: its "format" must be "{FORMAT}"')
        return cls(values["machine"], values["experiment"], tuple(map(Point.from_json, values["points"])))

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        e = self.experiment
        fixed = f"batch {e['batch']:,}" + (" a worker" if e["scaling"] == "weak" else "")
        caption = f"{e['scaling']} scaling of {e['plan']} over {e['backend']}: {e['network']}, {e['data']}, {fixed}"
        caption += said(self.noise, e.get("steal"))
        target = e["target_accuracy"]
        rows = [[f"{p.workers}" + (" (serial)" if p.workers == 1 else ""),
                 f"{table.seconds(p.step_s.median)} ({table.seconds(p.step_s.q1)} to {table.seconds(p.step_s.q3)})",
                 f"{p.throughput:,.0f}", f"{p.speedup:.2f}", table.percent(p.efficiency),
                 *(table.seconds(getattr(p.parts, name)) for name in Parts.__dataclass_fields__),
                 table.count(p.bytes_sent), *([table.seconds(p.time_to_accuracy_s)] if target else [])]
                for p in self.points]  # fmt: skip
        head = ["workers", "step (quartiles)", "samples/s", "speedup", "efficiency", "compute", "waiting for core"]
        head += ["exposed comm.", "idle", "bytes sent", *([f"to {target:.0%}"] if target else [])]
        return caption, head, rows

    def __repr__(self) -> str:
        return table.text(*self._table())

    def _repr_html_(self) -> str:
        return table.html(*self._table())


def _indented(values: dict[str, Any]) -> str:
    """JSON with one line a point's field, so that versions can be compared and a timeline stays on one line."""
    head = {key: value for key, value in values.items() if key != "points"}
    lines = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    points = ["  {" + ",\n   ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in point.items()) + "}"
              for point in values["points"]]  # fmt: skip
    return lines + ',\n "points": [\n' + ",\n".join(points) + "\n ]\n}\n"
