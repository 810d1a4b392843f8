"""Other ways to the empirical NTK in plain torch, for benchmarks/ntk.py: each as good as it can be in few lines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def jacobians(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """torch.func: the Jacobian [N, O, *shape] of every parameter by vmap(jacrev)."""
    params = {name: value.detach() for name, value in model.named_parameters()}

    def one_row(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (row[None],))[0]

    return torch.func.vmap(torch.func.jacrev(one_row), (None, 0))(params, x)


def contract(first: dict[str, Tensor], second: dict[str, Tensor], compute: str) -> Tensor:
    """The products of two batches' Jacobians, parameter by parameter."""
    formula = {"full": "nap,mbp->nmab", "diagonal": "nap,map->nma", "trace": "nap,map->nm"}[compute]
    return sum(torch.einsum(formula, first[name].flatten(2), second[name].flatten(2)) for name in first)


def contraction(model: nn.Module, x1: Tensor, x2: Tensor, compute: str) -> Tensor:
    """torch.func: the Jacobians of both batches, contracted."""
    return contract(jacobians(model, x1), jacobians(model, x2), compute)


def tiled_contraction(model: nn.Module, x1: Tensor, x2: Tensor, compute: str, rows: int) -> Tensor:
    """The same in tiles of so many rows, of which two Jacobians fit the memory."""
    found = []
    for one in x1.split(rows):
        first = jacobians(model, one)
        found.append(torch.cat([contract(first, jacobians(model, two), compute) for two in x2.split(rows)], 1))
        del first  # before the next ones are made
    return torch.cat(found)


def vector_products(model: nn.Module, x1: Tensor, x2: Tensor, compute: str) -> Tensor:
    """torch.func: the kernel's columns as Jacobian-vector products of vector-Jacobian products, for each pair."""
    params = {name: value.detach() for name, value in model.named_parameters()}

    def pair(one: Tensor, two: Tensor) -> Tensor:
        def first(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, values, (one[None],))[0]

        def second(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, values, (two[None],))[0]

        value, pull = torch.func.vjp(second, params)

        def column(cotangent: Tensor) -> Tensor:
            return torch.func.jvp(first, (params,), pull(cotangent))[1]

        return torch.func.vmap(column, out_dims=1)(torch.eye(len(value), dtype=value.dtype))

    blocks = torch.func.vmap(torch.func.vmap(pair, (None, 0)), (0, None))(x1, x2)
    if compute == "full":
        return blocks
    diagonal = blocks.diagonal(dim1=2, dim2=3)
    return diagonal if compute == "diagonal" else diagonal.sum(-1)


class _Factors:
    """The inputs and output cotangents of every Linear and Conv2d of a model, from one forward and one backward."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        inputs: dict[nn.Module, Tensor] = {}
        outputs: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, args: tuple[Tensor], result: Tensor) -> None:
            inputs[module], outputs[module] = args[0].detach(), result

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        try:
            result = model(x)
        finally:
            for hook in hooks:
                hook.remove()
        rows, count = result.shape
        unit = torch.eye(count, dtype=x.dtype)[:, None].expand(count, rows, count)
        ends = [outputs[layer] for layer in layers]
        if count == 1:
            found = [value[None] for value in torch.autograd.grad(result, ends, unit[0])]
        else:
            found = torch.autograd.grad(result, ends, unit, is_grads_batched=True)
        # Per layer: input [N, ...] and cotangents [N, O, ...].
        self.layers = [
            (layer, inputs[layer], delta.transpose(0, 1)) for layer, delta in zip(layers, found, strict=True)
        ]


def structured(model: nn.Module, x1: Tensor, x2: Tensor, compute: str) -> Tensor:
    """Structured derivatives: (a aᵀ + 1)(δ δᵀ) for Linear, unfolded per-example gradients for Conv2d."""
    total: Tensor | float = 0.0
    for (layer, a1, d1), (_, a2, d2) in zip(_Factors(model, x1).layers, _Factors(model, x2).layers, strict=True):
        if isinstance(layer, nn.Linear):
            inner = a1 @ a2.t()
            if layer.bias is not None:
                inner += 1
            products = _products(d1, d2, compute)
            total = total + products * inner.reshape(*inner.shape, *[1] * (products.dim() - 2))
        else:
            total = total + _products(_conv_gradients(layer, a1, d1), _conv_gradients(layer, a2, d2), compute)
            if layer.bias is not None:
                total = total + _products(d1.sum((3, 4)), d2.sum((3, 4)), compute)
    assert isinstance(total, Tensor)
    return total


def _products(j1: Tensor, j2: Tensor, compute: str) -> Tensor:
    """Inner products of [N, O, P] and [M, O, P]."""
    (rows, outputs), columns = j1.shape[:2], j2.shape[0]
    if compute == "full":
        whole = j1.reshape(rows * outputs, -1) @ j2.reshape(columns * outputs, -1).t()
        return whole.reshape(rows, outputs, columns, outputs).transpose(1, 2)
    if compute == "diagonal":
        return torch.bmm(j1.transpose(0, 1), j2.permute(1, 2, 0)).permute(1, 2, 0)
    return j1.reshape(rows, -1) @ j2.reshape(columns, -1).t()


def _conv_gradients(layer: nn.Conv2d, a: Tensor, d: Tensor) -> Tensor:
    """Per-example gradients [N, O, Cout · Cin · kernel]."""
    unfolded = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [N, Cin · kernel, T]
    rows, outputs, channels = d.shape[:3]
    product = torch.bmm(d.reshape(rows, outputs * channels, -1), unfolded.transpose(1, 2))
    return product.reshape(rows, outputs, -1)
