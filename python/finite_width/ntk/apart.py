"""Calls that keep rows apart: a forward of nothing else proves that its rows do not mix, and where they lie.

A value holds the rows if they lie along its first axis and each was made from its own row, from parameters, buffers and
constants alone. The inputs do; the table below says which calls make such values from such values. What a forward does
beside that may be as harmless, but then a few rows must show it (probing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Arguments that carry nothing of a row. Of any other type the contents are not known.
_PLAIN = {int, float, bool, str, complex, type(None), type(...), slice, torch.Size}
_PLAIN |= {torch.dtype, torch.device, torch.layout, torch.memory_format}

_MARK = "_finite_width_rows"

# held, others: the tensors among the arguments that hold the rows, and those that do not.
Rule = Callable[[Sequence[Any], dict[str, Any], list[Tensor], list[Tensor]], bool]


class Apart:
    """Follows the values of one forward, call by call; `holds` until one is met of which the table knows nothing.

    A value is marked by an attribute: it goes when the value goes, and stays behind when its memory is used again.

    Args:
        rows: the inputs.
        constants: the ids of parameters and buffers.
    """

    def __init__(self, rows: Sequence[Tensor], constants: Set[int]) -> None:
        self.holds = True
        self._count = len(rows[0])
        self._rows, self._constant = object(), object()
        self._inputs = {id(value): value._version for value in rows}
        self._constants = constants

    def before(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether the call's result will hold the rows. Ends `holds` where the call is not known to keep them apart."""
        held: list[Tensor] = []
        others: list[Tensor] = []
        self.holds = self._sort(args, held, others, 2) and self._sort(kwargs.values(), held, others, 2)
        if self.holds and held and func not in _ASKING:
            rule = KEEPING.get(func)
            self.holds = rule is not None and "out" not in kwargs and rule(args, kwargs, held, others)
        return bool(held)

    def after(self, result: Any, held: bool) -> None:
        """Mark what a call made."""
        if isinstance(result, Tensor):
            if held and (result.dim() == 0 or result.shape[0] != self._count):
                self.holds = False
            elif id(result) not in self._constants:
                setattr(result, _MARK, (self._rows if held else self._constant, result._version))
        elif isinstance(result, tuple | list):
            for value in result:
                self.after(value, held)

    def has(self, value: Tensor) -> bool:
        """Whether the value holds the rows, by all that was seen."""
        return self.holds and self._kind(value) is self._rows

    def _sort(self, values: Iterable[Any], held: list[Tensor], others: list[Tensor], depth: int) -> bool:
        """Appends the tensors to the two lists; whether all values are known."""
        for value in values:
            if isinstance(value, Tensor):
                kind = self._kind(value)
                if kind is None:
                    return False
                (held if kind is self._rows else others).append(value)
            elif type(value) in (tuple, list):
                if depth == 0 or not self._sort(value, held, others, depth - 1):
                    return False
            elif type(value) not in _PLAIN:
                return False
        return True

    def _kind(self, value: Tensor) -> Any:
        mark, version = getattr(value, _MARK, (None, 0))
        if mark is self._rows or mark is self._constant:
            return mark if value._version == version else None
        if id(value) in self._inputs:
            return self._rows if value._version == self._inputs[id(value)] else None
        return self._constant if id(value) in self._constants else None


def _getter(name: str) -> Any:
    """What a TorchFunctionMode sees where the attribute of a tensor is read."""
    return getattr(Tensor, name).__get__


# What tells nothing of the values.
_ASKING = {
    *map(_getter, ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.stride),
    *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex),
}


def _argument(args: Sequence[Any], kwargs: dict[str, Any], place: int, name: str, default: Any = None) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _is_only(value: Any, held: list[Tensor]) -> bool:
    return len(held) == 1 and value is held[0]


def _beside(axes: int, others: list[Tensor]) -> bool:
    """Whether tensors that do not hold the rows are broadcast along the first of this many axes."""
    return all(other.dim() < axes or (other.dim() == axes and other.shape[0] == 1) for other in others)


def _pointwise(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    axes = held[0].dim()
    return all(value.dim() == axes for value in held) and _beside(axes, others)


def _pointwise_in_place(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    return args[0] is held[0] and _pointwise(args, kwargs, held, others)


def _spatial(axes: int) -> Rule:
    """Of convolutions and pools over so many axes; with one less the first axis would be that of the channels."""

    def rule(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
        return _is_only(args[0] if args else None, held) and held[0].dim() == axes + 2

    return rule


def _view(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    """In the order of memory: where the first axis stays as long, which `Apart.after` sees, so does each row."""
    return _is_only(args[0] if args else None, held) and not any(isinstance(value, torch.dtype) for value in args)


def _along(name: str, place: int = 1) -> Rule:
    """Of calls along axes that they name: all but the first."""

    def rule(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
        if not _is_only(args[0] if args else None, held) or others:
            return False
        return _behind_first(_argument(args, kwargs, place, name), held[0].dim())

    return rule


def _behind_first(axes: Any, count: int) -> bool:
    """Whether an axis, or all of several, are among `count` ones and not the first."""
    named = [axes] if type(axes) is int else list(axes) if isinstance(axes, tuple | list) else []
    return bool(named) and all(type(axis) is int and -count < axis < count and axis != 0 for axis in named)


def _joined(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    axes = held[0].dim()
    axis = _argument(args, kwargs, 1, "dim", 0)
    return not others and all(value.dim() == axes for value in held) and _behind_first(axis, axes)


def _transposed(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    axes = [*args[1:], *kwargs.values()]
    return _is_only(args[0] if args else None, held) and len(axes) == 2 and _behind_first(axes, held[0].dim())


def _permuted(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    axes = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
    return _is_only(args[0] if args else None, held) and not kwargs and len(axes) > 0 and axes[0] == 0


def _taken(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    index = args[1]
    parts = index[1:] if isinstance(index, tuple) and index and index[0] == slice(None) else None
    return parts is not None and not others and all(type(part) in (int, slice) for part in parts)


def _padded(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    sides = _argument(args, kwargs, 1, "pad", ())
    return _is_only(args[0] if args else None, held) and len(sides) <= 2 * (held[0].dim() - 1)


def _dense(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    narrow = all(value.dim() <= 2 for value in others)
    return narrow and _is_only(args[0] if args else None, held) and held[0].dim() >= 2


def _product(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    """Of rows with a matrix that they share, or of each row's matrices with each other."""
    if len(held) == 1:
        return _dense(args, kwargs, held, others)
    return not others and held[0].dim() == held[1].dim() >= 3


def _with_bias(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    return len(args) == 3 and _is_only(args[1], held) and _beside(2, [args[0]])


def _dropout(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    return _is_only(args[0] if args else None, held) and _argument(args, kwargs, 2, "training", True) is False


def _batch_norm(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    mean, variance = _argument(args, kwargs, 1, "running_mean"), _argument(args, kwargs, 2, "running_var")
    running = mean is not None and variance is not None and _argument(args, kwargs, 5, "training", False) is False
    return running and _is_only(args[0] if args else None, held) and held[0].dim() >= 2


def _layer_norm(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    shape = _argument(args, kwargs, 1, "normalized_shape")
    return _is_only(args[0] if args else None, held) and shape is not None and len(shape) < held[0].dim()


def _group_norm(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    return _is_only(args[0] if args else None, held) and held[0].dim() >= 2


def _embedding(args: Sequence[Any], kwargs: dict[str, Any], held: list[Tensor], others: list[Tensor]) -> bool:
    return len(args) > 1 and _is_only(args[1], held)


def _operators(*names: str) -> list[Any]:
    return [getattr(Tensor, f"__{prefix}{name}__") for name in names for prefix in ("", "r")]


_POINTWISE = [
    *(torch.relu, Tensor.relu, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish),
    *(F.softplus, F.hardtanh, F.softsign, F.tanhshrink, F.logsigmoid, F.tanh, F.sigmoid, torch.prelu),
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("tanh", "sigmoid", "exp", "sin", "cos", "neg")),
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("sqrt", "rsqrt", "square", "erf", "abs", "log")),
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("add", "sub", "mul", "div", "true_divide", "pow")),
    *(*_operators("add", "sub", "mul", "truediv"), Tensor.__pow__, Tensor.__neg__, Tensor.contiguous, torch.clone),
    *(torch.where, Tensor.clone, Tensor.masked_fill),
]
_IN_PLACE = [torch.relu_, Tensor.relu_, Tensor.add_, Tensor.mul_, Tensor.__iadd__, Tensor.__imul__, F.relu_]
_MEANS = [getattr(owner, name) for owner in (torch, Tensor) for name in ("mean", "sum", "amax", "amin")]
_SOFTMAX = [F.softmax, F.log_softmax, torch.softmax, Tensor.softmax, torch.log_softmax, Tensor.log_softmax]
_POOLS = {
    1: (F.max_pool1d, torch.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d),
    2: (F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    3: (F.max_pool3d, torch.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d),
}

KEEPING: dict[Any, Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_IN_PLACE, _pointwise_in_place),
    **dict.fromkeys(_MEANS, _along("dim")),
    **dict.fromkeys(_SOFTMAX, _along("dim")),
    **{pool: _spatial(axes) for axes, pools in _POOLS.items() for pool in pools},
    **{conv: _spatial(axes) for axes, conv in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), 1)},
    torch.conv_transpose1d: _spatial(1),
    torch.conv_transpose2d: _spatial(2),
    torch.conv_transpose3d: _spatial(3),
    F.linear: _dense,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm), _product),
    **dict.fromkeys((torch.mm, Tensor.mm), _dense),
    torch.addmm: _with_bias,
    **dict.fromkeys((torch.flatten, Tensor.flatten), _view),
    **dict.fromkeys((torch.reshape, Tensor.reshape), _view),
    Tensor.view: _view,
    **dict.fromkeys((torch.unflatten, Tensor.unflatten), _view),
    **dict.fromkeys((torch.squeeze, Tensor.squeeze), _along("dim")),
    **dict.fromkeys((torch.transpose, Tensor.transpose), _transposed),
    **dict.fromkeys((torch.permute, Tensor.permute), _permuted),
    **dict.fromkeys((torch.cat, torch.stack), _joined),
    **dict.fromkeys((torch.chunk, Tensor.chunk, torch.split, Tensor.split), _along("dim", 2)),
    Tensor.__getitem__: _taken,
    F.pad: _padded,
    F.dropout: _dropout,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((torch.layer_norm, F.layer_norm, torch.rms_norm, F.rms_norm), _layer_norm),
    **dict.fromkeys((torch.group_norm, F.group_norm), _group_norm),
    torch.embedding: _embedding,
}
