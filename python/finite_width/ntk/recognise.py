"""The operations whose use of a parameter is recorded: one function each, and the table of them.

Each gets the capture and the operation's own arguments. It runs the operation through `Capture.record`, or returns
NotImplemented where the arguments are none that it knows: the parameter keeps its edge then, and autograd computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .._gemm import gemm
from .contract import FLOATS
from .layers import Convolved, Dense
from .made import common_axes
from .recurrent import RECURRENT

if TYPE_CHECKING:
    from .capture import Capture

# Channels in and out of each group from which on a grouped convolution runs on this library's kernel: below, its
# register tiles would stay mostly empty.
LEAST_CHANNELS = 8


def _ordinary(*values: Tensor | None) -> bool:
    """Whether all are plain float tensors of one dtype."""
    if forward_ad._current_level >= 0:  # inside forward mode: an edge of the graph is no cotangent
        return False
    dtype = None
    for value in values:
        if value is None:
            continue
        # Nor is it inside the model's own torch.func transforms, where tensors are wrapped.
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            return False
        if dtype is None:
            dtype = value.dtype
        elif value.dtype != dtype:
            return False
    return dtype in FLOATS


def _counts(capture: Capture, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether weight or bias is a counting parameter, used on tensors whose cotangents can be recorded."""
    return bool(capture.name(weight) or capture.name(bias)) and _ordinary(input, weight, bias)


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
    return _dense(capture, input, other, None, True) if other.dim() == 2 and capture.name(other) else NotImplemented


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
        result: Tensor = Dense.apply(rows, matrix, bias, capture.anchor)
        return result

    result = capture.record("dense", weight, bias, input, call, lambda _: shape, flipped=flipped)
    return result if input.dim() == 2 else result.view(shape)


def _transpose(view: Callable[..., Tensor]) -> Callable[..., Any]:
    def recognise(capture: Capture, input: Tensor, *axes: Any, **named: Any) -> Any:
        result = view(input, *axes, **named)
        turned = not axes and not named
        turned = turned or {axis % 2 for axis in (*axes, *named.values()) if isinstance(axis, int)} == {0, 1}
        if id(input) in capture.names and input.dim() == 2 and turned:
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
        if not _counts(capture, input, weight, bias):
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
            result: Tensor = Convolved.apply(
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
        if not _counts(capture, input, weight, bias):
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


def _sum(capture: Capture, input: Any, other: Any, *, alpha: float = 1) -> Any:
    """Rows plus a parameter, or a value made from parameters, that all rows share."""
    return NotImplemented if alpha != 1 else _with_shared(capture, input, other, product=False)


def _difference(capture: Capture, input: Any, other: Any, *, alpha: float = 1) -> Any:
    """Rows minus such a one: plus its negative, a made value."""
    if alpha != 1 or not isinstance(input, Tensor) or not isinstance(other, Tensor) or not other.requires_grad:
        return NotImplemented
    if common_axes(input.shape, other.shape) is None:
        return NotImplemented
    return _with_shared(capture, input, -other, product=False)


def _product(capture: Capture, input: Any, other: Any) -> Any:
    """Rows times a parameter, or a value made from parameters, that all rows share."""
    return _with_shared(capture, input, other, product=True)


def _with_shared(capture: Capture, one: Any, two: Any, product: bool) -> Any:
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return NotImplemented
    for value, shared in ((one, two), (two, one)):
        axes = common_axes(value.shape, shared.shape) if shared.requires_grad else None
        if axes is None or not _is_shared(capture, value.shape, shared) or not _ordinary(value, shared):
            continue

        def call(
            weight: Tensor | None, bias: Tensor | None, value: Tensor = value, shape: torch.Size = shared.shape
        ) -> Tensor:
            return value + bias.view(shape) if weight is None else value * weight  # type: ignore[union-attr]

        weight, bias = (shared, None) if product else (None, shared)
        return capture.record("scale", weight, bias, value, call, keep_input=product, axes=axes)
    return NotImplemented


def _is_shared(capture: Capture, shape: torch.Size, shared: Tensor) -> bool:
    """Whether rows of this shape share a parameter or made value.

    What is made from parameters may be other rows' part, such as an embedding of theirs, where there is a single row:
    so the probe decides by the shapes of several rows.
    """
    if id(shared) in capture.names:
        return True
    if capture.deciding:
        once = shared.dim() < len(shape) or shared.shape[0] == 1 < shape[0]
        if not once or not capture.name(shared):
            return False
        capture.shared.add(capture.number)
        return True
    return capture.number in capture.shared and bool(capture.name(shared))


def _expanded(view: Callable[..., Tensor]) -> Callable[..., Any]:
    """A parameter or made value repeated for all rows, such as a class token."""

    def recognise(capture: Capture, input: Tensor, *sizes: Any, **named: Any) -> Any:
        if not input.requires_grad:
            return NotImplemented
        shape = view(input.detach(), *sizes, **named).shape
        axes = common_axes(shape, input.shape)
        if axes is None or not _is_shared(capture, shape, input) or not _ordinary(input):
            return NotImplemented

        def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
            assert bias is not None
            return view(bias, *sizes, **named)

        return capture.record("scale", None, input, input.new_zeros(()).expand(shape), call, axes=axes)

    return recognise


def _rms_norm(
    capture: Capture,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    if not _counts(capture, input, weight, None):
        return NotImplemented
    normal = torch.rms_norm(input, normalized_shape, None, eps)
    return _scaled(capture, normal, weight, None, (input.dim() - len(normalized_shape), input.dim()))


def _layer_norm(
    capture: Capture,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    if not _counts(capture, input, weight, bias):
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
    if not _counts(capture, input, weight, bias):
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
    if not _counts(capture, input, weight, bias) or training or running_mean is None or running_var is None:
        return NotImplemented
    if not _ordinary(input, running_mean, running_var):
        return NotImplemented
    mean, rate = (_along_channels(value, input) for value in (running_mean, (running_var + eps).rsqrt()))

    def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        # One product in the backward, where the normalised input times the weight would take two.
        slope = rate if weight is None else rate * _along_channels(weight, input)
        shift = -mean * slope
        return input * slope + (shift if bias is None else shift + _along_channels(bias, input))

    return capture.record("scale", weight, bias, (input - mean) * rate, call, axes=(1, 2))


def _along_channels(value: Tensor, input: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (input.dim() - 2))


def _prelu(capture: Capture, input: Tensor, weight: Tensor) -> Any:
    if not _counts(capture, input, weight, None) or (weight.numel() > 1 and input.dim() < 2):
        return NotImplemented
    axes = (1, 2) if weight.numel() > 1 else (input.dim(), input.dim())

    def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return torch.prelu(input, weight)

    return capture.record("scale", weight, None, input.clamp(max=0), call, axes=axes)


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
        raise _depends_on_others_error()

    def call(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return torch.embedding(weight, input)

    return capture.record("embedding", weight, None, input, call, padding_idx=padding_idx, size=weight.shape[0])


def _embedding_bag(
    capture: Capture,
    weight: Tensor,
    input: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    *others: Any,
    **named: Any,
) -> Any:
    if scale_grad_by_freq:
        raise _depends_on_others_error()
    return NotImplemented


def _depends_on_others_error() -> ValueError:
    return ValueError("model: an embedding has scale_grad_by_freq=True, so its gradient depends on the other rows")


def _renormed(capture: Capture, *args: Any, **named: Any) -> Any:
    raise ValueError("model: an embedding has max_norm, which rewrites its weight in every forward")


def _getter(name: str) -> Any:
    """What a TorchFunctionMode sees where the attribute of a tensor is read."""
    return getattr(Tensor, name).__get__


def _reversed(value: Tensor) -> range:
    return range(value.dim() - 1, -1, -1)


RECOGNISED: dict[Any, Callable[..., Any]] = {
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
    torch.add: _sum,
    Tensor.add: _sum,
    torch.sub: _difference,
    Tensor.sub: _difference,
    torch.mul: _product,
    Tensor.mul: _product,
    Tensor.expand: _expanded(Tensor.expand),
    Tensor.repeat: _expanded(Tensor.repeat),
    torch.rms_norm: _rms_norm,
    torch.layer_norm: _layer_norm,
    torch.group_norm: _group_norm,
    torch.batch_norm: _batch_norm,
    torch.prelu: _prelu,
    torch.embedding: _embedding,
    torch.embedding_bag: _embedding_bag,
    torch.embedding_renorm_: _renormed,
    **RECURRENT,
}
