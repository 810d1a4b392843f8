"""The |w|^p network: Φ = Σ over paths of Π|w_e|^p, as the output of the network on a ones input with |w|^p for w.

γ(w) = (∂Φ/∂|w|^p)^(2/p) then takes one backward pass. Everything is in float64 with batch 1 (an optimizer's
convolutions: convolution.py); values that leave 2^±200 are rescaled by a power of two, which their exponent remembers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._interrupts import closed_transforms, left_as_it_was
from . import reference
from .chain import norm_statistics
from .operations import path_weights
from .structure import Structure
from .walk import Walk

_RANGE = 200  # binary exponents that are left as they are
_LARGE = 500  # where a layer's own map is read off beside its constant


class Scaled(NamedTuple):
    """value · 2^exponent; the exponent is an int, or a whole float64 number that stays on the device."""

    value: Tensor
    exponent: int | Tensor = 0

    def to_exponent(self, exponent: int | Tensor) -> Tensor:
        if exponent is self.exponent:
            return self.value
        if isinstance(exponent, Tensor) or isinstance(self.exponent, Tensor):
            return self.value * reference.two_to(torch.as_tensor(self.exponent - exponent))
        if exponent == self.exponent:
            return self.value
        return self.value * math.ldexp(1.0, max(self.exponent - exponent, -1074))


class Edges(NamedTuple):
    """|w|^p of a view of a parameter, as the view of |w|^p: the parameter's paths are those of its views."""

    value: Tensor


def larger(one: int | Tensor, other: int | Tensor) -> int | Tensor:
    """The larger of two exponents."""
    if isinstance(one, Tensor):
        return torch.maximum(one, other) if isinstance(other, Tensor) else one.clamp_min(other)
    return other.clamp_min(one) if isinstance(other, Tensor) else max(one, other)


def two_to(exponent: int | Tensor) -> float | Tensor:
    """2^exponent."""
    return reference.two_to(exponent) if isinstance(exponent, Tensor) else math.ldexp(1.0, max(exponent, -1074))


def powered(param: Tensor, p: float) -> Tensor:
    """|w|^p in float64, differentiable."""
    w = param.to(torch.float64)
    if p == 2:
        return w * w
    return w.abs() if p == 1 or math.isinf(p) else w.abs() ** p


class PathSum(Walk):
    """Sums paths.

    Args:
        structure: the traced module.
        p: at least 1; inf, where maxima stand for sums, for Linear layers alone.
        power: parameter -> |w|^p.
        sigma: BatchNorm module -> the batch's standard deviation; running statistics where it has none.
        rescale: whether to keep values in range (not possible under torch.func transforms).
        on_device: exponents stay on the device, and nothing is read on the host.
    """

    def __init__(
        self,
        structure: Structure,
        p: float,
        power: Callable[[Tensor], Tensor],
        sigma: dict[Any, Tensor] | None = None,
        rescale: bool = True,
        on_device: bool = False,
    ) -> None:
        super().__init__(structure)
        self.on_device = on_device
        self.p, self.power, self.sigma, self.rescale = p, power, sigma or {}, rescale

    def total(self) -> Scaled:
        """Φ."""
        if self.structure.input_shape is None:
            raise ValueError(
                "input_shape is needed: the shape of one input without the batch axis, such as (3, 32, 32)"
            )
        device = next(self.structure.module.parameters()).device
        ones = torch.ones((1, *self.structure.input_shape), dtype=torch.float64, device=device)
        try:
            output = self.run(Scaled(ones))
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"input_shape {self.structure.input_shape} does not fit the model: {error}") from error
        while not isinstance(output, Scaled):
            if not isinstance(output, (tuple, list)) or len(output) != 1:
                raise ValueError("model must return one tensor; wrap it to return the one that is trained on")
            output = output[0]
        value = output.value
        return Scaled(value.max() if math.isinf(self.p) else value.sum(), output.exponent)

    def _in_range(self, x: Scaled) -> Scaled:
        if not self.rescale or x.value.numel() == 0:
            return x
        if self.on_device:
            moved = torch.frexp(x.value.detach().max()).exponent.to(torch.float64)
            moved = torch.where(moved.abs() <= _RANGE, 0.0, moved)
            return Scaled(x.value * reference.two_to(-moved), x.exponent + moved)
        shift = math.frexp(float(x.value.detach().max()))[1]  # sums of |w|^p: never negative
        if abs(shift) <= _RANGE:
            return x
        return Scaled(x.value * math.ldexp(1.0, -shift), x.exponent + shift)

    def _finite(self, what: str) -> None:
        if math.isinf(self.p):
            raise ValueError(f"p = ∞ is defined here for Linear layers alone, and the model has {what}")

    def _affine(
        self, x: Scaled, bias: Tensor | Edges | None, apply: Callable[[Tensor, Tensor | None], Tensor]
    ) -> Scaled:
        """A map that is linear in (x, bias): the bias enters at the exponent of x."""
        if bias is None:
            return self._in_range(Scaled(apply(x.value, None), x.exponent))
        exponent = larger(x.exponent, 0)
        edge = self.entering(bias, exponent)
        return self._in_range(Scaled(apply(self.aligned(x, exponent), edge), exponent))

    def aligned(self, x: Scaled, exponent: int | Tensor) -> Tensor:
        """The values of an activation at another one's exponent."""
        return x.to_exponent(exponent)

    def entering(self, bias: Tensor | Edges, exponent: int | Tensor) -> Tensor:
        """|b|^p, at the exponent of the activation that it joins."""
        return Scaled(self.edges(bias)).to_exponent(exponent)

    def reshape(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        first, *rest = args
        if not isinstance(first, (Scaled, Edges, Tensor)):
            return function(*args, **kwargs)
        result = function(first if isinstance(first, Tensor) else first.value, *rest, **kwargs)
        if not isinstance(result, Tensor):  # a size
            return result
        if isinstance(first, Scaled):
            return Scaled(result, first.exponent)
        return Edges(function(self.edges(first), *rest, **kwargs))

    def edges(self, weight: Tensor | Edges) -> Tensor:
        """|w|^p of a parameter, or of a view of one."""
        return weight.value if isinstance(weight, Edges) else self.power(weight)

    def add(self, x: Scaled, y: Scaled) -> Scaled:
        if not (isinstance(x, Scaled) and isinstance(y, Scaled)):
            raise ValueError("adding a constant or a parameter to an activation is not supported; use a layer's bias")
        exponent = larger(x.exponent, y.exponent)
        one, other = self.aligned(x, exponent), self.aligned(y, exponent)
        return Scaled(torch.maximum(one, other) if math.isinf(self.p) else one + other, exponent)

    def cat(self, values: list[Scaled], dim: int) -> Scaled:
        exponent = reduce(larger, [value.exponent for value in values])
        return Scaled(torch.cat([self.aligned(value, exponent) for value in values], dim), exponent)

    def reduce(self, how: str, x: Scaled, dims: tuple[int, ...], keepdim: bool) -> Scaled:
        self._finite(how)
        count = math.prod(x.value.shape[dim] for dim in dims) if how == "mean" else 1
        return Scaled(x.value.sum(dims, keepdim) * float(count) ** -self.p, x.exponent)

    def linear(self, x: Scaled, weight: Tensor | Edges, bias: Tensor | Edges | None) -> Scaled:
        edges = self.edges(weight)
        if not math.isinf(self.p):
            return self._affine(x, bias, lambda value, edge: F.linear(value, edges, edge))

        def largest(value: Tensor, edge: Tensor | None) -> Tensor:
            best = (value.unsqueeze(-2) * edges).amax(-1)
            return best if edge is None else torch.maximum(best, edge)

        return self._affine(x, bias, largest)

    def convolution(
        self, x: Scaled, weight: Tensor | Edges, bias: Tensor | Edges | None, function: Any, settings: dict[str, Any]
    ) -> Scaled:
        self._finite("a convolution")
        edges = self.edges(weight)
        return self._affine(x, bias, lambda value, edge: function(value, edges, edge, **settings))

    def batchnorm(self, x: Scaled, module: Any) -> Scaled:
        deviation, mean = norm_statistics(module, self.sigma)
        shape = (-1, *[1] * (x.value.dim() - 2))
        scale = reference.power(1 / deviation, self.p)
        if module.weight is not None:
            scale = scale * self.power(module.weight)
        exponent = x.exponent
        if mean is None and module.bias is None:
            return self._in_range(Scaled(x.value * scale.view(shape), exponent))
        exponent = larger(exponent, 0)
        if mean is None:
            edge = self.entering(module.bias, exponent).view(shape)
        else:  # one edge b − μ w/σ; its path counts for b, whose part of it has slope 1
            edge = self._folded_bias(module, deviation, mean, exponent).view(shape)
        value = self.aligned(x, exponent) * scale.view(shape)
        return self._in_range(Scaled(torch.maximum(value, edge) if math.isinf(self.p) else value + edge, exponent))

    def _folded_bias(self, module: Any, deviation: Tensor, mean: Tensor, exponent: int | Tensor) -> Tensor:
        weight = torch.ones_like(mean) if module.weight is None else module.weight.to(torch.float64)
        bias = torch.zeros_like(mean) if module.bias is None else module.bias.to(torch.float64)
        edge = Scaled(powered(bias - mean * weight / deviation, self.p)).to_exponent(exponent)
        if module.bias is None:
            return edge
        # With |b|^p given as a leaf (for γ), the edge moves with it at slope 1, as an edge of its own does.
        leaf = self.entering(module.bias, exponent)
        if leaf.requires_grad and leaf.is_leaf:
            return edge.detach() + (leaf - leaf.detach())
        return edge

    def _pool(self, x: Tensor, module: Any) -> Tensor:
        """Sums over the windows of a pooling layer."""
        rank = x.dim() - 2
        size, stride, padding = (_tuple(getattr(module, name), rank) for name in ("kernel_size", "stride", "padding"))
        shape = module(x).shape[2:] if module.ceil_mode else None  # it leaves out windows that begin in the padding
        # Padded here: torch's own average pools refuse a padding that their windows need in order to fit.
        x = F.pad(x, [each for width in reversed(padding) for each in (width, width)])
        if rank == 1:
            sums = F.avg_pool2d(x.unsqueeze(2), (1, *size), (1, *stride), 0, module.ceil_mode, True, 1).squeeze(2)
        else:
            average = F.avg_pool2d if rank == 2 else F.avg_pool3d
            sums = average(x, size, stride, 0, module.ceil_mode, True, 1)
        for axis, length in enumerate(shape or (), start=2):
            sums = sums.narrow(axis, 0, length)
        return sums

    def max_pool(self, x: Scaled, module: Any) -> Scaled:
        self._finite("pooling")
        return Scaled(self._pool(x.value, module), x.exponent)

    def average_pool(self, x: Scaled, module: Any) -> Scaled:
        self._finite("pooling")
        ones = torch.ones_like(x.value[:, :1])
        divisor = (self._pool(ones, module) / module(ones)).abs()  # what torch divides each window by
        return Scaled(self._pool(x.value, module) * divisor**-self.p, x.exponent)

    def adaptive_average(self, x: Scaled, module: Any, p: float | None = None) -> Scaled:
        self._finite("pooling")
        averaged = module(x.value)
        value = averaged
        dims = x.value.dim() - 2
        for axis, (size, pieces) in enumerate(zip(x.value.shape[2:], averaged.shape[2:], strict=True)):
            k = torch.arange(pieces, device=value.device)  # made there: a copy from the host would wait for the device
            window = (-(-(k + 1) * size // pieces) - k * size // pieces).to(torch.float64)
            value = value * (window ** (1 - (self.p if p is None else p))).view(-1, *[1] * (dims - 1 - axis))
        return Scaled(value, x.exponent)

    def adaptive_max(self, x: Scaled, module: Any) -> Scaled:
        kinds = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
        return self.adaptive_average(x, kinds[x.value.dim() - 2](module.output_size), p=0.0)

    def rnn(self, x: Scaled, module: nn.RNN) -> tuple[Scaled, Scaled]:
        self._finite("an RNN")
        self.check_batch_axis(x.value.shape, module)
        batch_axis = 0 if module.batch_first else 1
        sequence = [Scaled(step, x.exponent) for step in x.value.unbind(1 - batch_axis)]
        finals = []
        for layer in range(module.num_layers):
            sides = []
            for suffix in ("", "_reverse") if module.bidirectional else ("",):
                states = self._recurrence(sequence[::-1] if suffix else sequence, module, f"_l{layer}{suffix}")
                finals.append(states[-1])
                sides.append(states[::-1] if suffix else states)
            sequence = [self._together(list(both), -1, torch.cat) for both in zip(*sides, strict=True)]
        return self._together(sequence, 1 - batch_axis, torch.stack), self._together(finals, 0, torch.stack)

    def _recurrence(self, sequence: list[Scaled], module: nn.RNN, name: str) -> list[Scaled]:
        into, along = (self.power(getattr(module, f"weight_{side}{name}")) for side in ("ih", "hh"))
        biases = [getattr(module, f"bias_{side}{name}") for side in ("ih", "hh")] if module.bias else []
        states: list[Scaled] = []
        for step in sequence:
            state = Scaled(F.linear(step.value, into), step.exponent)
            if states:  # what enters late is a small part of the same weights' sums
                before = Scaled(F.linear(states[-1].value, along), states[-1].exponent)
                exponent = larger(state.exponent, before.exponent)
                state = Scaled(state.to_exponent(exponent) + before.to_exponent(exponent), exponent)
            for bias in biases:
                exponent = larger(state.exponent, 0)
                state = Scaled(state.to_exponent(exponent) + self.entering(bias, exponent), exponent)
            states.append(self._in_range(state))
        return states

    @staticmethod
    def _together(values: list[Scaled], dim: int, how: Callable[[list[Tensor], int], Tensor]) -> Scaled:
        """States of several steps, layers or directions in one; small ones may be lost beside large ones."""
        exponent = reduce(larger, [value.exponent for value in values])
        return Scaled(how([value.to_exponent(exponent) for value in values], dim), exponent)

    def protocol(self, x: Scaled, module: nn.Module) -> Scaled:
        self._finite(f"a {type(module).__name__}")
        names = path_weights(module) or ()
        edges = {name: self.power(module.get_parameter(name)) for name in names}

        def apply(value: Tensor, edges: dict[str, Tensor] = edges) -> Tensor:
            with left_as_it_was(module), closed_transforms():
                result: Tensor = torch.func.functional_call(module, edges, (value,))
            return result

        if not isinstance(x.exponent, Tensor) and x.exponent == 0:
            return self._in_range(Scaled(apply(x.value)))
        # What the layer makes of x is a map of x and a constant, its bias, which enters at an exponent of its own. The
        # map is their difference, taken where x is by far the larger one, and with edges of its own: in their gradients
        # the bias cancels before they meet those of the constant. Gradients themselves keep the size of x.
        moved = self._exponent_of(x.value) - _LARGE
        up, down = two_to(-moved), two_to(moved)
        inner = {name: _Moved.apply(edge, 1.0, down) for name, edge in edges.items()}  # type: ignore[no-untyped-call]
        nothing, large = torch.zeros_like(x.value), _Moved.apply(x.value, up, 1.0)  # type: ignore[no-untyped-call]
        mapped = _Moved.apply(apply(large, inner) - apply(nothing, inner), down, 1.0)  # type: ignore[no-untyped-call]
        return self.add(self._in_range(Scaled(mapped, x.exponent)), Scaled(apply(nothing)))

    def _exponent_of(self, values: Tensor) -> int | Tensor:
        """That of the power of two just above the largest value."""
        largest = values.detach().max()
        return torch.frexp(largest).exponent.to(torch.float64) if self.on_device else math.frexp(float(largest))[1]


class _Moved(torch.autograd.Function):
    """values · forward, whose gradient is multiplied by `backward` alone."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, forward: float | Tensor, backward: float | Tensor) -> Tensor:
        ctx.factors = forward, backward
        return values * forward

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient * ctx.factors[1], None, None


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)
