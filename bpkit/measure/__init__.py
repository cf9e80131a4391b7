"""Measurements: where each millisecond and each byte of a run went, how it scales, and fits to it."""

from bpkit.measure import fit
from bpkit.measure.fit import AlphaBeta, alpha_beta
from bpkit.measure.machine import machine
from bpkit.measure.measurement import FORMAT, Point, Scaling
from bpkit.measure.report import Parts, RankReport, Report, Spread, report
from bpkit.measure.scaling import scaling

__all__ = [
    "FORMAT", "AlphaBeta", "Parts", "Point", "RankReport", "Report", "Scaling", "Spread", "alpha_beta", "fit",
    "machine", "report", "scaling",
]  # fmt: skip
