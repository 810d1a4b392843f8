"""Backward sweeps: several cotangents of a model's outputs, pulled back to places in its graph at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._interrupts import closed_transforms
from .capture import Use
from .made import Made


def output_weights(flat: Tensor) -> Tensor:
    """[O], values without a simple relation to each other, so that no sum over outputs weighted by them cancels."""
    return 1 + torch.arange(1, flat.shape[-1] + 1, dtype=flat.dtype, device=flat.device).sin() / 2


def pull(
    flat: Tensor | GradientEdge, edges: Sequence[Any], cotangents: Tensor, *, batched: bool, keep: bool = True
) -> list[Tensor | None]:
    """The cotangents [k, *shape] at the edges for k cotangents [k, n, O] of the outputs; None where none arrives.

    The same from any other place in the graph and cotangents there.

    Args:
        batched: one sweep for all.
        keep: the graph serves again; else a single sweep frees what it has passed.
    """
    keep = keep or batched or len(cotangents) > 1

    def single(cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(flat, edges, cotangent, retain_graph=keep, allow_unused=True)

    results: list[Tensor | None] = [None] * len(edges)
    if batched:
        present: list[int] = []

        def reached(cotangent: Tensor) -> tuple[Tensor, ...]:
            values = single(cotangent)
            present[:] = [place for place, value in enumerate(values) if value is not None]
            return (cotangent, *(value for value in values if value is not None))

        with closed_transforms():
            stacked = torch.func.vmap(reached)(cotangents)[1:]
        for place, value in zip(present, stacked, strict=True):
            results[place] = value.detach()
    else:
        each = [single(cotangent) for cotangent in cotangents]
        for place, column in enumerate(zip(*each, strict=True)):
            if column[0] is not None:
                found = [value.detach() for value in column if value is not None]
                results[place] = torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)
    return results


def through_made(made: Made, jacobian: Tensor, parameter: Tensor, batched: bool) -> Tensor:
    """The Jacobian [n, O, P] of a parameter through a value made from it, by the value's own [n, O, V]."""
    lead = jacobian.shape[:2]
    (found,) = pull(made.edge, [parameter], jacobian.reshape(-1, *made.value.shape), batched=batched)
    return jacobian.new_zeros(*lead, parameter.numel()) if found is None else found.reshape(*lead, -1)


def cotangents(uses: Sequence[Use], flat: Tensor, batched: bool, keep: bool = False) -> list[Tensor]:
    """δ [O, *output's shape] of each use: the cotangents of all outputs [n, O], in one backward sweep where batched."""
    rows, outputs = flat.shape
    if not uses or flat.grad_fn is None:
        return [flat.new_zeros(outputs, *use.shape) for use in uses]
    unit = torch.eye(outputs, dtype=flat.dtype, device=flat.device)[:, None, :].expand(outputs, rows, outputs)
    results = pull(flat, [use.edge for use in uses], unit, batched=batched and outputs > 1, keep=keep)
    return [
        flat.new_zeros(outputs, *use.shape) if value is None else value.reshape(outputs, *use.shape)
        for use, value in zip(uses, results, strict=True)
    ]
