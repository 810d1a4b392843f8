"""Runs a traced module node by node; network.py, rescale.py and chain.py say what each operation does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .operations import (
    ADD_FUNCTIONS,
    CONVOLUTION_FUNCTIONS,
    CONVOLUTIONS,
    IDENTITY_FUNCTIONS,
    IDENTITY_METHODS,
    MAX_POOLS,
    POOL_FUNCTIONS,
    POOLS,
    check_pool,
    module_kind,
    pool_rank,
)
from .structure import Structure, attribute, is_weight, place

CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# As F.max_pool2d has them; nn.MaxPool2d has the last two in the other order.
MAX_POOL_ARGUMENTS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


class Walk:
    """Runs a structure node by node; subclasses define what each operation does to their values."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure

    def run(self, value: Any) -> Any:
        """The output for the given input value."""
        known: dict[fx.Node, Any] = {}
        for node in self.structure.graph.nodes:
            if node.op == "placeholder":
                known[node] = value if node.users else None
                continue
            args = fx.node.map_arg(node.args, known.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, known.__getitem__)
            if node.op == "output":
                return args[0]
            known[node] = self._call(node, args, kwargs)
        raise AssertionError("a graph ends in an output")

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if node.op == "get_attr":
            return attribute(self.structure.module, target)
        if node.op == "call_module":
            module = self.structure.module.get_submodule(target)
            return self._module(args[0], module)
        if node.op == "call_method":
            if target in IDENTITY_METHODS:
                return args[0]
            if target == "squeeze" and not is_weight(node.args[0]):
                return self.reshape(_squeeze_behind_batch, args, kwargs)
            if target in ("mean", "sum"):
                return self._reduce(node, target, *args, **kwargs)
            if target in ("add", "add_"):
                return self.add(args[0], args[1])
            return self.reshape(lambda first, *rest, **named: getattr(first, target)(*rest, **named), args, kwargs)
        if target in IDENTITY_FUNCTIONS:
            return args[0]
        if target in ADD_FUNCTIONS:
            if all(isinstance(arg, int) for arg in args):
                return target(*args)
            return self.add(args[0], args[1])
        if target in (torch.cat, torch.concat):
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            return self.cat(list(args[0] if args else kwargs["tensors"]), dim)
        if target in (torch.mean, torch.sum):
            return self._reduce(node, "mean" if target is torch.mean else "sum", *args, **kwargs)
        if target is F.linear:
            weight, bias, x = _named(("input", "weight", "bias"), args, kwargs, "weight", "bias", "input")
            return self.linear(x, weight, bias)
        if target in CONVOLUTION_FUNCTIONS:
            given = dict(zip(CONVOLUTION_ARGUMENTS, args, strict=False)) | kwargs
            x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
            return self.convolution(x, weight, bias, target, given)
        if target in POOL_FUNCTIONS:
            kind: Any = POOL_FUNCTIONS[target]
            named = dict(zip(MAX_POOL_ARGUMENTS, args[1:], strict=False)) | kwargs
            module = kind(**named) if kind in MAX_POOLS else kind(*args[1:], **kwargs)
            check_pool(place(node), module)
            return self._module(args[0], module)
        if target is torch.squeeze and not is_weight(node.args[0]):
            return self.reshape(_squeeze_behind_batch, args, kwargs)
        return self.reshape(target, args, kwargs)

    def _module(self, x: Any, module: nn.Module) -> Any:
        kind = str(module_kind(module))
        operation = getattr(self, kind)
        if kind in POOLS and self._dim(x) == pool_rank(module) + 1:
            # Without an axis of channels torch takes axis 0, the batch, for it: windows are the same in a channel of 1.
            wide = self.reshape(torch.unsqueeze, (x, 1), {})
            return self.reshape(torch.squeeze, (operation(wide, module), 1), {})
        return operation(x, module)

    def _dim(self, x: Any) -> int | None:
        """How many axes an activation has; None in a walk that follows no shapes."""
        found: int | None = self.reshape(Tensor.dim, (x,), {})
        return found

    def check_batch_axis(self, shape: Sequence[int], module: nn.RNN) -> None:
        """Raise unless an RNN's input, whose batch is 1, has its batch axis where the RNN has it."""
        axis = 0 if module.batch_first else 1
        if len(shape) == 3 and shape[axis] == 1:
            return
        name = next(name for name, each in self.structure.module.named_modules() if each is module)
        raise ValueError(
            f"{name}: an RNN with batch_first={module.batch_first} has its batch on axis {axis}, but its input for one "
            f"sample has shape {list(shape)}. The batch is axis 0 of the model's input: use batch_first=True, or "
            "transpose the input before the RNN"
        )

    def _reduce(self, node: fx.Node, how: str, x: Any, dim: Any = None, keepdim: bool = False, **named: Any) -> Any:
        dims = named.get("axis") if dim is None else dim
        dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
        if set(named) - {"axis"} or not dims:
            raise ValueError(f"{how} needs its dimensions given")
        shape = self.reshape(lambda value: tuple(value.shape), (x,), {})
        if shape and shape[0] == 1 and any(each in (0, -len(shape)) for each in dims):
            raise ValueError(
                f"{place(node)}: {how} over axis 0 of an activation of shape {list(shape)} for one sample: that is the "
                f"batch's axis. Where inputs have more axes than input_shape {self.structure.input_shape}, pass theirs"
            )
        return self.reduce(how, x, dims, keepdim)

    def identity(self, x: Any, module: nn.Module) -> Any:
        return x

    def shape(self, x: Any, module: nn.Module) -> Any:
        return self.reshape(module, (x,), {})

    def linear_module(self, x: Any, module: nn.Linear) -> Any:
        return self.linear(x, module.weight, module.bias)

    def convolution_module(self, x: Any, module: Any) -> Any:
        function: Any = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}[
            next(kind for kind in CONVOLUTIONS if isinstance(module, kind))
        ]
        settings = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
        return self.convolution(x, module.weight, module.bias, function, settings)

    # What a subclass defines. `x` is its value of an activation.
    def reshape(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def add(self, x: Any, y: Any) -> Any:
        raise NotImplementedError

    def cat(self, values: list[Any], dim: int) -> Any:
        raise NotImplementedError

    def reduce(self, how: str, x: Any, dims: tuple[int, ...], keepdim: bool) -> Any:
        raise NotImplementedError

    def linear(self, x: Any, weight: Tensor, bias: Tensor | None) -> Any:
        raise NotImplementedError

    def convolution(self, x: Any, weight: Tensor, bias: Tensor | None, function: Any, settings: dict[str, Any]) -> Any:
        raise NotImplementedError

    def batchnorm(self, x: Any, module: Any) -> Any:
        raise NotImplementedError

    def max_pool(self, x: Any, module: Any) -> Any:
        raise NotImplementedError

    def average_pool(self, x: Any, module: Any) -> Any:
        raise NotImplementedError

    def adaptive_average(self, x: Any, module: Any) -> Any:
        raise NotImplementedError

    def adaptive_max(self, x: Any, module: Any) -> Any:
        raise NotImplementedError

    def rnn(self, x: Any, module: nn.RNN) -> Any:
        raise NotImplementedError

    def protocol(self, x: Any, module: nn.Module) -> Any:
        raise NotImplementedError


def _squeeze_behind_batch(x: Tensor, dim: Any = None) -> Tensor:
    """torch.squeeze that leaves axis 0: the batch, which is 1 in a walk alone."""
    dims = range(1, x.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
    return x.squeeze(tuple(each for each in dims if each % max(x.dim(), 1)))


def _named(names: tuple[str, ...], args: Any, kwargs: Any, *wanted: str) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name) for name in wanted]
