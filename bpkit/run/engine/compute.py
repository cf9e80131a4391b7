"""What each kind of compute does on a rank."""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bpkit.optim import clip_factor
from bpkit.plan.action import Action, Buffer, buffer
from bpkit.run.engine.context import Call, Rank, nothing, runs


@runs("ZERO")
def zero(rank: Rank, action: Action, index: int) -> Call:
    """Empty a gradient: for most, the first backward overwrites it, and nothing is done here."""
    return rank.buffers.gradients[action.stage].zero_ if index in rank.emptying else nothing


# -- forward ---------------------------------------------------------------------------------------------


@runs("F", "RECOMPUTE")
def forward(rank: Rank, action: Action, index: int) -> Call:
    """The forward of a stage, of which only the output is kept where it runs again for what its backward needs."""
    s, mb, edges, step = action.stage, action.mb or 0, rank.edges, rank.step
    run, slot = rank.net(action, index).forward, rank.slots.get((s, mb))
    given, made = Buffer("A", s, mb), Buffer("A", s + 1, mb)
    if s in rank.mixed and not any(a.kind == "F" and a.stage == s for a in rank.row[:index]):
        run = rank.mixed[s].forward_anew

    def keep() -> None:
        x = step.inputs[mb] if s == 0 else edges[given]
        edges[made] = _own(run(x, slot, step.contexts[mb]), x)

    def forget() -> None:  # all such forwards share one slot
        x = step.inputs[mb] if s == 0 else edges[given]
        edges[made] = run(x, "forgotten", replace(step.contexts[mb], again=True)).clone()

    if action.kind == "RECOMPUTE":
        return lambda: run(step.inputs[mb] if s == 0 else edges[given], slot, step.contexts[mb])
    return forget if Action(s, "RECOMPUTE", mb) in rank.row else keep


@runs("LOSS")
def loss(rank: Rank, action: Action, index: int) -> Call:
    """The sum of a microbatch's losses, and its gradient."""
    mb, edges, step, function = action.mb or 0, rank.edges, rank.step, rank.buffers.loss
    outputs, gradients = (buffer(action, touch) for touch in (action.verb.reads[0], action.verb.writes[0]))

    def value_and_gradient() -> None:
        value, gradient = function.value_and_gradient(edges[outputs], step.targets[mb])
        weight = step.weights[mb]
        step.losses[mb] = value
        edges[gradients] = gradient if weight == 1.0 else gradient.mul_(weight)

    return value_and_gradient


# -- backward --------------------------------------------------------------------------------------------


@runs("B", "I")
def backward(rank: Rank, action: Action, index: int) -> Call:
    """Both halves of the backward of a stage, or the one for which the stage before waits."""
    s, mb, edges, net = action.stage, action.mb or 0, rank.edges, rank.net(action, index)
    whole = partial(net.backward, accumulate=index not in rank.overwriting)
    run, slot = whole if action.kind == "B" else net.backward_input, rank.slots[s, mb]
    given, made = Buffer("D", s + 1, mb), Buffer("D", s, mb)

    def input_gradient() -> None:
        above = edges[given]
        gradient = run(above, slot, need_input=s > 0)
        if gradient is not None:
            edges[made] = _own(gradient, above)

    return _giving_back(rank, index, input_gradient)


@runs("W")
def weight_half(rank: Rank, action: Action, index: int) -> Call:
    """The half of the backward that gives the gradient of the parameters."""
    run, slot = rank.net(action, index).backward_weight, rank.slots[action.stage, action.mb]
    adds = index not in rank.overwriting
    return _giving_back(rank, index, lambda: run(slot, adds))


def _own(made: Tensor, given: Tensor) -> Tensor:
    """What a stage has made, copied where it is what the stage was given: a skip, or a change of shape, passes it on,
    and its owner uses the memory again as soon as this stage has done with it, whoever else still reads it."""
    passed_on = made.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return made.clone() if passed_on else made


def _giving_back(rank: Rank, index: int, run: Call) -> Call:
    """A backward that gives back the memory which it is the last to read."""
    keys, borrowed = rank.given_back[index], rank.borrowed

    def run_and_give_back() -> None:
        run()
        for key in keys:
            borrowed.pop(key).release()

    return run_and_give_back if keys else run


# -- update ----------------------------------------------------------------------------------------------


@runs("UPDATE")
def update(rank: Rank, action: Action, index: int) -> Call:
    """The optimizer's step on what this rank updates of a stage."""
    weights, gradient, state = rank.buffers.update_of(action)
    optimizer, step = rank.buffers.optimizer, rank.step
    if rank.captured is not None:
        return _capture(rank, action, gradient)
    before, each = 0, 1  # updates of this stage in a step: of the whole, though it may come in parts
    if rank.plan.holds != "all":
        before, each = (sum(a.kind == "UPDATE" and a.stage == action.stage for a in row)
                        for row in (rank.row[:index], rank.row))  # fmt: skip
    source = target = weights
    if rank.plan.stashed:
        source, target = (rank.copies[action.stage][i].flat_parameters for i in rank.weights_of[index])

    def apply() -> None:
        if step.skips and not math.isfinite(rank.buffers.squares):
            return  # as on every other rank: their squares are in the sum, or their gradient is the same
        rank.buffers.clean(action.stage)
        if target is not source:
            target.copy_(source)
        number = (step.number - step.skipped) * each + before
        optimizer.update(target, _clipped(rank, gradient), state, number, step.scale)

    return apply


def _capture(rank: Rank, action: Action, gradient: Tensor) -> Call:
    """Put what an UPDATE would apply where it belongs in the whole stage."""
    assert rank.captured is not None
    net = rank.buffers.stages[action.stage]
    whole = rank.captured.setdefault(action.stage, torch.full_like(net.flat_parameters, math.nan))
    bounds = action.part.bounds if action.part else rank.buffers.own_bounds
    low = bounds(net.flat_size)[0] if action.part or action.stage in rank.buffers.reduced else 0
    into = whole[low : low + len(gradient)]
    return lambda: torch.mul(_clipped(rank, gradient), rank.step.scale, out=into)


def _clipped(rank: Rank, gradient: Tensor) -> Tensor:
    """The gradient times the factor that clips it: a tensor, since the host does not wait for the norm."""
    clip = rank.buffers.optimizer.clip
    if clip is None:
        return gradient
    return gradient * clip_factor(rank.buffers.squares[0].sqrt() * rank.step.scale, clip)
