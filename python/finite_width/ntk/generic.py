"""Jacobians by autograd alone, for parameters with a use that was not recognised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._interrupts import closed_transforms
from .contract import Batch, Target, flatten
from .norms import NormsByFormula

# Rows whose gradients autograd computes at once, as a part of a block's: they exist twice, as autograd made them and in
# the block's Jacobian, and the sweep of a recurrent or normalised weight holds more beside them.
CHUNK_PART = 8


def _fill(out: Tensor, gradients: Sequence[Tensor | None], names: Sequence[str], target: Target) -> None:
    """Gradients of several parameters, side by side, into out [..., P]; a complex one as real and imaginary parts."""
    begin = 0
    for name, gradient in zip(names, gradients, strict=True):
        end = begin + target.width(name)
        if gradient is None:
            out[..., begin:end] = 0
        else:
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            if gradient.is_complex():
                gradient = torch.view_as_real(gradient.resolve_conj())
            out[..., begin:end] = gradient.detach().reshape(*out.shape[:-1], end - begin)
        begin = end


def _empty(target: Target, names: Sequence[str], rows: int, outputs: int) -> Tensor:
    width = sum(target.width(name) for name in names)
    return torch.empty((rows, outputs, width), dtype=target.dtype, device=target.device)


def vmapped(
    target: Target,
    batch: Batch,
    tensors: Sequence[Tensor],
    names: Sequence[str],
    outputs: int,
    chunk: int | None = None,
) -> Tensor:
    """[n, O, P] by vmap over rows and outputs of the vector-Jacobian product, `chunk` rows at a time: an eighth."""
    values = {name: target.parameters[name].detach() for name in names}
    cotangents = torch.eye(outputs, dtype=target.dtype, device=target.device)

    def single(*row: Tensor) -> tuple[Tensor, ...]:
        def function(values: dict[str, Tensor]) -> Tensor:
            with NormsByFormula():
                return target.run(batch, [value.unsqueeze(0) for value in row], values).reshape(-1)

        pull = torch.func.vjp(function, values)[1]
        (gradients,) = torch.func.vmap(pull)(cotangents)
        return tuple(gradients[name] for name in names)

    rows = tensors[0].shape[0]
    result = _empty(target, names, rows, outputs)
    chunk = chunk or -(-rows // CHUNK_PART)
    with torch.no_grad():  # the transform differentiates all the same; nothing else shall record a graph
        for begin in range(0, rows, chunk):
            part = slice(begin, begin + chunk)
            with closed_transforms():
                gradients = torch.func.vmap(single, randomness="error")(*(value[part] for value in tensors))
            _fill(result[part], gradients, names, target)
            del gradients  # before the next ones are made
    return result


def looped(target: Target, batch: Batch, tensors: Sequence[Tensor], names: Sequence[str], outputs: int) -> Tensor:
    """[n, O, P] by a loop of torch.autograd.grad over rows and outputs: the definition."""
    jacobian = _empty(target, names, tensors[0].shape[0], outputs)
    for row in range(tensors[0].shape[0]):
        result = single_row(target, batch, tensors, row)
        for index in range(outputs):
            gradient(target, result[0, index], names, jacobian[row, index])
    return jacobian


def single_row(target: Target, batch: Batch, tensors: Sequence[Tensor], row: int) -> Tensor:
    """The outputs [1, O] of a row, to be differentiated by autograd."""
    with NormsByFormula():
        return flatten(target.run(batch, [value[row : row + 1] for value in tensors]))


def gradient(target: Target, value: Tensor, names: Sequence[str], out: Tensor) -> None:
    """The gradient of one value by the parameters, into out [P]; its graph stays."""
    parameters = [target.parameters[name] for name in names]
    gradients: Sequence[Tensor | None] = [None] * len(parameters)
    if value.requires_grad:
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    _fill(out, gradients, names, target)
