"""Path sums through the convolutions of an optimizer's γ pass, by the wing's own ops.

γ of a convolution is never stored: the backward pass hands on F and B, and the update sums their products over the
positions where it needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .arguments import DTYPES
from .convolution_ops import (
    Window,
    path_convolution,
    path_convolution_backward_unchecked,
    path_convolution_update_unchecked,
)


class ConvolutionMass(NamedTuple):
    """∂Φ/∂|w|^p of a convolution's weight, as what it is made of.

    x: F at the input, [1, C, ...], float64.
    known: B at the output, [1, O, ...], float64.
    window: stride, padding, dilation, groups.
    """

    x: Tensor
    known: Tensor
    window: Window

    def dense(self, weight: Tensor) -> Tensor:
        """The mass of every element, float64, of the weight's shape."""
        edges = weight.detach().to(torch.float64)  # for its shape
        return reference.convolution_gradient(self.known, self.x, edges, *self.window, 1)

    def update(
        self, weight: Tensor, grad: Tensor, momentum: Tensor | None, exponent: Tensor, p: float, rates: Any, *rest: Any
    ) -> None:
        """The weight's step; rest: grad_scale, found_inf, lr."""
        sums, how = (self.x, self.known), (exponent, p, rates, *self.window, *rest)
        path_convolution_update_unchecked(weight, grad, momentum, *sums, *how)

    def to(self, device: torch.device) -> ConvolutionMass:
        """A copy on a device."""
        return self._replace(x=self.x.to(device).clone(), known=self.known.to(device).clone())


def window_of(x: Tensor, weight: Tensor, settings: dict[str, Any]) -> Window | None:
    """The ops' stride, padding, dilation and groups, or None where they do not apply.

    Args:
        x: [N, C, ...], float64.
        weight: [O, C / groups, ...].
        settings: those of torch's convolutions, as far as they are given.
    """
    settings = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | settings
    if x.shape[0] != 1 or weight.dtype not in DTYPES or isinstance(settings["padding"], str):
        return None
    stride, padding, dilation = (_tuple(settings[name], x.dim() - 2) for name in ("stride", "padding", "dilation"))
    return stride, padding, dilation, settings["groups"]


class PathConvolution(torch.autograd.Function):
    """F' = conv(F, |w|^p); backward, B = convᵀ(B', |w|^p), and (F, B') goes to `found`.

    Args:
        x: F, [1, C, ...], float64.
        anchor: any float64 tensor that requires a gradient, so that backward runs; it gets none.
        weight: [O, C / groups, ...], detached.
        p: at least 1, finite.
        window: stride, padding, dilation, groups.
        found: called with the ConvolutionMass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weight: Tensor,
        p: float,
        window: Window,
        found: Callable[[ConvolutionMass], None],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.p, ctx.window, ctx.found = p, window, found
        return path_convolution(x, weight, p, *window)

    @staticmethod
    def backward(ctx: Any, known: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        ctx.found(ConvolutionMass(x, known, ctx.window))
        below = None
        if ctx.needs_input_grad[0]:
            below = path_convolution_backward_unchecked(known, x, weight, ctx.p, ctx.window)
        return below, None, None, None, None, None


def _tuple(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value)
