"""Calls that keep rows apart: a forward of nothing else proves that its rows do not mix, and where they lie.

A value holds the rows in a layout if every entry of a row's part was made from that row alone, and from parameters,
buffers and constants. The inputs do, along their first axis; the table below says in which layout the result of a call
holds them. What a forward does beside these calls may be as harmless, but then a few rows must show it (probing.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Layout
from .recognised import getter

# Arguments that carry nothing of a row. Of any other type the contents are not known.
_PLAIN = {int, float, bool, str, complex, type(None), type(...), torch.Size}
_PLAIN |= {torch.dtype, torch.device, torch.layout, torch.memory_format}

# Arguments that the rules below do not look for.
_ALIASES = {"out", "axis", "axes"}

_MARK = "_finite_width_rows"
_FIRST = Layout(0)


class Call:
    """A call, and which of its tensors hold the rows.

    Attributes:
        held: the tensors that do, in order; they share one layout.
        others: the tensors that do not.
    """

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.held: list[Tensor] = []
        self.others: list[Tensor] = []
        self.layout = _FIRST

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def axes(self) -> int:
        """How many the first tensor has that holds the rows."""
        return self.held[0].dim()

    def first_alone(self) -> bool:
        """Whether the rows come in the first argument and nowhere else."""
        return len(self.held) == 1 and bool(self.args) and self.args[0] is self.held[0]

    def alike(self) -> bool:
        """Whether all tensors that hold the rows have as many axes, and the others are broadcast along the rows'."""
        axes, behind = self.axes, self.axes - self.layout.axis
        return all(value.dim() == axes for value in self.held) and all(
            other.dim() < behind or (other.dim() <= axes and other.shape[-behind] == 1) for other in self.others
        )

    def elsewhere(self, named: Any) -> tuple[int, ...] | None:
        """The named axes, counted from the first; None unless there are some, all of them others than the rows'."""
        count = self.axes
        given = [named] if type(named) is int else list(named) if isinstance(named, tuple | list) else []
        if not given or not all(type(axis) is int and -count <= axis < count for axis in given):
            return None
        axes = tuple(axis % count for axis in given)
        return None if self.layout.axis in axes else axes


# The layout of the call's result, or `VIEW`; None where nothing is known of it.
Rule = Callable[[Call], Layout | None]
# The values of the first argument in the same order: the layout follows from the shape of the result.
VIEW = Layout(-1)


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
        self._token = object()
        self._inputs = {id(value): value._version for value in rows}
        self._constants = constants

    def before(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Call, Layout | None]:
        """The call, and the layout in which its result will hold the rows; None where it will not.

        Ends `holds` where the call is not known to keep them apart.
        """
        call = Call(args, kwargs)
        self.holds = self._sort(call, args, 2) and self._sort(call, kwargs.values(), 2)
        if not (self.holds and call.held) or func in _ASKING:
            return call, None
        rule, found = KEEPING.get(func), None
        if rule is not None and not _ALIASES.intersection(kwargs):
            try:
                found = rule(call)
            except (IndexError, TypeError, ValueError):  # other arguments than the rule knows
                found = None
        self.holds = found is not None
        return call, found

    def after(self, call: Call, found: Layout | None, result: Any) -> Layout | None:
        """Mark what the call made; the layout in which it holds the rows."""
        if isinstance(result, tuple | list):
            layouts = {self.after(call, found, value) for value in result}
            return layouts.pop() if len(layouts) == 1 else None
        if not isinstance(result, Tensor):
            return None
        if found == VIEW:
            found = _viewed(call.held[0].shape, call.layout, result.shape, self._count)
            self.holds = self.holds and found is not None
        if found is not None and not _fits(result.shape, found, self._count):
            self.holds = False
        elif id(result) not in self._constants:
            setattr(result, _MARK, (self._token, result._version, found))
        return found

    def has(self, value: Tensor) -> bool:
        """Whether the value holds the rows along its first axis, by all that was seen."""
        return self.holds and self._layout(value) == (True, _FIRST)

    def _sort(self, call: Call, values: Iterable[Any], depth: int) -> bool:
        """Puts the tensors where they belong in the call; whether all values are known."""
        for value in values:
            if isinstance(value, Tensor):
                known, layout = self._layout(value)
                if not known:
                    return False
                if layout is None:
                    call.others.append(value)
                    continue
                if call.held and layout != call.layout:
                    return False
                call.layout = layout
                call.held.append(value)
            elif type(value) in (tuple, list, slice):
                inside = (value.start, value.stop, value.step) if type(value) is slice else value
                if depth == 0 or not self._sort(call, inside, depth - 1):
                    return False
            elif type(value) not in _PLAIN:
                return False
        return True

    def _layout(self, value: Tensor) -> tuple[bool, Layout | None]:
        """Whether the value is known, and the layout in which it holds the rows; None where it does not."""
        token, version, layout = getattr(value, _MARK, (None, 0, None))
        if token is self._token:
            return value._version == version, layout
        if id(value) in self._inputs:
            return value._version == self._inputs[id(value)], _FIRST
        return id(value) in self._constants, None


def _fits(shape: Sequence[int], layout: Layout, rows: int) -> bool:
    return layout.axis < len(shape) and shape[layout.axis] == layout.before * rows * layout.after


def _viewed(shape: Sequence[int], layout: Layout, new: Sequence[int], rows: int) -> Layout | None:
    """The layout of the same values, in the same order, in another shape; None where they lie on no single axis.

    Row r is where place // behind % rows = r. On an axis whose entries are `inner` values apart, and that has a
    multiple of rows · after entries, that is entry // after % rows, with after = behind / inner. With several rows at
    most one axis is such.
    """
    behind = layout.after * math.prod(shape[layout.axis + 1 :])  # values between one row and the next
    for axis, size in enumerate(new):
        inner = math.prod(new[axis + 1 :])
        if size and inner and behind % inner == 0 and size % (rows * (behind // inner)) == 0:
            return Layout(axis, size // (rows * (behind // inner)), behind // inner)
    return None


# What tells nothing of the values.
_ASKING = {
    *map(getter, ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_cpu", "is_nested", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.stride),
    *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex),
}


def _pointwise(call: Call) -> Layout | None:
    return call.layout if call.alike() else None


def _pointwise_in_place(call: Call) -> Layout | None:
    return _pointwise(call) if call.args[0] is call.held[0] else None


def _chosen(call: Call) -> Layout | None:
    """Of torch.where with its three arguments; with one it gives the places of all rows."""
    return _pointwise(call) if len(call.args) == 3 else None


def _along_first(axes: int | None = None) -> Rule:
    """Of convolutions and pools over so many axes, and of norms: the first axis is the rows', the next the channels'.

    With an axis less, the first would be that of the channels.
    """

    def rule(call: Call) -> Layout | None:
        enough = call.axes >= 2 if axes is None else call.axes == axes + 2
        return call.layout if call.first_alone() and call.layout == _FIRST and enough else None

    return rule


def _view(call: Call) -> Layout | None:
    reinterpreted = any(isinstance(value, torch.dtype) for value in (*call.args, *call.kwargs.values()))
    return VIEW if call.first_alone() and not reinterpreted else None


def _reduced(call: Call) -> Layout | None:
    axes = call.elsewhere(call.argument(1, "dim"))
    if axes is None or call.others or not call.first_alone():
        return None
    gone = 0 if call.argument(2, "keepdim", False) else sum(axis < call.layout.axis for axis in set(axes))
    return call.layout._replace(axis=call.layout.axis - gone)


def _along(place: int) -> Rule:
    """Of calls along an axis that they name, and which stays."""

    def rule(call: Call) -> Layout | None:
        axes = call.elsewhere(call.argument(place, "dim"))
        return call.layout if axes is not None and call.first_alone() and not call.others else None

    return rule


def _joined(call: Call) -> Layout | None:
    joins = call.elsewhere(call.argument(1, "dim", 0)) is not None
    return call.layout if joins and call.alike() and not call.others else None


def _stacked(call: Call) -> Layout | None:
    axis = call.argument(1, "dim", 0)
    if call.others or not call.alike() or type(axis) is not int or not -call.axes - 1 <= axis <= call.axes:
        return None
    return call.layout._replace(axis=call.layout.axis + (axis % (call.axes + 1) <= call.layout.axis))


def _transposed(call: Call) -> Layout | None:
    axes = [*call.args[1:], *call.kwargs.values()]
    if not call.first_alone() or len(axes) != 2 or not all(type(axis) is int for axis in axes):
        return None
    one, two = (axis % call.axes for axis in axes)
    return call.layout._replace(axis={one: two, two: one}.get(call.layout.axis, call.layout.axis))


def _permuted(call: Call) -> Layout | None:
    axes = call.args[1] if len(call.args) == 2 and isinstance(call.args[1], tuple | list) else call.args[1:]
    if not call.first_alone() or call.kwargs or not all(type(axis) is int for axis in axes):
        return None
    return call.layout._replace(axis=[axis % call.axes for axis in axes].index(call.layout.axis))


def _taken(call: Call) -> Layout | None:
    """Of integers and slices, one for each of the first axes; all of the rows' axis."""
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if call.others or not all(type(part) in (int, slice) for part in index):
        return None
    axis = call.layout.axis
    if axis < len(index) and index[axis] != slice(None):
        return None
    return call.layout._replace(axis=axis - sum(type(part) is int for part in index[:axis]))


def _dense(call: Call) -> Layout | None:
    """Of rows with a matrix that they share; the last axis is not theirs."""
    narrow = all(value.dim() <= 2 for value in call.others)
    return call.layout if narrow and call.first_alone() and call.layout.axis < call.axes - 1 else None


def _product(call: Call) -> Layout | None:
    """The same, or each row's matrices with each other."""
    return _dense(call) if len(call.held) == 1 else _of_matrices(call)


def _of_matrices(call: Call) -> Layout | None:
    return call.layout if call.alike() and call.layout.axis < call.axes - 2 else None


def _attention(call: Call) -> Layout | None:
    plain = call.argument(4, "dropout_p", 0.0) == 0 and not call.argument(7, "enable_gqa", False)
    return _of_matrices(call) if plain and len(call.held) >= 3 else None


def _with_bias(call: Call) -> Layout | None:
    if len(call.args) != 3 or len(call.held) != 1 or call.args[1] is not call.held[0] or call.layout.axis != 0:
        return None
    bias = call.args[0]
    return call.layout if bias.dim() < 2 or bias.shape[0] == 1 else None


def _padded(call: Call) -> Layout | None:
    sides = call.argument(1, "pad", ())
    return call.layout if call.first_alone() and call.layout.axis < call.axes - len(sides) // 2 else None


def _dropout(call: Call) -> Layout | None:
    return call.layout if call.first_alone() and call.argument(2, "training", True) is False else None


def _batch_norm(call: Call) -> Layout | None:
    mean, variance = call.argument(1, "running_mean"), call.argument(2, "running_var")
    running = mean is not None and variance is not None and call.argument(5, "training", False) is False
    return _along_first()(call) if running else None


def _layer_norm(call: Call) -> Layout | None:
    shape = call.argument(1, "normalized_shape")
    if shape is None or not call.first_alone():
        return None
    return call.layout if call.layout.axis < call.axes - len(shape) else None


def _embedding(call: Call) -> Layout | None:
    held = len(call.args) > 1 and len(call.held) == 1 and call.args[1] is call.held[0]
    return call.layout if held else None


def _operators(*names: str) -> list[Any]:
    return [getattr(Tensor, f"__{prefix}{name}__") for name in names for prefix in ("", "r")]


_POINTWISE = [
    *(torch.relu, Tensor.relu, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish),
    *(F.softplus, F.hardtanh, F.softsign, F.tanhshrink, F.logsigmoid, F.tanh, F.sigmoid),
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("tanh", "sigmoid", "exp", "sin", "cos", "neg")),
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("sqrt", "rsqrt", "square", "erf", "abs", "log")),
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("add", "sub", "mul", "div", "true_divide", "pow")),
    *(*_operators("add", "sub", "mul", "truediv"), Tensor.__pow__, Tensor.__neg__, Tensor.contiguous, torch.clone),
    *(Tensor.clone, Tensor.masked_fill),
]
_IN_PLACE = [torch.relu_, Tensor.relu_, Tensor.add_, Tensor.mul_, Tensor.__iadd__, Tensor.__imul__, F.relu_]
_MEANS = [getattr(owner, name) for owner in (torch, Tensor) for name in ("mean", "sum", "amax", "amin")]
_SOFTMAX = [F.softmax, F.log_softmax, torch.softmax, Tensor.softmax, torch.log_softmax, Tensor.log_softmax]
_VIEWS = [getattr(owner, name) for owner in (torch, Tensor) for name in ("flatten", "reshape", "unflatten")]
_POOLS = {
    1: (F.max_pool1d, torch.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d),
    2: (F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    3: (F.max_pool3d, torch.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d),
}

KEEPING: dict[Any, Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_IN_PLACE, _pointwise_in_place),
    torch.where: _chosen,
    **dict.fromkeys(_MEANS, _reduced),
    **dict.fromkeys(_SOFTMAX, _along(1)),
    **{pool: _along_first(axes) for axes, pools in _POOLS.items() for pool in pools},
    **{conv: _along_first(axes) for axes, conv in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), 1)},
    torch.conv_transpose1d: _along_first(1),
    torch.conv_transpose2d: _along_first(2),
    torch.conv_transpose3d: _along_first(3),
    F.linear: _dense,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm), _product),
    **dict.fromkeys((torch.mm, Tensor.mm), _dense),
    torch.addmm: _with_bias,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((*_VIEWS, Tensor.view, torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze), _view),
    **dict.fromkeys((torch.transpose, Tensor.transpose), _transposed),
    **dict.fromkeys((torch.permute, Tensor.permute), _permuted),
    torch.cat: _joined,
    torch.stack: _stacked,
    **dict.fromkeys((torch.chunk, Tensor.chunk, torch.split, Tensor.split), _along(2)),
    Tensor.__getitem__: _taken,
    F.pad: _padded,
    F.dropout: _dropout,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((torch.layer_norm, F.layer_norm, torch.rms_norm, F.rms_norm), _layer_norm),
    **dict.fromkeys((torch.group_norm, F.group_norm, torch.prelu), _along_first()),
    torch.embedding: _embedding,
}
