"""Measurements: where each millisecond and each byte of a run went, how it scales, and fits to it."""

from bpkit.measure import fit
from bpkit.measure.experiment import scaling
from bpkit.measure.fit import AlphaBeta, alpha_beta
from bpkit.measure.host import machine
from bpkit.measure.layers import layer_times
from bpkit.measure.measurement import FORMAT, Point, Scaling
from bpkit.measure.pipeline import bubble, makespan, period
from bpkit.measure.reports import Parts, RankReport, Report, Spread, report

__all__ = ["FORMAT", "AlphaBeta", "Parts", "Point", "RankReport", "Report", "Scaling", "Spread",
           "alpha_beta", "bubble", "fit", "layer_times", "machine", "makespan", "period", "report",
           "scaling"]  # fmt: skip
