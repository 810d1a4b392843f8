"""Figures of a network's paths: the path norm, the max norm, and γ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from . import reference
from .arguments import path_power
from .chain import Dense, Norm, PathVectors, find_chain, no_update
from .masses import masses
from .network import PathSum, powered
from .spread import check_spread
from .structure import Structure, trace
from .walk import Walk


def path_norm(
    model: nn.Module,
    p: float = 2,
    *,
    input_shape: Sequence[int] | None = None,
    power: bool = False,
    log: bool = False,
) -> Tensor:
    """The path norm φ_p = Φ^(1/p), Φ = Σ over input-output paths of Π |w_e|^p (p = ∞: the largest Π |w_e|).

    Biases are edges from a unit that is always 1. BatchNorm counts with its running statistics: an edge w/σ and a
    bias edge b − μ w/σ. It is differentiable in the weights, so it can stand in a loss.

    Args:
        model: a module of operations that have paths (docs: pathsgd).
        p: at least 1; inf for networks of Linear layers.
        input_shape: one input's shape without the batch axis; inferred where the first layer is a Linear.
        power: return Φ.
        log: return the logarithm of φ_p (of Φ with power=True), which never leaves the range.

    Returns:
        A float64 scalar.

    Raises:
        ValueError: p < 1, an operation without paths, input_shape missing where it is needed; p > 8 and units of one
            layer too far apart for it.

    Source: Neyshabur, Tomioka, Srebro, "Norm-Based Capacity Control in Neural Networks" (2015).

    Example:
        >>> import torch, finite_width as fw
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(layer.weight, 3.0)
        >>> float(fw.pathsgd.path_norm(layer, p=1))
        6.0
    """
    p = path_power(p)
    _check.boolean("power", power)
    _check.boolean("log", log)
    structure = trace(model, input_shape)
    total = PathSum(structure, p, lambda param: powered(param, p)).total()
    check_spread(structure, p)
    root = 1.0 if power or math.isinf(p) else 1 / p
    if log:
        return (total.value.log() + total.exponent * math.log(2.0)) * root
    return _times_two_to(_root(total.value, root), float(total.exponent * root))


def _root(value: Tensor, root: float) -> Tensor:
    """value^root, whose slope at 0 counts as 0 (a zero-initialised head), as torch's norms have it."""
    if root == 1:
        return value
    no_path = value == 0
    return torch.where(no_path, 0.0, torch.where(no_path, 1.0, value) ** root)


def _times_two_to(values: Tensor, exponent: float) -> Tensor:
    """values · 2^exponent in two factors: the power alone may leave the range where the product does not."""
    half = math.floor(exponent / 2)
    for part in (half, exponent - half):
        values = values * 2.0 ** min(max(part, -1074.0), 1023.0)
    return values


def path_gamma(model: nn.Module, p: float = 2, *, input_shape: Sequence[int] | None = None) -> dict[str, Tensor]:
    """γ_p(w, e) of every parameter: what Path-SGD divides its gradient by.

    γ_p(w, e) = (Σ over paths through e of Π_{e' ≠ e} |w_e'|^p)^(2/p); p = ∞: the largest such product, squared.

    Args:
        model: a module of operations that have paths.
        p: at least 1; inf for chains of Linear layers.
        input_shape: one input's shape without the batch axis; inferred where the first layer is a Linear.

    Returns:
        {qualified parameter name: float64 tensor of the parameter's shape}; zeros where no path is.

    Raises:
        ValueError: as path_norm.

    Source: Neyshabur, Salakhutdinov, Srebro, "Path-SGD: Path-Normalized Optimization in Deep Neural Networks" (2015).

    Example:
        >>> import torch, finite_width as fw
        >>> fw.pathsgd.path_gamma(torch.nn.Linear(2, 1, bias=False))
        {'weight': tensor([[1., 1.]], dtype=torch.float64)}
    """
    p = path_power(p)
    structure = trace(model, input_shape)
    stages = find_chain(structure)
    by_tensor: dict[Tensor, Tensor] = {}
    check_spread(structure, p)
    if stages is not None:
        by_tensor = _chain_gamma(stages, p)
    elif math.isinf(p):
        raise ValueError("p = ∞ has a γ here for chains of Linear layers alone; use p = 1 or 2 for this model")
    else:
        found = masses(structure, p)
        for param, mass in found.dense().items():
            by_tensor[param] = _times_two_to(mass ** (2 / p), float(found.exponent_of(param) * 2 / p))
    return {
        name: by_tensor.get(param, torch.zeros_like(param, dtype=torch.float64)).detach()
        for name, param in _named(model, structure)
    }


def _named(model: nn.Module, structure: Structure) -> list[tuple[str, Tensor]]:
    """Names as the user's model has them."""
    inside = set(structure.module.parameters())
    return [(name, param) for name, param in model.named_parameters() if param in inside]


def _chain_gamma(stages: list[Dense | Norm], p: float) -> dict[Tensor, Tensor]:
    vectors = PathVectors(stages, p)
    with torch.no_grad():
        vectors.sweep(True, no_update)
        forward = [vector.clone() for vector in vectors.forward]
        vectors.sweep(False, no_update)
    power = 2.0 if math.isinf(p) else 2 / p
    found: dict[Tensor, Tensor] = {}

    def gamma(values: Tensor, exponent: Tensor) -> Tensor:
        return _times_two_to(values**power, float(exponent) * power)

    for index, stage in enumerate(stages):
        into, out = forward[index], vectors.backward[index + 1]
        if isinstance(stage, Dense):
            found[stage.weight] = gamma(torch.outer(out[:-1], into[:-1]), into[-1] + out[-1])
        elif stage.weight is not None:
            deviation = (stage.module.running_var.to(torch.float64) + stage.module.eps).sqrt()
            inside = into[:-1] * reference.power(1 / deviation, p)
            found[stage.weight] = gamma(out[:-1] * inside, into[-1] + out[-1])
        if stage.bias is not None:
            found[stage.bias] = gamma(out[:-1], out[-1])
    return found


class _IncomingNorms(Walk):
    """The p-norm of every unit's incoming weights, its bias among them."""

    def __init__(self, structure: Structure, p: float) -> None:
        super().__init__(structure)
        self.p = p
        self.found: list[Tensor] = []

    def _record(self, *parts: Tensor | None) -> None:
        rows = torch.cat([part.flatten(1) for part in parts if part is not None], 1).to(torch.float64)
        self.found.append(torch.linalg.vector_norm(rows, self.p, dim=1).max())

    def linear(self, x: Any, weight: Tensor, bias: Tensor | None) -> Any:
        rows = weight if weight.dim() > 1 else weight[None]  # F.linear takes a row without its axis
        self._record(rows, None if bias is None else bias.view(len(rows), 1))

    def convolution(self, x: Any, weight: Tensor, bias: Tensor | None, function: Any, settings: dict[str, Any]) -> Any:
        self.linear(x, weight, bias)

    def rnn(self, x: Any, module: nn.RNN) -> Any:
        names = [
            name.removeprefix("weight_ih") for name, _ in module.named_parameters() if name.startswith("weight_ih")
        ]
        for name in names:
            parts = [getattr(module, f"weight_{side}{name}") for side in ("ih", "hh")]
            biases = [getattr(module, f"bias_{side}{name}")[:, None] for side in ("ih", "hh") if module.bias]
            self._record(*parts, *biases)
        return None, None

    def batchnorm(self, x: Any, module: Any) -> Any:
        raise ValueError("max_norm is defined for networks without BatchNorm; fold it into its layer first")

    def protocol(self, x: Any, module: nn.Module) -> Any:
        raise ValueError(f"max_norm has no incoming weights per unit for a {type(module).__name__}")

    def reshape(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return (
            function(*args, **kwargs) if isinstance(args[0], Tensor) else None
        )  # a view of a weight, or an activation

    def _through(self, *args: Any) -> Any:
        return None

    add: Any = _through
    cat: Any = _through
    reduce: Any = _through
    max_pool: Any = _through
    average_pool: Any = _through
    adaptive_average: Any = _through
    adaptive_max: Any = _through


def max_norm(model: nn.Module, p: float = 2) -> Tensor:
    """μ_{p,∞}: the largest p-norm of the incoming weights of a unit (of a convolution's filter), bias included.

    With `balance_`, a chain of d Linear layers without biases and with one output has φ_p = μ^d.

    Args:
        model: a module of Linear layers, convolutions, ReLU RNNs and what connects them.
        p: at least 1, or inf.

    Returns:
        A float64 scalar, differentiable.

    Raises:
        ValueError: p < 1, an operation without paths, a layer without incoming weights per unit (BatchNorm).

    Source: Neyshabur, Tomioka, Srebro, "Norm-Based Capacity Control in Neural Networks" (2015), theorem 5.

    Example:
        >>> import torch, finite_width as fw
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(layer.weight, 3.0)
        >>> float(fw.pathsgd.max_norm(layer, p=1))
        6.0
    """
    walk = _IncomingNorms(trace(model), path_power(p))
    walk.run(None)
    if not walk.found:
        raise ValueError("model has no layer with incoming weights, hence no max norm")
    return torch.stack(walk.found).max()
