"""What a module is made of: its torch.fx graph, checked against the operations that have paths.

An operation without paths is a ValueError with its name and reason. `Walk` (walk.py) runs a structure.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import _check
from .operations import (
    ADD_FUNCTIONS,
    CONVOLUTION_FUNCTIONS,
    CONVOLUTIONS,
    COPY_METHODS,
    HOMOGENEOUS,
    IDENTITY_FUNCTIONS,
    IDENTITY_METHODS,
    IDENTITY_MODULES,
    POOL_FUNCTIONS,
    REASONS,
    SHAPE_FUNCTIONS,
    SHAPE_METHODS,
    SIZE_ATTRIBUTES,
    SIZE_METHODS,
    VIEW_ATTRIBUTES,
    check_pool,
    edge_names,
    module_kind,
    takes_part,
)
from .parts import Parts
from .tracing import Tracer, check_layers, check_values, graph_of

# Said of a parameter's name.
_COMPUTED = (
    "it is computed from other tensors (a parametrization, pruning, weight norm), and paths need parameters; make it "
    "one first (torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove)"
)


@dataclass
class Structure:
    """A traced module: `graph` over `module`'s layers, and the shape of one input without the batch axis."""

    module: nn.Module
    graph: fx.Graph
    input_shape: tuple[int, ...] | None

    def __post_init__(self) -> None:
        self._parts = Parts(self.module)

    def check_unchanged(self) -> None:
        """Raise where a module or parameter was replaced since."""
        self._parts.check()

    def calls_of(self, kinds: tuple[type[nn.Module], ...]) -> dict[nn.Module, tuple[str, int]]:
        """Modules of these classes that the forward calls -> their qualified name, and how often it calls them."""
        found: dict[nn.Module, tuple[str, int]] = {}
        for node in self.graph.nodes:
            module = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, kinds):
                name, times = found.get(module, (str(node.target), 0))
                found[module] = name, times + 1
        return found

    def fingerprint(self) -> str:
        """The operations with their settings, and shapes, to tell whether a saved state belongs to it."""
        nodes = [
            f"{node.op} {self._described(node)} {node.args} {node.kwargs}"
            for node in self.graph.nodes
            if node.op != "placeholder"
        ]
        shapes = [f"{name} {list(param.shape)}" for name, param in self.module.named_parameters()]
        return "; ".join([f"input {self.input_shape}", *nodes, *shapes])

    def _described(self, node: fx.Node) -> str:
        if not isinstance(node.target, str):
            return str(node.target.__name__)
        if node.op != "call_module":
            return node.target
        module = self.module.get_submodule(node.target)
        kind = module_kind(module)
        # A dropout's rate and a BatchNorm's momentum are no part of paths, and may change from run to run.
        settings = {"identity": "", "batchnorm": f"eps={getattr(module, 'eps', None)}"}.get(
            str(kind), module.extra_repr()
        )
        return f"{node.target} {kind if kind == 'identity' else type(module).__name__}({settings})"


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
        TypeError: not a module, complex parameters, an input_shape that holds no ints.
        ValueError: parameters without values, hooks on layers, an operation without paths, by its qualified name, and
            why.
    """
    _check.is_module("model", model)
    model = unwrapped(model)
    check_values(model)
    if input_shape is not None:
        try:
            input_shape = tuple(operator.index(size) for size in input_shape)
        except TypeError:
            raise TypeError(f"input_shape must be a tuple of ints such as (3, 32, 32), got {input_shape!r}") from None
        if not input_shape or min(input_shape) < 1:
            raise ValueError(f"input_shape must hold sizes of at least 1, without the batch axis, got {input_shape}")
    root = nn.Sequential(model) if Tracer().is_leaf_module(model, "") else model
    graph = graph_of(root, type(model).__name__)
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        raise ValueError(f"model must have one input, got {len(inputs)}: {[node.name for node in inputs]}")
    structure = Structure(root, graph, input_shape)
    for node in graph.nodes:
        _input_first(node)
        _check_node(structure, node)
    check_layers(root, graph, model)
    if structure.input_shape is None:
        structure.input_shape = _inferred_shape(structure)
    if not any(parameter is not None for parameter in root.parameters()):
        raise ValueError(f"model {type(model).__name__} has no parameters, hence no paths")
    return structure


def _input_first(node: fx.Node) -> None:
    """Give a call's input by position where it was given by keyword."""
    if not node.args and (len(node.kwargs) == 1 or "input" in node.kwargs):
        name = "input" if "input" in node.kwargs else next(iter(node.kwargs))
        node.args, node.kwargs = (node.kwargs[name],), {key: each for key, each in node.kwargs.items() if key != name}


def _check_node(structure: Structure, node: fx.Node) -> None:
    """Raise unless the node's operation has paths."""
    if node.op in ("placeholder", "output"):
        return
    if node.op == "get_attr":
        if str(node.target).startswith("_tensor_constant"):  # torch.fx's name for it
            raise ValueError(
                f"{place(node)}: a tensor that is made in the forward has no paths; make it a buffer (register_buffer)"
            )
        value = attribute(structure.module, str(node.target))
        if isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter):
            raise ValueError(f"{node.target}: {_COMPUTED}")
        return
    _check_weights(node)
    if node.op == "call_module":
        _check_module(structure, node)
        return
    if node.target in (*ADD_FUNCTIONS, "add", "add_") and (len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1):
        raise ValueError(f"{place(node)}: {node.name} must add two activations, given by position and without alpha")
    if node.op == "call_function":
        _check_function(structure, node)
    elif node.target not in (*IDENTITY_METHODS, *SHAPE_METHODS, "mean", "sum", "add", "add_"):
        raise _no_paths_error(place(node), node.target)


def _check_module(structure: Structure, node: fx.Node) -> None:
    """Raise unless the layer has paths, in its settings and as it is called."""
    module = structure.module.get_submodule(str(node.target))
    if isinstance(module, (nn.SyncBatchNorm,)) or module_kind(module) is None:
        raise _no_paths_error(str(node.target), type(module))
    if isinstance(module, nn.RNN) and module.nonlinearity != "relu":
        raise ValueError(
            f"{node.target}: RNN with {module.nonlinearity} has no paths: {HOMOGENEOUS}; use nonlinearity='relu'"
        )
    if isinstance(module, nn.RNN) and module.proj_size:
        raise ValueError(f"{node.target}: an RNN with proj_size is not supported")
    if isinstance(module, (*CONVOLUTIONS,)) and module.padding_mode != "zeros":
        raise ValueError(f"{node.target}: padding_mode={module.padding_mode!r} is not supported, use 'zeros'")
    check_pool(str(node.target), module)
    if isinstance(module, nn.RNN) and len(node.args) + len(node.kwargs) > 1:
        raise ValueError(f"{node.target}: an RNN with a given initial state is not supported")
    if len(node.args) != 1 or node.kwargs:
        given = len(node.args) + len(node.kwargs)
        raise ValueError(f"{node.target}: a layer takes its input alone here, and is called with {given} arguments")
    try:
        names = edge_names(module)
    except ValueError as error:
        raise ValueError(f"{node.target}: {error}") from error
    for name in names:
        owner, _, last = name.rpartition(".")
        part = module.get_submodule(owner)
        if last not in part._parameters and last not in part._buffers:
            raise ValueError(f"{node.target}: {name}: {_COMPUTED}")


def _check_function(structure: Structure, node: fx.Node) -> None:
    """Raise unless the function has paths, with these arguments."""
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
        raise _no_paths_error(place(node), target)
    if target in (operator.mul, operator.floordiv) and any(_is_value(structure, arg) for arg in node.args):
        raise ValueError(f"{place(node)}: a product or quotient of activations has no paths: {HOMOGENEOUS}")
    if target is getattr and node.args[1] not in (*VIEW_ATTRIBUTES, *SIZE_ATTRIBUTES):
        raise _no_paths_error(place(node), node.args[1])


def is_weight(node: Any) -> bool:
    """Whether a node is a parameter, or a view of one: what a linear map can have as its weight or bias."""
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if node.op == "call_function" and node.target is getattr:
            is_view = node.args[1] in VIEW_ATTRIBUTES
        elif node.op == "call_function":
            is_view = node.target in SHAPE_FUNCTIONS
        elif node.op == "call_method":
            is_view = node.target in (*SHAPE_METHODS, *COPY_METHODS) and node.target not in SIZE_METHODS
        else:
            is_view = False
        if not is_view:
            return False
        node = node.args[0]
    return isinstance(node, fx.Node)


def _check_weights(node: fx.Node) -> None:
    """Raise where a parameter is anything but the weight or bias of a linear map, or an activation is one."""
    if node.target is F.linear or node.target in CONVOLUTION_FUNCTIONS:
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        weights = [given[name] for name in ("weight", "bias") if given.get(name) is not None]
        if is_weight(given["input"]) or not all(map(is_weight, weights)):
            raise ValueError(
                f"{place(node)}: {node.name} needs an activation as its input, and parameters, or views of them, as "
                "its weight and bias"
            )
        return
    is_size = node.op == "call_method" and node.target in SIZE_METHODS
    if not (is_size or node.target is getattr or is_weight(node)) and any(map(is_weight, node.all_input_nodes)):
        raise ValueError(
            f"{place(node)}: {node.name} takes a parameter, which has paths only as the weight or bias of a linear "
            "map, directly or through a view (transpose, view, ...)"
        )


def _is_value(structure: Structure, arg: Any) -> bool:
    """Whether an argument is an activation or a parameter, not a size."""
    if not isinstance(arg, fx.Node):
        return False
    if arg.op == "call_method" and arg.target in SIZE_METHODS:
        return False
    if arg.op == "call_function" and arg.target is getattr:
        return arg.args[1] in VIEW_ATTRIBUTES
    if arg.op == "call_function" and arg.target in (operator.getitem, operator.mul, operator.floordiv):
        return _is_value(structure, arg.args[0])
    return True


def place(node: fx.Node) -> str:
    """The qualified name of the module in whose forward a node stands."""
    stack = node.meta.get("nn_module_stack")
    return (list(stack.values())[-1][0] or "the model's forward") if stack else "the model's forward"


def _no_paths_error(place: str, what: Any) -> ValueError:
    name = what if isinstance(what, str) else getattr(what, "__name__", repr(what))
    reason = next((why for kind, why in REASONS.items() if isinstance(what, type) and issubclass(what, kind)), None)
    return ValueError(f"{place}: {name} has no paths: {reason or HOMOGENEOUS}")


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
            if isinstance(module, nn.Linear) or (takes_part(module) and isinstance(_features(module), int)):
                return (_features(module),)
            if isinstance(module, nn.BatchNorm1d):
                return (module.num_features,)
            if not isinstance(module, (*IDENTITY_MODULES, nn.Flatten)):
                return None
        elif node.op == "call_function" and node.target is F.linear:
            weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
            if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
                return None
            return (attribute(structure.module, str(weight.target)).shape[1],)
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
