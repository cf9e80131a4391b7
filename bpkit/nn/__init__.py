"""Layers, losses and networks with hand-written forward and backward; no autograd outside `gradcheck`."""

from bpkit.description.costs import StageCost, balanced_cuts
from bpkit.description.tensor import TensorLayout, tensor_layout
from bpkit.nn.gradcheck import GradCheck, gradcheck
from bpkit.nn.layer import Context, Layer, Pass, Site
from bpkit.nn.layers.attention import Attention, Heads, block
from bpkit.nn.layers.containers import AddSkip, Residual, Sequential, StashSkip
from bpkit.nn.layers.convolution import AveragePool2d, Conv2d, Flatten, MaxPool2d, Reshape
from bpkit.nn.layers.dropout import Dropout, dropout_mask
from bpkit.nn.layers.embedding import Embedding, Positions, Unembedding
from bpkit.nn.layers.linear import GELU, Linear, ReLU, Sigmoid, Tanh
from bpkit.nn.layers.normalisation import BatchNorm, GroupNorm, LayerNorm
from bpkit.nn.losses import MSE, CrossEntropy, Loss, VocabularyCrossEntropy
from bpkit.nn.models import convnet, gpt, mlp
from bpkit.nn.network import Network
from bpkit.nn.tensor import merge, shard

__all__ = ["GELU", "MSE", "AddSkip", "Attention", "AveragePool2d", "BatchNorm", "Context", "Conv2d", "CrossEntropy",
           "Dropout", "Embedding", "Flatten", "GradCheck", "GroupNorm", "Heads", "Layer", "LayerNorm", "Linear", "Loss",
           "MaxPool2d", "Network", "Pass", "Positions", "ReLU", "Reshape", "Residual", "Sequential", "Sigmoid", "Site",
           "StageCost", "StashSkip", "Tanh", "TensorLayout", "Unembedding", "VocabularyCrossEntropy", "balanced_cuts",
           "block", "convnet", "dropout_mask", "gpt", "gradcheck", "merge", "mlp", "shard",
           "tensor_layout"]  # fmt: skip
