"""Simulation: a plan run on a model of time instead of on workers; it gives the same kind of trace."""

from bpkit.simulate.events import Times, simulate

__all__ = ["Times", "simulate"]
