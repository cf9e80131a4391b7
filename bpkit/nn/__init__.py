"""Layers, losses and networks with hand-written forward and backward; no autograd outside `gradcheck`."""

from bpkit.nn.containers import Residual, Sequential
from bpkit.nn.costs import StageCost
from bpkit.nn.dropout import Dropout, dropout_mask
from bpkit.nn.gradcheck import GradCheck, gradcheck
from bpkit.nn.layer import Context, Layer, Pass, Site
from bpkit.nn.layers import GELU, LayerNorm, Linear, ReLU, Sigmoid, Tanh
from bpkit.nn.losses import MSE, CrossEntropy, Loss
from bpkit.nn.models import mlp
from bpkit.nn.network import Network

__all__ = [
    "GELU",
    "MSE",
    "Context",
    "CrossEntropy",
    "Dropout",
    "GradCheck",
    "Layer",
    "LayerNorm",
    "Linear",
    "Loss",
    "Network",
    "Pass",
    "ReLU",
    "Residual",
    "Sequential",
    "Sigmoid",
    "Site",
    "StageCost",
    "Tanh",
    "dropout_mask",
    "gradcheck",
    "mlp",
]
