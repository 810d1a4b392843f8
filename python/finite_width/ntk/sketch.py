"""Random projections of per-example gradients, layer by layer: a model's features for kernels too large to be exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .._interrupts import ends_its_contexts
from .contract import Batch, Inputs, Target, preserved
from .plan import Plan
from .problem import Problem, progress_bar
from .projections import KINDS, Projection, add_outer, add_rows, add_tokens
from .sweep import Rows, arrange, generic_jacobians

# Values of a convolution's per-example gradients held at once.
_TILE = 1 << 22


@ends_its_contexts
def sketch(
    model: nn.Module,
    x: Inputs,
    dim: int,
    *,
    kind: str = "countsketch",
    seed: int = 0,
    params: Mapping[str, Tensor] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
    check: bool = True,
) -> Tensor:
    r"""Random projections of per-example gradients, s[n, o] = S ∂f_o(x_n)/∂θ, whose inner products estimate the NTK.

    E[s(x1)[n, a] · s(x2)[m, b]] = Θ[n, m, a, b], with an error that falls as 1/√dim. Neither S nor, for dense
    layers and embeddings, the gradients are formed: a dense layer's gradient is d ⊗ a, whose projection follows from
    random features of d and of a. The cost is linear in the number of rows.

    Args:
        model: see `empirical_ntk`.
        x: [N, ...], or a tuple or dict of tensors that share their first axis.
        dim: length of a sketch; beyond a few times the number of parameters it saves nothing.
        kind: "countsketch": hashed buckets with signs, combined by Fourier transforms; the cheapest. "gaussian":
            column k is u_k ⊗ v_k with normal u_k and v_k, per parameter. "srht": signs, Hadamard transforms and
            random coordinates.
        seed: of the projection. Sketches are comparable for the same model, dim, kind and seed; the projection
            depends on nothing else, so that ranks and devices agree.
        params: see `empirical_ntk`.
        output: see `empirical_ntk`.
        progress: show a progress bar.
        check: see `empirical_ntk`.

    Returns:
        [N, O, dim], in the parameters' dtype.

    Raises:
        ValueError: an unknown kind, dim below 1; see `empirical_ntk`.
        TypeError: see `empirical_ntk`.

    Source: random projections of gradients for data attribution: Park, Georgiev, Ilyas, Leclerc and Madry, "TRAK:
    Attributing model behavior at scale" (2023).

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> features = fw.ntk.sketch(model, torch.randn(5, 3), 64)
        >>> features.shape
        torch.Size([5, 2, 64])
        >>> torch.einsum("nad,mbd->nmab", features, features).shape  # about fw.ntk.empirical_ntk(model, x)
        torch.Size([5, 5, 2, 2])
    """
    _check.positive_int("dim", dim)
    _check.one_of("kind", kind, tuple(KINDS))
    _check.integer("seed", seed)
    dim, seed = int(dim), int(seed)
    problem = Problem(
        model,
        x,
        None,
        compute="diagonal",
        method="auto",
        params=params,
        output=output,
        memory_budget=None,
        progress=progress,
        check=check,
    )
    target = problem.target
    projection = KINDS[kind](dim, seed, target.dtype, target.device)

    def sketched(plan: Plan) -> Tensor:
        result = torch.empty(problem.left.rows, plan.outputs, dim, dtype=target.dtype, device=target.device)
        blocks, _ = problem.blocks(plan)
        with progress_bar(progress, len(blocks), "sketch") as advance:
            for begin, end in blocks:
                result[begin:end] = _block(projection, target, plan, problem.left, begin, end, check)
                advance(1)
        return result

    with preserved(model):
        return problem.with_plan(sketched)


def _block(
    projection: Projection, target: Target, plan: Plan, batch: Batch, begin: int, end: int, check: bool
) -> Tensor:
    """The sketches [n, O, dim] of rows [begin, end)."""
    total = projection.start(end - begin, plan.outputs)
    arranged = arrange(target, plan, batch, begin, end, check and begin == 0)
    generic = set(plan.generic)
    with torch.no_grad():
        for index in sorted(arranged.uses):
            uses = arranged.uses[index]
            for role, name in (("weight", uses.use.weight), ("bias", uses.use.bias)):
                if name in target.parameters and name not in generic:
                    _add_use(projection, total, name, target.parameters[name], uses, role)
        for entry in plan.entries:
            if entry.method == "made":
                name = entry.names[0]
                through = arranged.made_jacobian(plan, name, target.parameters[name], entry.roles)
                if through is not None:
                    _add_jacobian(projection, total, name, target.parameters[name], through)
    if generic:
        entries = [entry for entry in plan.entries if not entry.roles]
        jacobians = generic_jacobians(target, plan, batch, batch.take(begin, end, plan.copies_inputs))
        for entry, jacobian in zip(entries, jacobians, strict=True):
            widths = [target.width(name) for name in entry.names]
            for name, part in zip(entry.names, jacobian.j.split(widths, 2), strict=True):
                _add_jacobian(projection, total, name, target.parameters[name], part)
    return projection.finish(total)


def _add_jacobian(projection: Projection, total: Tensor, name: str, parameter: Tensor, jacobian: Tensor) -> None:
    """Add a parameter's Jacobian [n, O, P]."""
    size = _rows_of(parameter)
    add_rows(projection, total, name, jacobian.unflatten(2, (size or 1, -1)), 0, size)


def _rows_of(parameter: Tensor) -> int | None:
    """R of the parameter seen as a matrix [R, W]; None for a vector, which is one row."""
    return parameter.shape[0] if parameter.dim() > 1 else None


def _add_use(projection: Projection, total: Tensor, name: str, parameter: Tensor, rows: Rows, role: str) -> None:
    """Add one use's part of the gradient, by its structure."""
    use, matrix_rows = rows.use, _rows_of(parameter)
    size = matrix_rows or 1
    if use.kind == "dense" and rows.delta is None:  # the output layer, whose cotangents are the identity
        identity = torch.eye(total.shape[1], dtype=projection.dtype, device=total.device)[None, :, None]
        if role == "weight":
            a = rows.inputs().reshape(rows.rows, 1, -1)
            add_outer(projection, total, name, identity, a, use.options["flipped"])
        else:
            add_rows(projection, total, name, identity.expand(rows.rows, -1, -1, -1), 0, matrix_rows)
    elif use.kind == "dense" and role == "weight":
        a, d = rows.dense()
        add_outer(projection, total, name, d, a, use.options["flipped"])
    elif use.kind == "embedding":
        add_tokens(projection, total, name, *rows.tokens(), size)
    elif use.kind in ("conv", "conv_transpose") and role == "weight":
        each = parameter.numel() // size
        groups = use.options["geometry"][-1]
        unit = size // groups if groups > 1 else 1
        step = max(unit, _TILE // (total.shape[0] * total.shape[1] * each) // unit * unit)
        inputs = rows.conv()
        for first in range(0, size, step):
            gradients = inputs.gradients(first, min(first + step, size))
            add_rows(projection, total, name, gradients.unflatten(2, (-1, each)), first, matrix_rows)
    else:
        add_rows(projection, total, name, rows.jacobian(role).unflatten(2, (size, -1)), 0, matrix_rows)
