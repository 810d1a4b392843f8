"""Runs a model and records where its parameters are used, so that nothing can be missed.

Under a TorchFunctionMode every call of a recognised operation (dense, convolution, norm, embedding) whose weight or
bias is a counting parameter runs with the parameter's detached self, and its input and the place of its output in
the autograd graph are recorded. The output's cotangent δ and the input then give the parameter's Jacobian. Whatever
use is not recognised keeps its edge to the parameter: afterwards, a parameter that the graph still reaches has a use
that was not recorded, and its whole Jacobian is computed by autograd instead (generic.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from .._gemm import gemm, gemm_below_autograd
from .._library import nothing_to_differentiate
from . import ops
from .contract import FLOATS
from .precision import splits_dense_layers

# Channels in and out of each group from which on a grouped convolution runs on this library's kernel: below, its
# register tiles would stay mostly empty.
LEAST_CHANNELS = 8


@dataclass
class Use:
    """One recorded use of parameters."""

    kind: str  # "dense", "conv", "conv_transpose", "scale" or "embedding"
    weight: str | None  # the parameter's name, if it counts
    bias: str | None
    input: Tensor  # detached: the layer's input; the normalised input of a "scale"; the tokens of an "embedding"
    version: int  # of the input when it was recorded
    edge: GradientEdge  # where the output's cotangent arrives
    shape: torch.Size  # of the output
    options: dict[str, Any] = field(default_factory=dict)

    def signature(self) -> tuple[Any, ...]:
        """What must agree between two row blocks for a plan made on one to hold for the other."""
        return self.kind, self.weight, self.bias, len(self.shape), self.shape[2:], self.options


class _Anchored(torch.autograd.Function):
    """Runs call() and gives its result a place in the graph, though nothing before it requires a gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: Callable[[], Tensor]) -> Tensor:
        return call()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class _Dense(torch.autograd.Function):
    """rows [R, I] times matrix [I, C] plus bias, forward and backward on the better matrix product.

    Beside the rows nothing that requires a gradient comes in; the anchor gives the result its place in the graph.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, bias: Tensor | None, anchor: Tensor) -> Tensor:
        ctx.matrix = matrix
        return _product(rows, matrix, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad, matrix = grads[0], ctx.matrix.t()
        if not nothing_to_differentiate():
            return gemm(grad, matrix), None, None, None
        if grad.stride(0) == 0 and len(grad) > 1:  # one row again and again, such as a unit cotangent
            return _product(grad[:1], matrix).expand(len(grad), -1), None, None, None
        return _product(grad, matrix), None, None, None


def _product(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    if splits_dense_layers(rows):
        return ops.dense(rows, matrix, bias)
    return gemm_below_autograd(rows, matrix, bias)


class _Convolved(torch.autograd.Function):
    """A convolution with stride 1, forward and backward on this library's kernel.

    Only `source` requires a gradient. It is the layer's input or, with `gated`, what a ReLU made the input from: then
    the ReLU's backward is done on the way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gated: bool,
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        ctx.weight, ctx.padding, ctx.dilation, ctx.groups = weight, padding, dilation, groups
        ctx.gated = gated
        if gated:
            ctx.save_for_backward(input)  # raises in the backward if the input was written in place meanwhile
        return ops.convolve(input, weight, bias, None, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weight, groups, gate = ctx.weight, ctx.groups, ctx.saved_tensors[0] if ctx.gated else None
        kernel = weight.shape[2:]
        flipped = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(*range(2, weight.dim()))
        padding = [d * (k - 1) - p for d, k, p in zip(ctx.dilation, kernel, ctx.padding, strict=True)]
        return ops.convolve(grads[0], flipped, None, gate, padding, ctx.dilation, groups), *[None] * 7


class Capture(TorchFunctionMode):
    """Records the uses of the given parameters while the model runs inside it."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(value): name for name, value in parameters.items()}
        self.parameters = parameters
        self.uses: list[Use] = []
        self.anchor = torch.zeros((), requires_grad=True)
        # Transposed views of parameters: id -> (the view, kept alive; the parameter).
        self.transposed: dict[int, tuple[Tensor, Tensor]] = {}
        # Results of ReLUs: id -> (the result, kept alive; its version; the input; its version).
        self.rectified: dict[int, tuple[Tensor, int, Tensor, int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recognise = _RECOGNISED.get(func)
        if recognise is not None:
            if torch.is_grad_enabled() and _saved_tensors_hooks() is None:
                try:
                    result = recognise(self, *args, **kwargs)
                except TypeError:  # other arguments than the recogniser knows, such as out=
                    result = NotImplemented
                if result is not NotImplemented:
                    return result
        elif (
            isinstance(func, FunctionType)
            and func.__module__ == "torch.nn.functional"
            and self._names_any(args, kwargs)
        ):
            with self:  # the body's own calls pass through this mode, too
                return _opened(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def _names_any(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return any(id(value) in self.names for value in (*args, *kwargs.values()))

    def name(self, value: Any) -> str | None:
        return None if value is None else self.names.get(id(value))

    def record(
        self,
        kind: str,
        weight: Tensor | None,
        bias: Tensor | None,
        input: Tensor,
        call: Callable[[Tensor | None, Tensor | None], Tensor],
        shape: Callable[[Tensor], torch.Size] = lambda result: result.shape,
        **options: Any,
    ) -> Tensor:
        """Run call(weight, bias) with counting parameters detached, and record the use."""
        weight_name, bias_name = self.name(weight), self.name(bias)
        used_weight = weight.detach() if weight is not None and weight_name else weight
        used_bias = bias.detach() if bias is not None and bias_name else bias
        if kind == "dense" or any(
            value is not None and value.requires_grad for value in (input, used_weight, used_bias)
        ):
            result = call(used_weight, used_bias)
        else:
            result = _Anchored.apply(self.anchor, lambda: call(used_weight, used_bias))
        if weight_name or bias_name:
            self.uses.append(
                Use(
                    kind,
                    weight_name,
                    bias_name,
                    input.detach(),
                    input._version,
                    GradientEdge(result.grad_fn, result.output_nr),  # type: ignore[arg-type]
                    shape(result),
                    options,
                )
            )
        return result

    def unrecognised(self, result: Tensor) -> set[str]:
        """The parameters that the graph of the result still reaches."""
        reached: set[str] = set()
        if result.grad_fn is None:
            return {self.names[id(result)]} if id(result) in self.names else reached
        seen = {result.grad_fn}
        stack = [result.grad_fn]
        while stack:
            node = stack.pop()
            if node.name() == "CheckpointFunctionBackward":
                raise ValueError(
                    "model: it uses torch.utils.checkpoint with use_reentrant=True, which hides parameters from "
                    "torch.autograd.grad; pass use_reentrant=False"
                )
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self.names:
                reached.add(self.names[id(variable)])
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    stack.append(following)
        return reached


def _saved_tensors_hooks() -> Any:
    """Hooks such as a checkpoint's: inside it the forward runs again in the backward, without this mode."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


_OPENED: dict[FunctionType, FunctionType] = {}


def _opened(func: FunctionType) -> FunctionType:
    """The Python function without its own override check, which would call the mode again instead of the body."""
    if func not in _OPENED:
        unchecked = {
            name: (lambda *_: False)
            for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
        }
        copy = FunctionType(func.__code__, {**func.__globals__, **unchecked}, func.__name__, func.__defaults__)
        copy.__kwdefaults__ = func.__kwdefaults__
        _OPENED[func] = copy
    return _OPENED[func]


def _ordinary(*values: Tensor | None) -> bool:
    """Whether all are plain float tensors of one dtype."""
    dtype = None
    for value in values:
        if value is None:
            continue
        # Inside the model's own torch.func transforms tensors are wrapped, and an edge of the graph is no cotangent.
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            return False
        if dtype is None:
            dtype = value.dtype
        elif value.dtype != dtype:
            return False
    return dtype in FLOATS


def _linear(capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    flipped = False
    if id(weight) in capture.transposed:  # F.linear(x, W.T)
        weight, flipped = capture.transposed[id(weight)][1], True
    return _dense(capture, input, weight, bias, flipped)


def _matmul(capture: Capture, input: Any, other: Any) -> Any:
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return NotImplemented
    if id(other) in capture.transposed:  # x @ W.T
        return _dense(capture, input, capture.transposed[id(other)][1], None, False)
    return _dense(capture, input, other, None, True) if capture.name(other) else NotImplemented


def _addmm(capture: Capture, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1 or input.dim() != 1 or mat1.dim() != 2:
        return NotImplemented
    if id(mat2) in capture.transposed:
        return _dense(capture, mat1, capture.transposed[id(mat2)][1], input, False)
    return _dense(capture, mat1, mat2, input, True)


def _dense(capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None, flipped: bool) -> Any:
    """input [..., I] times weight [C, I] (or [I, C] where flipped), plus bias, on the better matrix product."""
    if input.dim() < 2 or weight.dim() != 2 or not _ordinary(input, weight, bias):
        return NotImplemented
    matrix = weight if flipped else weight.t()
    if input.shape[-1] != matrix.shape[0] or (bias is not None and bias.shape != matrix.shape[1:]):
        return NotImplemented
    lead = input.shape[:-1]
    shape = torch.Size((*lead, matrix.shape[1]))

    def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        matrix = weight if flipped else weight.t()
        if matrix.requires_grad or (bias is not None and bias.requires_grad):
            return gemm(rows, matrix, bias)
        result: Tensor = _Dense.apply(rows, matrix, bias, capture.anchor)
        return result

    result = capture.record("dense", weight, bias, input, call, lambda _: shape, flipped=flipped)
    return result if input.dim() == 2 else result.view(shape)


def _transpose(view: Callable[..., Tensor]) -> Callable[..., Any]:
    def recognise(capture: Capture, input: Tensor, *axes: Any, **named: Any) -> Any:
        result = view(input, *axes, **named)
        turned = not axes and not named
        turned = turned or {axis % 2 for axis in (*axes, *named.values()) if isinstance(axis, int)} == {0, 1}
        if capture.name(input) and input.dim() == 2 and turned:
            capture.transposed[id(result)] = (result, input)
        return result

    return recognise


def _tuple(value: int | Sequence[int], size: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * size if len(values) == 1 else values


def _relu(capture: Capture, input: Tensor, inplace: bool = False) -> Any:
    if inplace or not input.requires_grad or not _ordinary(input):
        return NotImplemented
    result = torch.relu(input)
    capture.rectified[id(result)] = (result, result._version, input, input._version)
    return result


def _before_relu(capture: Capture, value: Tensor) -> Tensor | None:
    """What a ReLU made this value from, if neither was written in place since."""
    result, version, input, input_version = capture.rectified.get(id(value), (None, 0, value, 0))
    return input if result is value and (value._version, input._version) == (version, input_version) else None


def _kernel_serves(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], groups: int) -> bool:
    """Whether a convolution runs on this library's kernel: on the CPU, with stride 1 and groups of some width."""
    if weight.requires_grad or (bias is not None and bias.requires_grad) or input.device.type != "cpu":
        return False
    wide = groups == 1 or min(weight.shape[1], weight.shape[0] // groups) >= LEAST_CHANNELS
    return wide and all(step == 1 for step in stride)


def _conv(convolve: Callable[..., Tensor], spatial: int) -> Callable[..., Any]:
    def recognise(
        capture: Capture,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if not (capture.name(weight) or capture.name(bias)) or not _ordinary(input, weight, bias):
            return NotImplemented
        if input.dim() != spatial + 2:
            return NotImplemented
        kernel, stride, dilation = tuple(weight.shape[2:]), _tuple(stride, spatial), _tuple(dilation, spatial)
        if padding == "valid":
            padding = 0
        if padding == "same":
            total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            if any(size % 2 for size in total):  # more on the right than on the left
                sides = [side for size in reversed(total) for side in (size // 2, size - size // 2)]
                input, padding = F.pad(input, sides), 0
            else:
                padding = [size // 2 for size in total]
        padding = _tuple(padding, spatial)
        geometry = (kernel, stride, padding, dilation, groups)

        def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
            assert weight is not None
            if not _kernel_serves(input, weight, bias, stride, groups):
                return convolve(input, weight, bias, stride, padding, dilation, groups)
            source = _before_relu(capture, input)
            result: Tensor = _Convolved.apply(
                input if source is None else source,
                input.detach(),
                weight,
                bias,
                source is not None,
                padding,
                dilation,
                groups,
            )
            return result

        return capture.record("conv", weight, bias, input, call, geometry=geometry)

    return recognise


def _conv_transpose(convolve: Callable[..., Tensor], spatial: int) -> Callable[..., Any]:
    def recognise(
        capture: Capture,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        if not (capture.name(weight) or capture.name(bias)) or not _ordinary(input, weight, bias):
            return NotImplemented
        if input.dim() != spatial + 2 or any(_tuple(output_padding, spatial)):
            return NotImplemented
        stride, padding, dilation = (_tuple(value, spatial) for value in (stride, padding, dilation))
        geometry = (tuple(weight.shape[2:]), stride, padding, dilation, groups)

        def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return convolve(input, weight, bias, stride, padding, 0, groups, dilation)

        return capture.record("conv_transpose", weight, bias, input, call, geometry=geometry)

    return recognise


def _scaled(capture: Capture, normal: Tensor, weight: Tensor | None, bias: Tensor | None, axes: tuple[int, int]) -> Any:
    """normal * weight + bias, where the weight lies on the axes [axes[0], axes[1]) of the normalised input."""
    lead = normal.shape[axes[0] : axes[1]]
    shape = (*lead, *[1] * (normal.dim() - axes[1]))

    def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        result = normal if weight is None else normal * weight.reshape(shape)
        return result if bias is None else result + bias.reshape(shape)

    return capture.record("scale", weight, bias, normal, call, axes=axes)


def _layer_norm(
    capture: Capture,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    if not (capture.name(weight) or capture.name(bias)) or not _ordinary(input, weight, bias):
        return NotImplemented
    normal = torch.layer_norm(input, normalized_shape, None, None, eps, cudnn_enable)
    return _scaled(capture, normal, weight, bias, (input.dim() - len(normalized_shape), input.dim()))


def _group_norm(
    capture: Capture,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    if not (capture.name(weight) or capture.name(bias)) or not _ordinary(input, weight, bias):
        return NotImplemented
    normal = torch.group_norm(input, num_groups, None, None, eps, cudnn_enabled)
    return _scaled(capture, normal, weight, bias, (1, 2))


def _batch_norm(
    capture: Capture,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    if not (capture.name(weight) or capture.name(bias)) or not _ordinary(input, weight, bias) or training:
        return NotImplemented
    normal = torch.batch_norm(input, None, None, running_mean, running_var, False, momentum, eps, cudnn_enabled)
    return _scaled(capture, normal, weight, bias, (1, 2))


def _embedding(
    capture: Capture,
    weight: Tensor,
    input: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not capture.name(weight) or weight.dtype not in FLOATS:
        return NotImplemented
    if scale_grad_by_freq:
        raise ValueError("model: an embedding has scale_grad_by_freq=True, so its gradient depends on the other rows")

    def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return torch.embedding(weight, input)

    return capture.record("embedding", weight, None, input, call, padding_idx=padding_idx, size=weight.shape[0])


def _getter(name: str) -> Any:
    """What a TorchFunctionMode sees where the attribute of a tensor is read."""
    return getattr(Tensor, name).__get__


def _reversed(value: Tensor) -> range:
    return range(value.dim() - 1, -1, -1)


_RECOGNISED: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    torch.t: _transpose(torch.t),
    Tensor.t: _transpose(torch.t),
    torch.transpose: _transpose(torch.transpose),
    Tensor.transpose: _transpose(torch.transpose),
    _getter("T"): _transpose(lambda value, *_: value.t() if value.dim() == 2 else value.permute(*_reversed(value))),
    _getter("mT"): _transpose(lambda value, *_: value.transpose(-2, -1)),
    torch.conv1d: _conv(torch.conv1d, 1),
    torch.conv2d: _conv(torch.conv2d, 2),
    torch.conv3d: _conv(torch.conv3d, 3),
    torch.conv_transpose1d: _conv_transpose(torch.conv_transpose1d, 1),
    torch.conv_transpose2d: _conv_transpose(torch.conv_transpose2d, 2),
    torch.conv_transpose3d: _conv_transpose(torch.conv_transpose3d, 3),
    torch.layer_norm: _layer_norm,
    torch.group_norm: _group_norm,
    torch.batch_norm: _batch_norm,
    torch.embedding: _embedding,
}
