"""Rescaling hidden units without changing the function: at random, or to the least max norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .arguments import finite_power
from .chain import Dense, find_chain
from .structure import Structure, trace
from .walk import Walk


class Units(Walk):
    """Follows units through a structure: a value is an int64 tensor [1, ...] of the unit that each element belongs to.

    A unit's incoming edges are its last affine map: BatchNorm's weight and bias where one follows a layer, never the
    layer before it (whose eps would change the function). Channels joined by a residual add are one unit. Inputs,
    outputs and what a BatchNorm or a protocol layer reads are fixed.
    """

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        self.parent: list[int] = []
        self.fixed: set[int] = set()
        self.scales: list[tuple[Tensor, Tensor | None, Tensor | None]] = []  # parameter, units out, units in

    def find(self) -> tuple[Tensor, int]:
        """Id -> number of its free unit, or −1 where it is fixed; and how many free units there are."""
        shape = self.structure.input_shape
        if shape is None:
            raise ValueError(
                "input_shape is needed: the shape of one input without the batch axis, such as (3, 32, 32)"
            )
        inputs = self.new(math.prod(shape), fixed=True).view(1, *shape)
        try:
            output = self.run(inputs)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"input_shape {shape} does not fit the model: {error}") from error
        self.fix(output)
        frozen = {self.root(unit) for unit in self.fixed}
        numbers: dict[int, int] = {}
        table = []
        for unit in range(len(self.parent)):
            root = self.root(unit)
            table.append(-1 if root in frozen else numbers.setdefault(root, len(numbers)))
        return torch.tensor(table), len(numbers)

    def new(self, count: int, fixed: bool = False) -> Tensor:
        start = len(self.parent)
        self.parent += range(start, start + count)
        if fixed:
            self.fixed.update(range(start, start + count))
        return torch.arange(start, start + count)

    def root(self, unit: int) -> int:
        while self.parent[unit] != unit:
            self.parent[unit] = self.parent[self.parent[unit]]
            unit = self.parent[unit]
        return unit

    def fix(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.fixed.update(value.unique().tolist())
        elif isinstance(value, (tuple, list)):
            for each in value:
                self.fix(each)

    def _merge(self, one: Tensor, other: Tensor) -> None:
        pairs = torch.stack([one.flatten(), other.flatten()]).unique(dim=1)
        for a, b in pairs.T.tolist():
            self.parent[self.root(a)] = self.root(b)

    def _along(self, x: Tensor, axis: int) -> Tensor:
        """The units along an axis; units that differ elsewhere are merged, since one weight reads them all."""
        rows = x.movedim(axis, -1).reshape(-1, x.shape[axis])
        for row in rows[1:].unique(dim=0) if len(rows) > 1 else ():
            self._merge(rows[0], row)
        return rows[0]

    def reshape(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point():
            raise ValueError("a parameter that is read through a view (transpose, view, ...) cannot be rescaled")
        return result

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        self._merge(*torch.broadcast_tensors(x, y))
        return x if x.numel() >= y.numel() else y

    def cat(self, values: list[Tensor], dim: int) -> Tensor:
        return torch.cat(values, dim)

    def reduce(self, how: str, x: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
        low, high = x.amin(dims, keepdim), x.amax(dims, keepdim)
        if not torch.equal(low, high):
            self._merge(low, high)
            self._merge(x, low.expand_as(x) if keepdim else x)
            self.fix(x)
        return low

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        into = self._along(x, -1)
        if len(into) != weight.shape[-1]:
            raise RuntimeError(f"a layer of {weight.shape[-1]} inputs meets {len(into)} units")
        out = self._units_of(x, weight.shape[0] if weight.dim() > 1 else 1, weight, bias)
        if self._is_free(weight, bias):
            self.scales.append((weight, out[:, None], into[None]) if weight.dim() > 1 else (weight, out, into))
            if bias is not None:
                self.scales.append((bias, out.view(bias.shape), None))
        return out.expand(*x.shape[:-1], -1) if weight.dim() > 1 else out.expand(x.shape[:-1])

    @staticmethod
    def _is_free(weight: Tensor, bias: Tensor | None) -> bool:
        """Whether an affine map consists of parameters alone: buffers are constants, and stay."""
        return isinstance(weight, nn.Parameter) and isinstance(bias, (nn.Parameter, type(None)))

    def _units_of(self, x: Tensor, count: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        """New units behind an affine map; where it is constant, they and the units in front of it are fixed."""
        free = self._is_free(weight, bias)
        if not free:
            self.fix(x)
        return self.new(count, fixed=not free)

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, function: Any, settings: Any) -> Tensor:
        shape = function(torch.zeros(x.shape), torch.zeros(weight.shape), None, **settings).shape
        into, out = self._along(x, 1), self._units_of(x, weight.shape[0], weight, bias)
        groups, ones = settings.get("groups", 1), (1,) * (weight.dim() - 2)
        per_group = into.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(*weight.shape[:2], *ones)
        if self._is_free(weight, bias):
            self.scales.append((weight, out.view(-1, 1, *ones), per_group))
            if bias is not None:
                self.scales.append((bias, out, None))
        return out.view(1, -1, *ones).expand(shape)

    def batchnorm(self, x: Tensor, module: Any) -> Tensor:
        self.fix(x)
        free = module.weight is not None and self._is_free(module.weight, module.bias)
        out = self.new(module.num_features, fixed=not free)
        if free:
            self.scales += [(each, out, None) for each in (module.weight, module.bias) if each is not None]
        return out.view(1, -1, *[1] * (x.dim() - 2)).expand(x.shape)

    def _pooled(self, x: Tensor, module: Any) -> Tensor:
        shape = module(torch.zeros(x.shape)).shape
        units = self._along(x, 1)
        return units.view(1, -1, *[1] * (x.dim() - 2)).expand(shape)

    max_pool = average_pool = adaptive_average = adaptive_max = _pooled

    def rnn(self, x: Tensor, module: nn.RNN) -> tuple[Tensor, Tensor]:
        self.check_batch_axis(x.shape, module)
        steps = x.shape[1] if module.batch_first else x.shape[0]
        into, finals = self._along(x, -1), []
        for layer in range(module.num_layers):
            sides = []
            for suffix in ("", "_reverse") if module.bidirectional else ("",):
                name, out = f"_l{layer}{suffix}", self.new(module.hidden_size)
                self.scales.append((getattr(module, f"weight_ih{name}"), out[:, None], into[None]))
                self.scales.append((getattr(module, f"weight_hh{name}"), out[:, None], out[None]))
                if module.bias:
                    self.scales += [(getattr(module, f"bias_{side}{name}"), out, None) for side in ("ih", "hh")]
                sides.append(out)
                finals.append(out)
            into = torch.cat(sides)
        output = into.view(1, 1, -1).expand(1, steps, -1) if module.batch_first else into.expand(steps, 1, -1)
        return output, torch.stack(finals)[:, None]

    def protocol(self, x: Tensor, module: nn.Module) -> Tensor:
        self.fix(x)
        shape = module(torch.zeros(x.shape, dtype=next(module.parameters()).dtype)).shape
        return self.new(math.prod(shape), fixed=True).view(shape)

    def apply(self, table: Tensor, factors: Tensor) -> None:
        """Multiply a unit's incoming edges by its factor, and divide its outgoing edges by it; all of them or none."""
        # A fixed unit has factor 1: it stands behind the others.
        of = torch.cat([factors.to(torch.float64), torch.ones(1, dtype=torch.float64)])
        names: dict[Tensor, str] = {each: name for name, each in self.structure.module.named_parameters()}
        scaled: dict[Tensor, Tensor] = {}
        self._refuse_shared_memory()
        with torch.no_grad():
            for parameter, out, into in self.scales:
                if parameter not in names:  # of an RNN; other layers' buffers are left out
                    raise ValueError("a recurrent weight that is a buffer cannot be rescaled")
                name = names[parameter]
                if parameter in scaled:
                    raise ValueError(f"{name}: a layer that is called more than once cannot be rescaled per call")
                scale = of[table[out]] if out is not None else torch.ones(())
                if into is not None:
                    scale = scale / of[table[into]]
                product = parameter * scale.to(parameter.device, parameter.dtype)
                tiny = torch.finfo(parameter.dtype).tiny
                lost = (product.abs() < tiny) & (parameter.abs() >= tiny) | ~product.isfinite() & parameter.isfinite()
                if bool(lost.any()):
                    raise ValueError(f"factors would take {name} out of the range of {parameter.dtype}")
                scaled[parameter] = product
            for parameter, product in scaled.items():
                parameter.copy_(product)

    def _refuse_shared_memory(self) -> None:
        """Raise where a weight to be scaled lies in memory that another tensor of the model, or itself, uses again."""
        module = self.structure.module
        found: list[tuple[int, int, str, bool]] = []  # first and last byte, name, whether it is scaled
        written = {parameter for parameter, _, _ in self.scales}
        for name, each in (*module.named_parameters(), *module.named_buffers()):
            if each.numel() == 0:
                continue
            strides = list(zip(each.shape, each.stride(), strict=True))
            if each in written and any(size > 1 and stride == 0 for size, stride in strides):
                raise ValueError(f"{name}: its elements share memory (expand), and cannot be rescaled; clone it first")
            begin = each.data_ptr()
            span = 1 + sum((size - 1) * stride for size, stride in strides)
            found.append((begin, begin + span * each.element_size(), name, each in written))
        found.sort()
        reach, holder, holder_is_written = 0, "", False  # the tensor that ends last so far
        for begin, end, name, is_written in found:
            if begin < reach and (is_written or holder_is_written):
                raise ValueError(f"{name} shares memory with {holder}, and cannot be rescaled; clone one of them first")
            if end > reach:
                reach, holder, holder_is_written = end, name, is_written


def rescale_(
    model: nn.Module,
    *,
    seed: int | None = None,
    factors: Sequence[float] | Tensor | None = None,
    power_of_two: bool = False,
    input_shape: Sequence[int] | None = None,
) -> Tensor:
    """Multiply every hidden unit's incoming edges by a factor and divide its outgoing edges by it, in place.

    The function stays the same (for factors that are powers of two, bit for bit). A unit's incoming edges are its last
    affine map: the weight and bias of a BatchNorm where one follows; channels joined by a residual add are one unit.

    Args:
        model: a module of operations that have paths.
        seed: of the random factors; None draws from torch's global generator.
        factors: [units], positive, in the order of the layers; random where left out: e^z with z normal.
        power_of_two: random factors are 2^k, k from −4 to 4; given ones are checked.
        input_shape: one input's shape without the batch axis; inferred where the first layer is a Linear.

    Returns:
        The factors, float64 [units].

    Raises:
        ValueError: no hidden units, a wrong number of factors, factors that are not positive or that leave the range
            of a parameter's dtype, a layer that is called twice or reads a view, weights that share memory, an
            input_shape that does not fit; nothing is changed then.
        TypeError: a seed that is no int, factors that are no numbers.

    Source: Neyshabur, Salakhutdinov, Srebro, "Path-SGD: Path-Normalized Optimization in Deep Neural Networks" (2015).

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> fw.pathsgd.rescale_(model, factors=[2.0, 4.0, 0.5])
        tensor([2.0000, 4.0000, 0.5000], dtype=torch.float64)
    """
    if seed is not None:
        _check.integer("seed", seed)
    units = Units(trace(model, input_shape))
    table, count = units.find()
    if count == 0:
        raise ValueError(
            "model has no hidden unit that can be rescaled: one between two affine maps, joined by "
            "operations with f(c x) = c f(x) alone"
        )
    if factors is None:
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        if power_of_two:
            chosen = torch.exp2(torch.randint(-4, 5, (count,), generator=generator).to(torch.float64))
        else:
            chosen = torch.randn(count, generator=generator, dtype=torch.float64).exp()
    else:
        chosen = torch.as_tensor(factors, dtype=torch.float64).flatten()
        if len(chosen) != count:
            raise ValueError(f"factors must hold one number for each of the {count} hidden units, got {len(chosen)}")
        if not bool(((chosen > 0) & torch.isfinite(chosen)).all()):
            worst = float(chosen[~((chosen > 0) & torch.isfinite(chosen))][0])
            raise ValueError(f"factors must be positive and finite, got {worst:g}")
        between = chosen[torch.frexp(chosen).mantissa != 0.5]
        if power_of_two and len(between):
            raise ValueError(f"factors must be powers of two, since power_of_two=True, got {float(between[0]):g}")
    units.apply(table, chosen)
    return chosen


def balance_(model: nn.Module, p: float = 2, *, input_shape: Sequence[int] | None = None) -> Tensor:
    """Rescale the hidden units of a chain of Linear layers to the least possible max norm μ_{p,∞}, in place.

    All live hidden units then have incoming weights of p-norm μ. For d layers without biases and with one output, μ^d
    is the path norm: φ_p = min over rescalings of μ_{p,∞}^d. With biases μ is still the least.

    Args:
        model: a chain of Linear and ReLU-like layers.
        p: at least 1, finite.
        input_shape: one input's shape without the batch axis.

    Returns:
        μ, a float64 scalar.

    Raises:
        ValueError: another structure, p < 1, weights that are not finite, no path of which all weights are live (a
            zero-initialised last layer): μ then has no minimum, since rescaling brings it as near to 0 as one likes;
            nothing is changed then.

    Source: Neyshabur, Tomioka, Srebro, "Norm-Based Capacity Control in Neural Networks" (2015), theorem 5.

    Example:
        >>> import torch, finite_width as fw
        >>> layers = [torch.nn.Linear(2, 3, bias=False), torch.nn.ReLU(), torch.nn.Linear(3, 1, bias=False)]
        >>> model = torch.nn.Sequential(*layers)
        >>> mu = fw.pathsgd.balance_(model)
        >>> torch.allclose(mu**2, fw.pathsgd.path_norm(model), rtol=1e-5)
        True
    """
    p = finite_power(p)
    structure = trace(model, input_shape)
    stages = find_chain(structure)
    dense = [stage for stage in stages or [] if isinstance(stage, Dense)]
    if stages is None or len(dense) < len(stages):
        raise ValueError("balance_ needs a chain of Linear and ReLU-like layers")
    powers = [
        (
            stage.weight.detach().to(torch.float64).abs() ** p,
            None if stage.bias is None else stage.bias.detach().to(torch.float64).abs() ** p,
        )
        for stage in dense
    ]

    def inverse_factors(scale: float) -> list[Tensor]:
        """c^(−p) of every unit, layer by layer, when all incoming p-norms are to be scale^(1/p)."""
        values, found = torch.ones(powers[0][0].shape[1], dtype=torch.float64), []
        for weight, bias in powers:
            values = (weight @ values + (0.0 if bias is None else bias)) / scale
            found.append(values)
        return found

    def fits(scale: float) -> bool:  # NaN, from 0 · ∞ where the scale is too small, does not
        return bool(inverse_factors(scale)[-1].max() <= 1)

    live = torch.ones(powers[0][0].shape[1], dtype=torch.bool)
    for weight, bias in powers:
        live = ((weight > 0) & live).any(1) | (torch.zeros(()) if bias is None else bias).bool()
    if not bool(live.any()):
        raise ValueError("model has no path of which all weights are live: μ then has no minimum, only the limit 0")
    # The output units keep factor 1: the least scale is where the largest of theirs comes out as 1. Falls with scale.
    low, high = 1e-300, 1.0
    while not fits(high):
        high *= 16
        if math.isinf(high):
            raise ValueError(f"model has weights of which |w|^{p:g} is not finite")
    for _ in range(2100):
        middle = math.sqrt(low) * math.sqrt(high)
        if not low < middle < high:
            break
        low, high = (low, middle) if fits(middle) else (middle, high)
    hidden = inverse_factors(high)[:-1]
    if hidden:
        inverse = torch.cat(hidden)
        rescale_(model, factors=torch.where(inverse > 0, inverse ** (-1 / p), 1.0), input_shape=structure.input_shape)
    return torch.tensor(high ** (1 / p), dtype=torch.float64)
