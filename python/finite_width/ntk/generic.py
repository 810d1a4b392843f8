"""Jacobians by autograd alone, for parameters with a use that was not recognised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import Batch, Target, flatten


def _columns(gradients: Sequence[Tensor | None], names: Sequence[str], target: Target, lead: tuple[int, ...]) -> Tensor:
    """Gradients of several parameters side by side: [*lead, P]; a complex one counts its real and imaginary parts."""
    parts = []
    for name, gradient in zip(names, gradients, strict=True):
        parameter = target.parameters[name]
        if gradient is None:
            gradient = parameter.new_zeros((*lead, *parameter.shape))
        if gradient.is_complex():
            gradient = torch.view_as_real(gradient.resolve_conj())
        parts.append(gradient.detach().reshape(*lead, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def vmapped(
    target: Target, batch: Batch, tensors: Sequence[Tensor], names: Sequence[str], outputs: int, chunk: int
) -> Tensor:
    """[n, O, P] by vmap over rows and outputs of the vector-Jacobian product.

    Args:
        chunk: rows at once.
    """
    values = {name: target.parameters[name].detach() for name in names}
    cotangents = torch.eye(outputs, dtype=target.dtype, device=target.device)

    def single(*row: Tensor) -> tuple[Tensor, ...]:
        def function(values: dict[str, Tensor]) -> Tensor:
            return target.run(batch, [value.unsqueeze(0) for value in row], values).reshape(-1)

        pull = torch.func.vjp(function, values)[1]
        (gradients,) = torch.func.vmap(pull)(cotangents)
        return tuple(gradients[name] for name in names)

    with torch.no_grad():  # the transform differentiates all the same; nothing else shall record a graph
        gradients = torch.func.vmap(single, randomness="error", chunk_size=chunk)(*tensors)
    return _columns(gradients, names, target, (tensors[0].shape[0], outputs))


def looped(target: Target, batch: Batch, tensors: Sequence[Tensor], names: Sequence[str], outputs: int) -> Tensor:
    """[n, O, P] by a loop of torch.autograd.grad over rows and outputs: the definition."""
    parameters = [target.parameters[name] for name in names]
    rows = []
    for row in range(tensors[0].shape[0]):
        result = flatten(target.run(batch, [value[row : row + 1] for value in tensors]))
        each = []
        for index in range(outputs):
            gradients: Sequence[Tensor | None] = [None] * len(parameters)
            if result.requires_grad:
                gradients = torch.autograd.grad(result[0, index], parameters, retain_graph=True, allow_unused=True)
            each.append(_columns(gradients, names, target, ()))
        rows.append(torch.stack(each))
    return torch.stack(rows)
