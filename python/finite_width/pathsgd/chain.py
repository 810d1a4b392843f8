"""Chains of Linear, BatchNorm and ReLU-like layers: the path vectors F and B, and sweeps that update on the way.

F_l = |W_l|^p F_{l−1} + |b_l|^p and B_{l−1} = |W_l|^pᵀ B_l. A step in forward order knows B from the step before and
carries F of the old weights (for γ) and of the new ones (for the next step, which then runs backward): three passes
over weight-sized arrays, as plain SGD makes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .arguments import UNCHANGED
from .operations import IDENTITY_FUNCTIONS, IDENTITY_METHODS, IDENTITY_MODULES
from .ops import path_sweep_unchecked
from .structure import Structure, attribute
from .walk import Walk

Rates = tuple[float, float, float, float, float]
# Gradient, momentum buffer, rates, and lr and keep where they stand on the device.
Given = tuple[Tensor, Tensor | None, Rates, Tensor | None]
# What a sweep needs of a parameter; None leaves the parameter as it is.
Supply = Callable[[Tensor], Given | None]
# grad_scale and found_inf of a GradScaler.
Scaling = tuple[Tensor | None, Tensor | None]
UNSCALED: Scaling = (None, None)


def no_update(parameter: Tensor) -> None:
    """A `Supply` of a sweep that updates nothing."""


@dataclass(eq=False)
class Dense:
    """A Linear layer: every input unit to every output unit, and a bias."""

    weight: Tensor
    bias: Tensor | None

    @property
    def sizes(self) -> tuple[int, int]:
        return self.weight.shape[1], self.weight.shape[0]


@dataclass(eq=False)
class Norm:
    """A BatchNorm: one edge w/σ per unit, and a bias edge: b with a batch's σ, b − μ w/σ with running statistics."""

    module: Any
    weight: Tensor | None = field(init=False)
    bias: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.weight, self.bias = self.module.weight, self.module.bias

    @property
    def sizes(self) -> tuple[int, int]:
        return self.module.num_features, self.module.num_features


def find_chain(structure: Structure) -> list[Dense | Norm] | None:
    """The layers of a chain from input to output, or None where the structure is another."""
    if structure.input_shape is None:
        return None
    stages: list[Dense | Norm] = []
    last = None
    for node in structure.graph.nodes:
        if node.op == "placeholder":
            if node.users:
                last = node
            continue
        if node.op == "get_attr":
            continue
        if node.op == "output":
            if node.args[0] is not last or not stages:
                return None
            break
        target: Any = node.target
        module = structure.module.get_submodule(target) if node.op == "call_module" else None
        auxiliary = target in ("size", "dim", getattr) or (target is operator.getitem and node.args[0] is not last)
        before_first = not stages and (
            target in (torch.flatten, torch.reshape, "flatten", "view", "reshape")
            if module is None
            else isinstance(module, nn.Flatten)
        )
        if auxiliary:
            continue
        if not node.args or node.args[0] is not last:
            return None
        if isinstance(module, nn.Linear):
            if not isinstance(module.weight, nn.Parameter) or not isinstance(module.bias, (nn.Parameter, type(None))):
                return None  # buffers may be replaced (by model.double(), say): what runs the graph reads them anew
            stages.append(Dense(module.weight, module.bias))
        elif isinstance(module, nn.BatchNorm1d):
            stages.append(Norm(module))
        elif target is F.linear:
            nodes = node.all_input_nodes[1:]
            if not all(each.op == "get_attr" for each in nodes) or node.kwargs.get("weight") is not None:
                return None
            tensors = [attribute(structure.module, str(each.target)) for each in nodes]
            if not all(isinstance(tensor, nn.Parameter) for tensor in tensors) or tensors[0].dim() != 2:
                return None
            stages.append(Dense(tensors[0], tensors[1] if len(tensors) > 1 else None))
        elif not (isinstance(module, IDENTITY_MODULES) or target in IDENTITY_FUNCTIONS
                  or (node.op == "call_method" and target in IDENTITY_METHODS) or before_first):  # fmt: skip
            return None
        last = node
    if not _joined(stages) or _shape_at_first_layer(structure) != (1, stages[0].sizes[0]):
        return None
    return stages


def _joined(stages: list[Dense | Norm]) -> bool:
    """Whether the layers' sizes fit and no parameter stands in two of them."""
    parameters = [id(p) for stage in stages for p in (stage.weight, stage.bias) if p is not None]
    fits = all(a.sizes[1] == b.sizes[0] for a, b in pairwise(stages))
    return fits and len(set(parameters)) == len(parameters)


class _Reached(Exception):
    """Carries the shape with which a layer was reached."""


class _FirstLayer(Walk):
    """Runs real shapes up to the first layer."""

    def reshape(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def linear(self, x: Any, weight: Tensor, bias: Tensor | None) -> Any:
        raise _Reached(tuple(x.shape))

    def batchnorm(self, x: Any, module: Any) -> Any:
        raise _Reached(tuple(x.shape))


def _shape_at_first_layer(structure: Structure) -> Any:
    assert structure.input_shape is not None
    try:
        _FirstLayer(structure).run(torch.zeros(1, *structure.input_shape))
    except _Reached as reached:
        return reached.args[0]
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"input_shape {structure.input_shape} does not fit the model: {error}") from error
    return None


def total(pairs: list[tuple[float, float]], p: float) -> tuple[float, float]:
    """Σ value · 2^exponent (the maximum at p = ∞) as one such pair."""
    if not all(math.isfinite(value) for value, _ in pairs):
        return math.nan, 0.0
    live = [(value, exponent) for value, exponent in pairs if value > 0]
    if not live:
        return 0.0, 0.0
    top = max(exponent for _, exponent in live)
    terms = [math.ldexp(value, int(max(exponent - top, -5000))) for value, exponent in live]
    return (max(terms) if math.isinf(p) else math.fsum(terms)), top


def agree(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two such sums are the same up to rounding."""
    (a, a_exponent), (b, b_exponent) = one, other
    if not (a > 0 and b > 0):
        return a == b
    return abs(math.log2(a) - math.log2(b) + (a_exponent - b_exponent)) < 1e-7


class PathVectors:
    """F and B of a chain: 16 bytes a unit.

    `forward[l]` and `backward[l]` belong to the units between layers l − 1 and l. After a forward sweep `forward` is
    of the weights as they are, after a backward sweep `backward` is; the other one served as scratch.
    """

    def __init__(self, stages: list[Dense | Norm], p: float) -> None:
        self.stages, self.p = stages, p
        self.stored: Callable[[Tensor], Tensor] = lambda parameter: parameter  # what takes a parameter's updates
        device = next(t.device for stage in stages for t in (stage.weight, stage.bias) if t is not None)
        sizes = [stages[0].sizes[0], *(stage.sizes[1] for stage in stages)]
        # All in one piece, as `path_step` takes it, so that a sweep's results are read in one operation.
        lengths = [size + 1 for size in sizes] * 2 + [4] * len(stages)
        self.memory = torch.zeros(sum(lengths), dtype=torch.float64, device=device)
        pieces = list(self.memory.split(lengths))
        sides = len(sizes)
        self.forward, self.backward = pieces[:sides], pieces[sides : 2 * sides]
        self._masses = [piece[:2] for piece in pieces[2 * sides :]]
        self._values = [vector[:-1] for vector in self.forward], [vector[:-1] for vector in self.backward]
        ends = list(accumulate(lengths))
        results = [end - 1 for end in ends[: 2 * sides]]
        results += [start + which for start in ends[2 * sides - 1 : -1] for which in (0, 1)]
        self._results = torch.tensor(results, device=device)  # every exponent, every mass

    def nbytes(self) -> int:
        """Bytes held between steps."""
        return sum(vector.nbytes for vector in (*self.forward, *self.backward))

    def sweep(
        self, forward: bool, supply: Supply, sigma: dict[Any, Tensor] | None = None
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Run through the layers and update what `supply` gives a gradient for.

        Args:
            forward: the direction; the other direction's vectors must be of the weights as they are.
            supply: parameter -> (gradient, momentum, rates), or None to leave it.
            sigma: BatchNorm module -> the batch's standard deviation [units]; running statistics where it has none.

        Returns:
            Φ of the old and of the new weights, each as (value, exponent).
        """
        self.run(forward, supply, sigma)
        return self._totals(forward)

    def run(
        self, forward: bool, supply: Supply, sigma: dict[Any, Tensor] | None = None, scaling: Scaling = UNSCALED
    ) -> None:
        """`sweep` without reading Φ, which waits for the device."""
        sides = len(self.forward)
        carried, known = (self.forward, self.backward) if forward else (self.backward, self.forward)
        carried_values, known_values = self._values if forward else self._values[::-1]
        start, end = (0, sides - 1) if forward else (sides - 1, 0)
        for vector, values in ((carried[start], carried_values[start]), (known[end], known_values[end])):
            vector.zero_()
            values.fill_(1.0)
        old = new = carried[start]
        for index in range(sides - 1) if forward else range(sides - 2, -1, -1):
            stage, side = self.stages[index], index + 1 if forward else index
            step = self._dense if isinstance(stage, Dense) else self._norm
            where = (old, new, known[side], carried[side], self._masses[index], forward)
            step(stage, *where, supply, sigma or {}, scaling)  # type: ignore[arg-type]
            old, new = known[side], carried[side]

    def _totals(self, forward: bool) -> tuple[tuple[float, float], tuple[float, float]]:
        """Φ of the old and of the new weights after a sweep."""
        sides = len(self.forward)
        carried_values, known_values = self._values if forward else self._values[::-1]
        start, end = (0, sides - 1) if forward else (sides - 1, 0)
        results = self.memory[self._results].tolist()
        exponents = results[:sides], results[sides : 2 * sides]
        of_new, of_old = exponents if forward else exponents[::-1]
        sums: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
        for which, values, exponent in ((0, known_values[end], of_old[end]), (1, carried_values[end], of_new[end])):
            sums[which].append((float(values.max() if math.isinf(self.p) else values.sum()), exponent))
        if not forward:  # Σ |b|^p B of each layer, at the exponent of what entered it
            for index in range(sides - 1):
                mass_old, mass_new = results[2 * sides + 2 * index :][:2]
                sums[0].append((mass_old, of_new[start] if index + 1 == start else of_old[index + 1]))
                sums[1].append((mass_new, of_new[index + 1]))
        return total(sums[0], self.p), total(sums[1], self.p)

    def step_with(
        self,
        forward: list[Tensor],
        backward: list[Tensor],
        supply: Supply,
        sigma: dict[Any, Tensor],
        scaling: Scaling = UNSCALED,
    ) -> None:
        """Update with given F and B, which stay as they are."""
        for index, stage in enumerate(self.stages):
            across = backward[index + 1].clone()
            step = self._dense if isinstance(stage, Dense) else self._norm
            into, fresh = forward[index], torch.empty_like(across)
            where = (into, into, across, fresh, self._masses[index], True)
            step(stage, *where, supply, sigma, scaling)  # type: ignore[arg-type]

    def _dense(
        self, stage: Dense, old: Tensor, new: Tensor, across: Tensor, fresh: Tensor, mass: Tensor, forward: bool,
        supply: Supply, sigma: dict[Any, Tensor], scaling: Scaling,
    ) -> None:  # fmt: skip
        given = supply(stage.weight)
        weight = self.stored(stage.weight).detach()
        for_bias = None if stage.bias is None else supply(stage.bias)
        bias = None if stage.bias is None else self.stored(stage.bias).detach()
        grad, momentum = (None, None) if for_bias is None else for_bias[:2]
        matched = bias
        if bias is not None and bias.dtype != weight.dtype:
            # One of the two may be a frozen bfloat16 parameter, the other one a float32 copy.
            matched, grad, momentum = (_cast(each, weight) for each in (bias, grad, momentum))
        path_sweep_unchecked(
            weight, given and given[0], given and given[1], matched, grad, momentum, old, new, across, fresh,
            mass, forward, self.p, given[2] if given else UNCHANGED, for_bias[2] if for_bias else UNCHANGED,
            *scaling, given and given[3], for_bias and for_bias[3],
        )  # fmt: skip
        if bias is not None and matched is not None and matched is not bias and for_bias is not None:
            bias.copy_(matched)
            if for_bias[1] is not None and momentum is not None:
                for_bias[1].copy_(momentum)

    def _norm(
        self, stage: Norm, old: Tensor, new: Tensor, across: Tensor, fresh: Tensor, mass: Tensor, forward: bool,
        supply: Supply, sigma: dict[Any, Tensor], scaling: Scaling,
    ) -> None:  # fmt: skip
        """The same for one edge per unit, in plain torch: these vectors are small."""
        p = self.p
        known = across.clone()
        out, into = (known, old) if forward else (old, known)
        deviation, mean = norm_statistics(stage.module, sigma)
        weight, bias = (None if each is None else self.stored(each).detach() for each in (stage.weight, stage.bias))
        inverse = reference.power(1 / deviation, p)
        before = norm_edges(weight, bias, deviation, mean, p)
        factor = reference.factor(into[:-1] * inverse, 0.0, p) * reference.factor(out[:-1], out[-1] + into[-1], p)
        for param, gamma in ((stage.weight, factor), (stage.bias, reference.factor(out[:-1], out[-1], p))):
            given = None if param is None else supply(param)
            if param is not None and given is not None:
                rates = reference.rates_now(given[2], scaling[0], given[3])
                reference.apply_step(self.stored(param).detach(), given[0], given[1], gamma, rates, scaling[1])
        after = norm_edges(weight, bias, deviation, mean, p)
        mass.zero_()
        pairs = ((old.clone(), before, across), (new.clone(), after, fresh))
        for index, (vector, (scale, extra), target) in enumerate(pairs):
            values, exponent = vector[:-1] * scale, vector[-1]
            if forward:
                common = exponent.clamp_min(0.0)
                values, extra = torch.ldexp(values, exponent - common), torch.ldexp(extra, -common)
                values, exponent = torch.maximum(values, extra) if math.isinf(p) else values + extra, common
            else:
                terms = extra * vector[:-1]
                mass[index] = terms.max() if math.isinf(p) else terms.sum()
            target.copy_(reference.normalised(values, exponent))


def _cast(value: Tensor | None, like: Tensor) -> Tensor | None:
    return None if value is None else value.to(like.dtype)


def norm_statistics(module: Any, sigma: dict[Any, Tensor]) -> tuple[Tensor, Tensor | None]:
    """σ and μ of a BatchNorm in float64; with a batch's σ the mean is part of the batch, and None."""
    if module in sigma:
        return sigma[module].to(torch.float64), None
    if module.running_var is None:
        raise ValueError("a BatchNorm without running statistics has paths only in a training step, with its batch's σ")
    return (module.running_var.to(torch.float64) + module.eps).sqrt(), module.running_mean.to(torch.float64)


def norm_edges(
    weight: Tensor | None, bias: Tensor | None, deviation: Tensor, mean: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """|w/σ|^p and the bias edge's |b − μ w/σ|^p (|b|^p with a batch's σ)."""
    scale = (1 / deviation) if weight is None else weight.to(torch.float64) / deviation
    shift = torch.zeros_like(scale) if bias is None else bias.to(torch.float64)
    return power(scale, p), power(shift if mean is None else shift - mean * scale, p)


power = reference.power
