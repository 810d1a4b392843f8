"""What a module is made of: its torch.fx graph, checked against the operations that have paths.

`Walk` runs a traced module node by node; a subclass says what an affine map, a pooling and so on do to its values
(network.py sums paths, rescale.py follows units). An operation without paths is a ValueError with its name and reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

IDENTITY_MODULES = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ADAPTIVE_AVERAGES = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
ADAPTIVE_MAXIMA = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
SHAPE_MODULES = (nn.Flatten, nn.Unflatten)

IDENTITY_FUNCTIONS = (F.relu, torch.relu, F.relu_, torch.relu_, F.leaky_relu, F.dropout, F.dropout2d, torch.dropout)
SHAPE_FUNCTIONS = (
    torch.flatten,
    torch.reshape,
    torch.permute,
    torch.transpose,
    torch.squeeze,
    torch.unsqueeze,
    torch.movedim,
    operator.getitem,
    getattr,
    operator.mul,
    operator.floordiv,
    torch.unflatten,
)
ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
CONVOLUTION_FUNCTIONS = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
POOL_FUNCTIONS = {
    F.max_pool1d: nn.MaxPool1d,
    F.max_pool2d: nn.MaxPool2d,
    F.max_pool3d: nn.MaxPool3d,
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
    F.avg_pool3d: nn.AvgPool3d,
    torch.max_pool1d: nn.MaxPool1d,
    torch.max_pool2d: nn.MaxPool2d,
    torch.max_pool3d: nn.MaxPool3d,
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_avg_pool3d: nn.AdaptiveAvgPool3d,
}
IDENTITY_METHODS = ("relu", "relu_", "contiguous", "clone", "detach")
SHAPE_METHODS = (
    "flatten",
    "view",
    "reshape",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "size",
    "dim",
    "movedim",
    "unflatten",
    "mT",
    "select",
    "narrow",
)

REASONS = {
    nn.LayerNorm: "its output depends on all units of a sample at once",
    nn.GroupNorm: "its output depends on all units of a group at once",
    nn.LSTM: "its gates multiply units by units",
    nn.GRU: "its gates multiply units by units",
    nn.MultiheadAttention: "attention multiplies units by units",
    nn.Embedding: "its input is an index; put it outside the model",
    nn.ReLU6: "it saturates: ReLU6(c x) is not c ReLU6(x)",
    nn.PReLU: "its slope is a parameter",
    nn.Softmax: "softmax is not positively homogeneous; put it into the loss",
    nn.LogSoftmax: "log-softmax is not positively homogeneous; put it into the loss",
}
HOMOGENEOUS = "paths need operations with f(c x) = c f(x) for c > 0, such as Linear, convolutions, ReLU and pooling"


def path_weights(module: nn.Module) -> Sequence[str] | None:
    """The names of the parameters of a layer that takes part through the protocol `__path_weights__`, else None.

    A layer whose output is linear in its input and in each of these parameters (a Tensor-Train layer; a Bayesian layer
    in mean mode) has a method `__path_weights__(self)` that returns their names. Its |w|^p form is its own forward,
    run with |w|^p in place of each. In a mode without paths it raises ValueError.
    """
    method = getattr(module, "__path_weights__", None)
    if method is not None:
        return tuple(method())
    for kind, names in _REGISTERED.items():
        if isinstance(module, kind):
            return tuple(names(module))
    return None


_REGISTERED: dict[type[nn.Module], Callable[[nn.Module], Sequence[str]]] = {}


def register_layer(kind: type[nn.Module], names: Callable[[Any], Sequence[str]]) -> None:
    """Let layers of a class take part in paths: for classes that cannot have a method `__path_weights__`.

    Args:
        kind: a module class whose output is linear in its input and in each of the named parameters.
        names: module -> the names of the parameters that are edges; it raises ValueError where there are no paths.

    Example:
        >>> import torch, finite_width as fw
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
        ...     def forward(self, x):
        ...         return x * self.scale
        >>> fw.pathsgd.register_layer(Scale, lambda layer: ["scale"])
        >>> float(fw.pathsgd.path_norm(Scale(), p=1, input_shape=(2,)))
        5.0
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a subclass of torch.nn.Module, got {kind!r}")
    _REGISTERED[kind] = names


def _takes_part(module: nn.Module) -> bool:
    return hasattr(module, "__path_weights__") or isinstance(module, tuple(_REGISTERED))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _takes_part(m) or isinstance(m, tuple(REASONS)):
            return True
        return m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)


@dataclass
class Structure:
    """A traced module: `graph` over `module`'s layers, and the shape of one input without the batch axis."""

    module: nn.Module
    graph: fx.Graph
    input_shape: tuple[int, ...] | None

    def fingerprint(self) -> str:
        """The operations and parameter shapes, to tell whether a saved state belongs to this structure."""
        nodes = [
            f"{node.op} {node.target if isinstance(node.target, str) else node.target.__name__}"
            for node in self.graph.nodes
        ]
        shapes = [f"{name} {list(param.shape)}" for name, param in self.module.named_parameters()]
        return "; ".join(nodes + shapes)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel or torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def trace(model: nn.Module, input_shape: Sequence[int] | None = None) -> Structure:
    """Trace a module and check every operation.

    Args:
        model: a module of operations that have paths.
        input_shape: one input's shape, without the batch axis; inferred where the first layer is a Linear.

    Raises:
        TypeError: not a module.
        ValueError: an operation without paths, by its qualified name, and why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    root = nn.Sequential(model) if _Tracer().is_leaf_module(model, "") else model
    tracer = _Tracer()
    try:
        graph = tracer.trace(root)
    except Exception as error:  # whatever the user's forward raises when run on symbols
        raise ValueError(
            f"model: torch.fx cannot follow the forward of {type(model).__name__} ({error}); paths need a forward "
            "without control flow that depends on the input"
        ) from error
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        raise ValueError(f"model must have one input, got {len(inputs)}: {[node.name for node in inputs]}")
    if input_shape is not None:
        input_shape = tuple(int(size) for size in input_shape)
        if not input_shape or min(input_shape) < 1:
            raise ValueError(f"input_shape must hold sizes of at least 1, without the batch axis, got {input_shape}")
    structure = Structure(root, graph, input_shape)
    for node in graph.nodes:
        _check_node(structure, node)
    if structure.input_shape is None:
        structure.input_shape = _inferred_shape(structure)
    if not any(parameter is not None for parameter in root.parameters()):
        raise ValueError(f"model {type(model).__name__} has no parameters, hence no paths")
    return structure


def _check_node(structure: Structure, node: fx.Node) -> None:
    """Raise unless the node's operation has paths."""
    if node.op in ("placeholder", "output", "get_attr"):
        return
    if node.op == "call_module":
        module = structure.module.get_submodule(str(node.target))
        if isinstance(module, (nn.SyncBatchNorm,)) or _module_kind(module) is None:
            raise _no_paths(str(node.target), type(module), structure)
        if isinstance(module, nn.RNN) and module.nonlinearity != "relu":
            raise ValueError(
                f"{node.target}: RNN with {module.nonlinearity} has no paths: {HOMOGENEOUS}; use nonlinearity='relu'"
            )
        if isinstance(module, nn.RNN) and module.proj_size:
            raise ValueError(f"{node.target}: an RNN with proj_size is not supported")
        if isinstance(module, (*CONVOLUTIONS,)) and module.padding_mode != "zeros":
            raise ValueError(f"{node.target}: padding_mode={module.padding_mode!r} is not supported, use 'zeros'")
        if isinstance(module, MAX_POOLS) and module.dilation not in (1, (1, 1), (1, 1, 1)):
            raise ValueError(f"{node.target}: a dilated max pool is not supported")
        try:
            path_weights(module)
        except ValueError as error:
            raise ValueError(f"{node.target}: {error}") from error
        return
    if node.op == "call_function":
        target = node.target
        known = (
            *IDENTITY_FUNCTIONS,
            *SHAPE_FUNCTIONS,
            *ADD_FUNCTIONS,
            *POOL_FUNCTIONS,
            *CONVOLUTION_FUNCTIONS,
            F.linear,
            torch.cat,
            torch.concat,
            torch.mean,
            torch.sum,
        )
        if target not in known:
            raise _no_paths(_place(node), target, structure)
        if target is operator.mul and any(_is_value(structure, arg) for arg in node.args):
            raise ValueError(f"{_place(node)}: a product of activations has no paths: {HOMOGENEOUS}")
        return
    if node.target not in (*IDENTITY_METHODS, *SHAPE_METHODS, "mean", "sum", "add", "add_"):
        raise _no_paths(_place(node), node.target, structure)


def _is_value(structure: Structure, arg: Any) -> bool:
    """Whether an argument is an activation or a parameter, not a size."""
    if not isinstance(arg, fx.Node):
        return False
    if arg.op == "call_method" and arg.target in ("size", "dim"):
        return False
    if arg.op == "call_function" and arg.target in (getattr, operator.getitem, operator.mul, operator.floordiv):
        return arg.target is not getattr and _is_value(structure, arg.args[0])
    return True


def _place(node: fx.Node) -> str:
    """The qualified name of the module in whose forward a node stands."""
    stack = node.meta.get("nn_module_stack")
    return (list(stack.values())[-1][0] or "the model's forward") if stack else "the model's forward"


def _no_paths(place: str, what: Any, structure: Structure) -> ValueError:
    name = what if isinstance(what, str) else getattr(what, "__name__", repr(what))
    reason = next((why for kind, why in REASONS.items() if isinstance(what, type) and issubclass(what, kind)), None)
    return ValueError(f"{place}: {name} has no paths: {reason or HOMOGENEOUS}")


def _module_kind(module: nn.Module) -> str | None:
    """The name of Walk's method for a module."""
    kinds: list[tuple[tuple[type, ...], str]] = [
        (IDENTITY_MODULES, "identity"), ((nn.Linear,), "linear_module"), (CONVOLUTIONS, "convolution_module"),
        (BATCHNORMS, "batchnorm"), (MAX_POOLS, "max_pool"), (AVERAGE_POOLS, "average_pool"),
        (ADAPTIVE_AVERAGES, "adaptive_average"), (ADAPTIVE_MAXIMA, "adaptive_max"), (SHAPE_MODULES, "shape"),
        ((nn.RNN,), "rnn"),
    ]  # fmt: skip
    if _takes_part(module):
        return "protocol"
    return next((name for types, name in kinds if isinstance(module, types)), None)


def _inferred_shape(structure: Structure) -> tuple[int, ...] | None:
    """(in_features,) where the input meets a Linear first, else None."""
    node = next(n for n in structure.graph.nodes if n.op == "placeholder" and n.users)
    while True:
        users = [user for user in node.users if _is_value(structure, user)]
        if not users:
            return None
        node = users[0]
        if node.op == "call_module":
            module = structure.module.get_submodule(str(node.target))
            if isinstance(module, nn.Linear) or (_takes_part(module) and isinstance(_features(module), int)):
                return (_features(module),)
            if isinstance(module, nn.BatchNorm1d):
                return (module.num_features,)
            if not isinstance(module, (*IDENTITY_MODULES, nn.Flatten)):
                return None
        elif node.op == "call_function" and node.target is F.linear:
            weight = node.args[1]
            return (attribute(structure.module, str(weight.target)).shape[1],) if isinstance(weight, fx.Node) else None
        elif node.op == "output" or (
            node.op == "call_function" and node.target not in (*IDENTITY_FUNCTIONS, torch.flatten, torch.reshape)
        ):
            return None


def _features(module: nn.Module) -> Any:
    return getattr(module, "in_features", None)


def attribute(module: nn.Module, target: str) -> Any:
    """The attribute with a qualified name."""
    for part in target.split("."):
        module = getattr(module, part)
    return module


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
            if isinstance(module, nn.RNN) and len(args) + len(kwargs) > 1:
                raise ValueError(f"{target}: an RNN with a given initial state is not supported")
            return getattr(self, str(_module_kind(module)))(args[0], module)
        if node.op == "call_method":
            if target in IDENTITY_METHODS:
                return args[0]
            if target in ("mean", "sum"):
                return self._reduce(target, *args, **kwargs)
            if target in ("add", "add_"):
                return self.add(args[0], args[1])
            return self.reshape(lambda first, *rest, **named: getattr(first, target)(*rest, **named), args, kwargs)
        if target in IDENTITY_FUNCTIONS:
            return args[0] if args else kwargs["input"]
        if target in ADD_FUNCTIONS:
            if all(isinstance(arg, int) for arg in args[:2]):
                return target(*args)
            return self.add(args[0], args[1])
        if target in (torch.cat, torch.concat):
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            return self.cat(list(args[0] if args else kwargs["tensors"]), dim)
        if target in (torch.mean, torch.sum):
            return self._reduce("mean" if target is torch.mean else "sum", *args, **kwargs)
        if target is F.linear:
            weight, bias, x = _named(("input", "weight", "bias"), args, kwargs, "weight", "bias", "input")
            return self.linear(x, weight, bias)
        if target in CONVOLUTION_FUNCTIONS:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            given = dict(zip(names, args, strict=False)) | kwargs
            x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
            return self.convolution(x, weight, bias, target, given)
        if target in POOL_FUNCTIONS:
            kind: Any = POOL_FUNCTIONS[target]
            given = {key: value for key, value in kwargs.items() if key != "input"}
            module = kind(*args[1:], **given)
            return getattr(self, str(_module_kind(module)))(args[0] if args else kwargs["input"], module)
        return self.reshape(target, args, kwargs)

    def _reduce(self, how: str, x: Any, dim: Any = None, keepdim: bool = False, **named: Any) -> Any:
        if set(named) - {"axis"} or (dim is None and "axis" not in named):
            raise ValueError(f"{how} needs its dimensions given")
        dims = dim if dim is not None else named["axis"]
        return self.reduce(how, x, (dims,) if isinstance(dims, int) else tuple(dims), keepdim)

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


def _named(names: tuple[str, ...], args: Any, kwargs: Any, *wanted: str) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name) for name in wanted]
