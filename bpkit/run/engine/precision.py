"""Mixed precision: stages that compute in bfloat16, between activations, gradients and weights in float32.

Micikevicius et al. 2018, arXiv:1710.03740, without loss scaling, which bfloat16's range makes needless (Kalamkar et al.
2019, arXiv:1905.12322).  Sums over microbatches and over ranks are float32's, and so is the optimizer's update.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from bpkit.nn import Context, Network


class Mixed:
    """A stage of float32 that runs in bfloat16; in the executor it stands for the `Network` it is made of.

    A microbatch's gradient is bfloat16's, and is then added to the stage's own, in float32.
    """

    def __init__(self, whole: Network) -> None:
        self._whole, self._half = whole, whole.copy(dtype=torch.bfloat16)
        self._half._skips = whole._skips  # whose ends may stand in two stages
        form, pairs = whole.description, list(zip(whole.gradients(), self._half.gradients(), strict=True))
        self._gradients = [(whole.flat_gradients, self._half.flat_gradients, False)]
        if form.lent:  # what another stage holds is never overwritten
            self._gradients = [(*pairs[i], not form.parameters[i].held) for i in self._half.description.own]
        self.bytes = 2 * (self._half.flat_parameters.numel() + self._half.flat_gradients.numel())

    def forward(self, x: Tensor, slot: Hashable, context: Context) -> Tensor:
        """As `Network.forward`, from float32 (or tokens) to float32; so are the others."""
        return self._half.forward(x.to(self._half.input_dtype), slot, context).float()

    def forward_anew(self, x: Tensor, slot: Hashable, context: Context) -> Tensor:
        """The first forward of a step: takes over the float32 parameters, which are whole now."""
        torch._foreach_copy_(self._half.parameters(), self._whole.parameters())
        return self.forward(x, slot, context)

    def backward(self, dy: Tensor, slot: Hashable, accumulate: bool, need_input: bool = False) -> Tensor | None:
        dx = self._half.backward(dy.bfloat16(), slot, False, need_input)
        self._add(accumulate)
        return None if dx is None else dx.float()

    def backward_input(self, dy: Tensor, slot: Hashable, need_input: bool) -> Tensor | None:
        dx = self._half.backward_input(dy.bfloat16(), slot, need_input)
        return None if dx is None else dx.float()

    def backward_weight(self, slot: Hashable, accumulate: bool) -> None:
        self._half.backward_weight(slot, False)
        self._add(accumulate)

    def _add(self, accumulate: bool) -> None:
        for whole, half, lent in self._gradients:
            whole.add_(half) if accumulate or lent else whole.copy_(half)
