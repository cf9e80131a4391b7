"""What a network is without a number in it, in plain Python: layers, shapes, costs, and where its tensors would lie.

It is what a plan is compiled for and what a simulation needs. `bpkit.nn` adds numbers.
"""

from bpkit.description.costs import StageCost, balanced_cuts
from bpkit.description.flat import part_bounds
from bpkit.description.network import Described, Description, Parameter
from bpkit.description.tensor import TensorLayout, shard, tensor_layout

__all__ = ["Described", "Description", "Parameter", "StageCost", "TensorLayout", "balanced_cuts", "part_bounds",
           "shard", "tensor_layout"]  # fmt: skip
