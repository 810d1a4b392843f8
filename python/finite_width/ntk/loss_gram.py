"""Inner products of per-example loss gradients: the empirical NTK of the loss itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .. import _check
from .contract import Batch, Inputs, Target, refuse_training_modules
from .empirical import empirical_ntk
from .fingerprint import describe_function

LossFunction = Callable[[Any, Tensor], Tensor]

# The keyword under which targets travel beside inputs that are keywords themselves.
_TARGET = "finite_width_target"


class _Losses(nn.Module):
    """The model followed by its loss: inputs and targets of n rows to n losses."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def extra_repr(self) -> str:
        return f"loss={describe_function('loss_fn', self.loss_fn)}"

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        if _TARGET in named:
            target = named.pop(_TARGET)
        else:
            *rest, target = inputs
            inputs = tuple(rest)
        losses = self.loss_fn(self.model(*inputs, **named), target)
        if not isinstance(losses, Tensor):
            raise TypeError(f"loss_fn must return a tensor, got {type(losses).__name__}")
        if losses.shape != target.shape[:1]:
            raise ValueError(
                f"loss_fn must return one loss per row, shape [{target.shape[0]}], got {list(losses.shape)}; "
                "use reduction='none' and sum or average over positions, never over rows"
            )
        return losses


def _with_targets(name: str, x: Inputs, y_name: str, y: Tensor) -> Inputs:
    """Inputs and targets as one batch, in the structure of the inputs."""
    _check.is_tensor(y_name, y)
    first = x if isinstance(x, Tensor) else next(iter(x.values() if isinstance(x, Mapping) else x), None)
    if not isinstance(first, Tensor):
        raise TypeError(f"{name} must be a tensor, or a tuple or dict of tensors, got {type(x).__name__}")
    if y.dim() == 0 or (first.dim() > 0 and y.shape[0] != first.shape[0]):
        rows = first.shape[0] if first.dim() else 0
        raise ValueError(f"{y_name} must have one target per row of {name}: [{rows}, ...], got {list(y.shape)}")
    if isinstance(x, Mapping):
        return {**x, _TARGET: y}
    return (*x, y) if isinstance(x, tuple) else (x, y)


def _check_kinds(target: Target, x1: Inputs, y1: Tensor, x2: Inputs | None, y2: Tensor | None) -> None:
    """Refuse here what the kernel of model and loss together would refuse by names that the user never gave."""
    refuse_training_modules(target.model)
    for name, y in (("y1", y1), *([("y2", y2)] if x2 is not None else [])):
        _check.is_tensor(name, y)
    pairs = [(Batch("x1", x1), Batch("y1", y1)), *([(Batch("x2", x2), Batch("y2", y2))] if x2 is not None else [])]
    for batch in (batch for pair in pairs for batch in pair):
        target.check_batch(batch)
    for inputs, targets in pairs[1:]:
        inputs.check_like(pairs[0][0])
        targets.check_like(pairs[0][1])


def loss_gram(
    model: nn.Module,
    loss_fn: LossFunction,
    x1: Inputs,
    y1: Tensor,
    x2: Inputs | None = None,
    y2: Tensor | None = None,
    *,
    params: Mapping[str, Tensor] | None = None,
    out: Any = None,
    memory_budget: int | None = None,
    progress: bool = False,
    check: bool = True,
) -> Any:
    r"""Inner products of per-example loss gradients, G[n, m] = Σ_p ∂ℓ(f(x1_n), y1_n)/∂θ_p ∂ℓ(f(x2_m), y2_m)/∂θ_p.

    Exact, on the engine of `empirical_ntk` with the loss as the only output: per-example gradients are formed only
    where that is cheaper than the products over positions. For data attribution and the natural gradient in sample
    space.

    Args:
        model: see `empirical_ntk`.
        loss_fn: (model's result for n rows, their targets) to n losses [n], such as
            `functools.partial(F.cross_entropy, reduction="none")`. If it is a module, its own parameters with
            requires_grad count like the model's, under the names loss_fn.…; freeze them to leave them out.
        x1: [N, ...], or a tuple or dict of tensors that share their first axis.
        y1: [N, ...], the targets; floating-point ones in the parameters' dtype.
        x2: [M, ...] likewise; None stands for x1, and computes half of the (exactly symmetric) matrix.
        y2: [M, ...]; None with x2, and only then.
        params: see `empirical_ntk`, as for the following arguments.
        out: where the matrix is written instead of memory.
        memory_budget: bytes of working memory.
        progress: show a progress bar.
        check: test on a few rows that rows do not mix and that nothing is random.

    Returns:
        [N, M], in the parameters' dtype; or `out`, as `empirical_ntk` returns it.

    Raises:
        ValueError: a loss that is not one per row, targets that do not fit the rows; see `empirical_ntk`.
        TypeError: see `empirical_ntk`.

    Source: ghost inner products: Goodfellow, "Efficient per-example gradient computations" (2015); Li, Tramèr, Liang
    and Hashimoto, "Large language models can be strong differentially private learners" (2022).

    Example:
        >>> import functools, torch, finite_width as fw
        >>> model = torch.nn.Linear(3, 4)
        >>> loss = functools.partial(torch.nn.functional.cross_entropy, reduction="none")
        >>> fw.ntk.loss_gram(model, loss, torch.randn(5, 3), torch.randint(4, (5,))).shape
        torch.Size([5, 5])
    """
    _check.is_module("model", model)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of outputs and targets, got {type(loss_fn).__name__}")
    if (x2 is None) != (y2 is None):
        missing, given = ("x2", "y2") if x2 is None else ("y2", "x2")
        raise ValueError(f"{missing} must be given with {given}")
    _check_kinds(Target(model, params, None), x1, y1, x2, y2)
    left = _with_targets("x1", x1, "y1", y1)
    right = None if x2 is None or y2 is None else _with_targets("x2", x2, "y2", y2)
    if isinstance(params, Mapping):
        params = {f"model.{name}": value for name, value in params.items()}
    return empirical_ntk(
        _Losses(model, loss_fn),
        left,
        right,
        compute="trace",
        params=params,
        memory_budget=memory_budget,
        progress=progress,
        out=out,
        check=check,
    )
