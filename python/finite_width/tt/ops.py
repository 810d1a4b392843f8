"""The Tensor-Train product and its gradients as differentiable ops.

The product is linear in x and in each core, so every derivative is again a product or a gradient of one with an
argument replaced: the two functions below are closed under differentiation of any order.

The number of cores varies, and an autograd.Function sees only tensors that are arguments of their own, not lists; so
the Functions take the cores last, as `*cores`, and the ops take them as a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import reference

Cores = Sequence[Tensor]


def _fake_linear(x: Tensor, cores: Cores, bias: Tensor | None, plan: Sequence[int]) -> Tensor:
    in_cores = plan[5]
    columns = 1
    for core in cores[in_cores:]:  # with three axes, the output modes stand after the input modes
        columns *= core.shape[1]
    return x.new_empty(x.shape[0], columns)


def _fake_backward(grad: Tensor, x: Tensor, cores: Cores, plan: Sequence[int], needs: Sequence[int]) -> list[Tensor]:
    result = [x.new_empty(x.shape)] if needs[0] else []
    result += [core.new_empty(core.shape) for core in cores] if needs[1] else []
    return result + ([grad.new_empty(grad.shape[1:])] if needs[2] else [])


_linear_op = _library.register("tt_linear", reference.tt_linear, _fake_linear)
_backward_op = _library.register("tt_linear_backward", reference.tt_linear_backward, _fake_backward)


@_library.constant_while_tracing
def has_cuda_kernels() -> bool:
    """Whether tensors on a GPU take compiled kernels."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("finite_width::tt_linear", "CUDA"))


def _replaced(cores: Cores, place: int, value: Tensor) -> list[Tensor]:
    return [value if k == place else core for k, core in enumerate(cores)]


def _total(terms: Sequence[Tensor | None]) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, plan: Sequence[int], *cores: Tensor) -> Tensor:
        result: Tensor = _linear_op(x, cores, bias, plan)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.plan, *cores = inputs
        ctx.save_for_backward(x, *cores)
        ctx.save_for_forward(x, *cores)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *cores = ctx.saved_tensors
        needs_x, needs_bias, _, *needs_core = ctx.needs_input_grad
        dx, dcores, dbias = _gradients(grad, x, cores, ctx.plan, (needs_x, any(needs_core), needs_bias))
        return dx, dbias, None, *(d if need else None for d, need in zip(dcores, needs_core, strict=True))

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dbias: Tensor | None, _: None, *dcores: Tensor | None) -> Tensor:
        x, *cores = ctx.saved_tensors
        tangent = _total(_linear_terms(x, cores, ctx.plan, dx, dcores))
        if tangent is None:
            tangent = x.new_zeros(_fake_linear(x.to("meta"), cores, None, ctx.plan).shape)
        return tangent if dbias is None else tangent + dbias

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        x, bias, plan, *cores = args
        x_dim, bias_dim, _, *core_dims = in_dims
        return _map_linear(info.batch_size, (x, cores, bias, plan), (x_dim, core_dims, bias_dim, None))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(grad: Tensor, x: Tensor, plan: Sequence[int], needs: Sequence[int], *cores: Tensor) -> Any:
        return tuple(_backward_op(grad, x, cores, plan, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, x, ctx.plan, ctx.needs, *cores = inputs
        ctx.save_for_backward(grad, x, *cores)
        ctx.save_for_forward(grad, x, *cores)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, *cores = ctx.saved_tensors
        vx, vcores, vbias = _unpack(cotangents, ctx.needs, len(cores))
        dgrad, dx, dcores = _second_order(grad, x, cores, ctx.plan, vx, vcores, vbias)
        return dgrad, dx, None, None, *dcores

    @staticmethod
    def jvp(ctx: Any, tgrad: Tensor | None, tx: Tensor | None, _: None, __: None, *tcores: Tensor | None) -> Any:
        grad, x, *cores = ctx.saved_tensors
        needs_x, needs_cores, needs_bias = ctx.needs
        plan = ctx.plan
        dx: list[Tensor | None] = []
        dcores: list[list[Tensor | None]] = [[] for _ in cores]
        if tgrad is not None:
            part, parts, _bias = _gradients(tgrad, x, cores, plan, (needs_x, needs_cores, False))
            dx.append(part)
            for terms, term in zip(dcores, parts, strict=True):
                terms.append(term)
        if tx is not None and needs_cores:
            for terms, term in zip(dcores, _gradients(grad, tx, cores, plan, (False, True, False))[1], strict=True):
                terms.append(term)
        for k, tcore in enumerate(tcores):
            if tcore is None:
                continue
            part, parts, _bias = _gradients(grad, x, _replaced(cores, k, tcore), plan, (needs_x, needs_cores, False))
            dx.append(part)
            for place, (terms, term) in enumerate(zip(dcores, parts, strict=True)):
                terms.append(None if place == k else term)  # the gradient of a core does not depend on that core
        result: list[Tensor] = []
        if needs_x:
            result.append(_or_zeros(_total(dx), x))
        if needs_cores:
            result += [_or_zeros(_total(terms), core) for terms, core in zip(dcores, cores, strict=True)]
        if needs_bias:
            result.append(tgrad.sum(0) if tgrad is not None else torch.zeros_like(grad[0]))
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        grad, x, plan, needs, *cores = args
        grad_dim, x_dim, _, _, *core_dims = in_dims
        outputs, dims = _map_backward(
            info.batch_size, (grad, x, cores, plan, needs), (grad_dim, x_dim, core_dims, None, None)
        )
        return tuple(outputs), tuple(dims)


def _or_zeros(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


def _unpack(values: Sequence[Any], needs: Sequence[int], count: int) -> tuple[Any, list[Any], Any]:
    """(for x, for each core, for the bias) from what `tt_linear_backward` returns in order."""
    rest = list(values)
    for_x = rest.pop(0) if needs[0] else None
    for_cores = [rest.pop(0) for _ in range(count)] if needs[1] else [None] * count
    return for_x, for_cores, rest.pop(0) if needs[2] else None


def _linear_terms(
    x: Tensor, cores: Cores, plan: Sequence[int], dx: Tensor | None, dcores: Sequence[Tensor | None]
) -> list[Tensor]:
    """The terms of the product's derivative in the direction (dx, dcores)."""
    terms = [] if dx is None else [_linear(dx, cores, None, plan)]
    for k, dcore in enumerate(dcores):
        if dcore is not None:
            terms.append(_linear(x, _replaced(cores, k, dcore), None, plan))
    return terms


def _second_order(
    grad: Tensor,
    x: Tensor,
    cores: Cores,
    plan: Sequence[int],
    vx: Tensor | None,
    vcores: Sequence[Tensor | None],
    vbias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """The gradients of S = ⟨vx, dx⟩ + Σ ⟨vcore, dcore⟩ + ⟨vbias, dbias⟩ with respect to grad, x and the cores.

    S = ⟨grad, J⟩ where J is the derivative of the product in the direction (vx, vcores, vbias).
    """
    outputs: list[Tensor | None] = list(_linear_terms(x, cores, plan, vx, vcores))
    if vbias is not None:
        outputs.append(vbias.expand_as(grad))
    dx: list[Tensor | None] = []
    dcores: list[list[Tensor | None]] = [[] for _ in cores]
    if vx is not None:
        for terms, term in zip(dcores, _gradients(grad, vx, cores, plan, (False, True, False))[1], strict=True):
            terms.append(term)
    for k, vcore in enumerate(vcores):
        if vcore is None:
            continue
        part, parts, _ = _gradients(grad, x, _replaced(cores, k, vcore), plan, (True, True, False))
        dx.append(part)
        for place, (terms, term) in enumerate(zip(dcores, parts, strict=True)):
            terms.append(None if place == k else term)
    return _total(outputs), _total(dx), [_total(terms) for terms in dcores]


def _gradients(
    grad: Tensor, x: Tensor, cores: Cores, plan: Sequence[int], needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:
    """(for x, for each core, for the bias); None where not needed."""
    flags = [int(need) for need in needs]
    return _unpack(tt_linear_backward(grad, x, cores, plan, flags), flags, len(cores))


def _map_linear(size: int, args: tuple[Any, ...], in_dims: tuple[Any, ...]) -> tuple[Tensor, int]:
    """vmap of the product over (x, cores, bias)."""
    x, cores, bias, plan = args
    x_dim, core_dims, bias_dim, _ = in_dims
    if x_dim is None or any(dim is not None for dim in core_dims):  # a set of cores for each: plain torch maps it

        def one(x: Tensor, bias: Tensor | None, *cores: Tensor) -> Tensor:
            return reference.tt_linear(x, cores, bias, plan)

        return torch.vmap(one, (x_dim, bias_dim, *core_dims))(x, bias, *cores), 0
    rows = x.movedim(x_dim, 0)  # the batch joins the rows
    y = _linear(rows.reshape(-1, rows.shape[-1]), cores, None, plan).reshape(size, rows.shape[1], -1)
    if bias is None:
        return y, 0
    return y + (bias if bias_dim is None else bias.movedim(bias_dim, 0).unsqueeze(1)), 0


def _map_backward(size: int, args: tuple[Any, ...], in_dims: tuple[Any, ...]) -> tuple[list[Tensor], list[int]]:
    """vmap of the gradients, over (grad, x, cores): one set of gradients for each, in plain torch."""
    grad, x, cores, plan, needs = args
    grad_dim, x_dim, core_dims, *_ = in_dims

    def one(grad: Tensor, x: Tensor, *cores: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference.tt_linear_backward(grad, x, cores, plan, needs))

    outputs = torch.vmap(one, (grad_dim, x_dim, *core_dims))(grad, x, *cores)
    return list(outputs), [0] * len(outputs)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cores, _, ctx.plan = inputs
    ctx.save_for_backward(x, *cores)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *cores = ctx.saved_tensors
    needs_x, needs_core, needs_bias, _ = ctx.needs_input_grad
    dx, dcores, dbias = _gradients(grad, x, cores, ctx.plan, (needs_x, any(needs_core), needs_bias))
    return dx, dcores, dbias, None


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, cores, ctx.plan, ctx.needs = inputs
    ctx.save_for_backward(grad, x, *cores)


def _backward_backward(ctx: Any, cotangents: Sequence[Tensor]) -> tuple[Any, ...]:
    grad, x, *cores = ctx.saved_tensors
    vx, vcores, vbias = _unpack(cotangents, ctx.needs, len(cores))
    dgrad, dx, dcores = _second_order(grad, x, cores, ctx.plan, vx, vcores, vbias)
    return dgrad, dx, dcores, None, None


# For torch.compile, which refuses a Function with a jvp; and for a raw op that meets vmap inside a backward pass.
_library.derivatives(
    _linear_op,
    setup_context=_linear_setup,
    backward=_linear_backward,
    vmap=lambda info, in_dims, *args: _map_linear(info.batch_size, args, in_dims),
)
_library.derivatives(
    _backward_op,
    setup_context=_backward_setup,
    backward=_backward_backward,
    vmap=lambda info, in_dims, *args: _map_backward(info.batch_size, args, in_dims),
)


_apply_linear = _library.applied(_Linear)
_apply_backward = _library.applied(_Backward)


def _linear(x: Tensor, cores: Cores, bias: Tensor | None, plan: Sequence[int]) -> Tensor:
    if torch.compiler.is_compiling():
        result: Tensor = _linear_op(x, cores, bias, plan)
    elif _library.nothing_to_differentiate():
        result = _library.below_autograd(_linear_op, x, cores, bias, plan)
    else:
        result = _apply_linear(x, bias, plan, *cores)
    return result


def tt_linear_backward(
    grad: Tensor, x: Tensor, cores: Cores, plan: Sequence[int], needs: Sequence[int]
) -> list[Tensor]:
    """The gradients of Σ grad · (x Wᵀ + bias) with respect to x, each core and the bias.

    Args:
        grad: [B, M].
        x: [B, N], the same dtype and device.
        cores: [r_{k-1}, m_k, n_k, r_k] each, r_0 = r_d = 1; or three axes, see the plan.
        plan: as in `reference.Plan`.
        needs: three flags, for x, the cores and the bias.

    Returns:
        What is wanted, in order: [B, N]; one tensor for each core; [M].

    Raises:
        ValueError: grad and x that are not matrices of as many rows.
    """
    if x.dim() != 2 or grad.dim() != 2 or x.shape[0] != grad.shape[0]:
        raise ValueError(f"x must have shape [B, N] with the B of grad, {list(grad.shape)}; got {list(x.shape)}")
    if torch.compiler.is_compiling():
        return list(_backward_op(grad, x, cores, plan, needs))
    if _library.nothing_to_differentiate():
        return list(_library.below_autograd(_backward_op, grad, x, cores, plan, needs))
    return list(_apply_backward(grad, x, plan, needs, *cores))


def tt_linear(x: Tensor, cores: Cores, bias: Tensor | None, plan: Sequence[int]) -> Tensor:
    """x [B, N] -> x Wᵀ + bias [B, M], the way the plan says; the public function is `functional.tt_linear`."""
    return _linear(x, cores, bias, plan)
