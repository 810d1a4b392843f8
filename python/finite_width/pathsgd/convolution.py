"""Path sums through a convolution in float32, with a power of two per channel in front of everything.

In float64 a batch-1 convolution runs at a small part of the machine's rate, so γ of a conv net would cost a quarter of
its training step. Float32 is exact enough, as all terms are positive and nothing cancels, and its range is enough once
every channel of F and of B, every row of the edges on the way forward and every column on the way back has its largest
value near 1: scaling a unit by a power of two then does not change one bit of what is summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WIDEST = 220  # times p: the span of exponents that float32 factors 2^(exponent / p) can bridge


def exponents(largest: Tensor, p: float) -> Tensor:
    """Binary exponents, in float64, of values that are not negative; 0 for zeros, even at p = 2."""
    found = torch.frexp(largest).exponent.to(torch.float64)
    found = torch.where(torch.isfinite(largest), found, 0.0)
    return found + found.remainder(2) if p == 2 else found


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64."""
    return torch.ldexp(torch.ones_like(exponent), exponent)


def level(exponent: Tensor, p: float) -> Tensor:
    """An exponent to take off all channels where float32 factors would not reach them; 0 in all but deep nets."""
    low, high = exponent.aminmax()
    centre = torch.maximum(2 * ((low + high) / 4).floor(), high - 110 * p)
    return torch.where(torch.maximum(high, -low) > 110 * p, centre, 0.0)


def _normalised(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^(−exponent) in float32."""
    return (x * power_of_two(-exponent)).float()


def _edges(weight: Tensor, channel: Tensor, window: int, p: float) -> tuple[Tensor, Tensor]:
    """|weight|^p 2^channel 2^(−p scale) in float32, and the scale, which brings each row or column near 1.

    Args:
        weight: [groups, O / groups, C / groups · window].
        channel: [groups, 1, C / groups · window], and the scale is [O], of the rows; or [groups, O / groups, 1], and
            it is [C], of the columns of a channel together.
    """
    # Below 2^-126 there is nothing next to the other channels.
    result = (weight * power_of_two((channel / p).clamp_min(-126.0)).float()).abs_()
    if channel.shape[1] == 1:
        scale = exponents(result.amax(2), 1.0)
        every = scale.unsqueeze(2)
    else:
        scale = exponents(result.amax(1).view(weight.shape[0], -1, window).amax(2), 1.0)
        every = scale.repeat_interleave(window, 1).unsqueeze(1)
    result.mul_(power_of_two(-every).float())
    return (result.mul_(result) if p == 2 else result), scale.flatten()


def _of_inputs(exponent: Tensor, groups: int, window: int) -> Tensor:
    """[1, C, 1...] as [groups, 1, C / groups · window]."""
    return exponent.view(groups, -1).repeat_interleave(window, 1).unsqueeze(1)


def bridged(x: Tensor, p: float) -> bool:
    """Whether the channels of x [1, C, ...] are near enough to each other."""
    largest = x.amax(tuple(range(2, x.dim())))
    exponent = torch.frexp(largest[largest > 0]).exponent
    return exponent.numel() == 0 or int(exponent.max() - exponent.min()) <= WIDEST * p


class PathConvolution(torch.autograd.Function):
    """F' = conv(F, |w|^p); backward, B = convᵀ(B', |w|^p) and the mass ∂Φ/∂|w|^p.

    Args:
        x: F, [1, C, ...], float64.
        stand_in: any float64 tensor of the weight's shape; its gradient is the mass.
        weight: [O, C / groups, ...], float32.
        p: 1 or 2.
        function, settings: torch's convolution and its stride, padding, dilation and groups.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stand_in: Tensor, weight: Tensor, p: float, function: Any, settings: dict[str, Any]
    ) -> Tensor:
        groups, space, window = settings["groups"], tuple(range(2, x.dim())), weight[0, 0].numel()
        exponent = exponents(x.amax(space, keepdim=True), p)  # [1, C, 1...]
        common = level(exponent, p)
        value = _normalised(x, exponent)
        flat = weight.view(groups, -1, weight.shape[1] * window)
        edges, scale = _edges(flat, _of_inputs(exponent, groups, window) - common, window, p)
        ctx.save_for_backward(value, exponent, weight)
        ctx.p, ctx.settings = p, settings
        result = function(value, edges.view_as(weight), None, **settings)
        return result.double().mul_(power_of_two(common + p * scale).view(1, -1, *[1] * len(space)))

    @staticmethod
    def backward(ctx: Any, known: Tensor) -> Any:  # type: ignore[override]
        value, exponent, weight = ctx.saved_tensors
        p, settings = ctx.p, ctx.settings
        groups, space, window = settings["groups"], tuple(range(2, known.dim())), weight[0, 0].numel()
        outer = exponents(known.amax(space, keepdim=True), p)  # [1, O, 1...]
        outputs, common = outer.view(groups, -1, 1), level(outer, p)
        upper = _normalised(known, outer)
        arguments = [_tuple(settings[name], len(space)) for name in ("stride", "padding", "dilation")]
        how = (None, *arguments, False, [0] * len(space), groups)
        flat = weight.view(groups, -1, weight.shape[1] * window)
        below = None
        if ctx.needs_input_grad[0]:
            edges, scale = _edges(flat, outputs - common, window, p)
            below = _backward(upper, value, edges.view_as(weight), *how, [True, False, False])[0].double()
            below.mul_(power_of_two(common + p * scale).view(1, -1, *[1] * len(space)))
        mass = _backward(upper, value, weight, *how, [False, True, False])[1].double().view_as(flat)
        mass.mul_(power_of_two(outputs)).mul_(power_of_two(_of_inputs(exponent, groups, window)))
        return below, mass.view_as(weight), None, None, None, None


_backward: Any = torch.ops.aten.convolution_backward


def _tuple(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value)
