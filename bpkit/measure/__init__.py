"""Measurements: where each millisecond and each byte of a run went, how it scales, and fits to it."""

from bpkit.measure import fit
from bpkit.measure.comparison import FEWEST, Ratio, interleave, noise, ratio
from bpkit.measure.experiment import scaling
from bpkit.measure.fit import AlphaBeta, alpha_beta
from bpkit.measure.host import machine
from bpkit.measure.layers import layer_times
from bpkit.measure.link import LinkTimes, link_times
from bpkit.measure.measurement import FORMAT, Point, Scaling
from bpkit.measure.pipeline import bubble, makespan, period
from bpkit.measure.reports import Parts, RankReport, Report, Spread, report

__all__ = ["FEWEST", "FORMAT", "AlphaBeta", "LinkTimes", "Parts", "Point", "RankReport", "Ratio", "Report", "Scaling",
           "Spread", "alpha_beta", "bubble", "fit", "interleave", "layer_times", "link_times", "machine", "makespan",
           "noise", "period", "ratio", "report", "scaling"]  # fmt: skip
