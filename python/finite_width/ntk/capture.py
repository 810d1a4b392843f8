"""Runs a model and records where its parameters are used, so that nothing can be missed.

Under a TorchFunctionMode every call of a recognised operation (dense, convolution, norm, embedding) whose weight or
bias is a counting parameter runs with the parameter's detached self, and its input and the place of its output in
the autograd graph are recorded. The output's cotangent δ and the input then give the parameter's Jacobian. A value
that the model made from parameters alone counts as a parameter (made.py). Whatever use is not recognised keeps its edge
to the parameter: afterwards, a parameter that the graph still reaches has a use that was not recorded, and its whole
Jacobian is computed by autograd instead (generic.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from .._interrupts import FunctionMode
from .apart import Apart
from .contract import Target
from .layers import Convolved, Dense
from .layout import Layout
from .made import Made, graph_nodes, parameters_behind
from .recognised import RECOGNISED, getter


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
    number: int  # of the call, among the recognised ones
    options: dict[str, Any] = field(default_factory=dict)
    layout: Layout | None = None  # of its input and its output, where the calls before it tell (apart.py)

    def signature(self) -> tuple[Any, ...]:
        """What must agree between two row blocks for a plan made on one to hold for the other, beside the shape."""
        return self.kind, self.weight, self.bias, self.options


# Calls by which the values in a batch can decide where its rows go: an index, a sort, a branch of Python. An underscore
# behind makes the in-place forms.
ROUTING = {
    *("index_select", "index_add", "index_copy", "index_put", "gather", "take", "take_along_dim", "masked_select"),
    *("masked_scatter", "scatter", "scatter_add", "scatter_reduce", "sort", "msort", "topk", "nonzero", "argwhere"),
    *("unique", "unique_consecutive", "one_hot"),
    *("repeat_interleave", "_pack_padded_sequence", "item", "tolist", "numpy", "__bool__", "__int__", "__index__"),
}


# Calls by which the model sets a hook on a value or its node in the graph, or differentiates itself.
INSIDE_THE_GRAPH = {
    *(Tensor.register_hook, getter("grad_fn"), Tensor.backward),
    *(torch.autograd.grad, torch.autograd.backward),
}


class PlanMismatchError(Exception):
    """A forward did not use the parameters in the way that was planned for."""


class _Anchored(torch.autograd.Function):
    """Runs call() and gives its result a place in the graph, though nothing before it requires a gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: Callable[[], Tensor]) -> Tensor:
        return call()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def _edge(result: Tensor) -> GradientEdge:
    """Where the cotangent of a result arrives, also where nothing of the model uses the result.

    On torch 2.11 a node that was written in Python goes with the last tensor that needs it, and a derivative by it then
    ends the process. The node of a view, which is not Python's, keeps it: `torch.autograd.graph.get_gradient_edge`.
    """
    node: Any = result.grad_fn
    owner = result.view_as(result).grad_fn if isinstance(node, torch._C._FunctionBase) else None
    return GradientEdge(node, result.output_nr, owner)


_OURS = tuple(function._backward_cls for function in (Dense, Convolved, _Anchored))


class Capture(FunctionMode):
    """Records the uses of a target's parameters while the model runs inside it.

    Args:
        rows: the model's inputs, where its calls are to be followed for whether they keep the rows apart.
    """

    def __init__(self, target: Target, rows: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._apart = Apart(rows, target.constants) if rows else None
        self.names = {id(value): name for name, value in target.parameters.items()}
        self.uses: list[Use] = []
        self._recorded: set[Any] = set()  # their nodes in the graph
        self.made: list[Made] = []
        self._made_names: dict[tuple[int, int], str] = {}  # by the value's id and version
        self._attached = target.choices.attached
        self.deciding = target.choices.shared is None
        self.shared = set(target.choices.shared or ())  # numbers of sums and products with a made value
        self.number = -1  # of the recognised call
        self.anchor = torch.zeros((), requires_grad=True)
        # Transposed views of parameters: id -> (the view, kept alive; the parameter).
        self.transposed: dict[int, tuple[Tensor, Tensor]] = {}
        # Results of ReLUs: id -> (the result, kept alive; its version; the input; its version).
        self.rectified: dict[int, tuple[Tensor, int, Tensor, int]] = {}
        # Whether layers may take ReLUs' backward along, and whether one did: then no gradient arrives at its input.
        self.gates, self.gated = target.choices.gates, False
        # Whether values may have decided where rows go: then each block must show that its rows lie as planned.
        self.routed = False
        # Whether the model itself differentiated through a recorded use, in whose gradient the parameter is missing.
        self.differentiated = False
        self._watched: list[RemovableHandle] = []

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for handle in self._watched:
            handle.remove()
        self._watched.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in INSIDE_THE_GRAPH:
            if self.gated:
                raise PlanMismatchError
            self.gates = False
        recognise = RECOGNISED.get(func)
        if (
            recognise is None
            and isinstance(func, FunctionType)
            and func.__module__ == "torch.nn.functional"
            and func.__closure__ is None  # one that dispatches to others, which would come back here
            and self._names_any(args, kwargs)
        ):
            with self:  # the body's own calls pass through this mode, too
                return _opened(func)(*args, **kwargs)
        apart = self._apart
        if apart is None or not apart.holds:
            return self._call(recognise, func, args, kwargs)
        (call, layout), recorded = apart.before(func, args, kwargs), len(self.uses)
        result = self._call(recognise, func, args, kwargs)
        layout = apart.after(call, layout, result)
        for use in self.uses[recorded:]:
            use.layout = layout
            apart.holds = apart.holds and layout is not None
        return result

    def _call(self, recognise: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call's result, recorded where it is recognised."""
        if recognise is not None:
            self.number += 1
            attached = self.number in self._attached
            if not attached and torch.is_grad_enabled() and _saved_tensors_hooks() is None:
                try:
                    result = recognise(self, *args, **kwargs)
                except TypeError:  # other arguments than the recogniser knows, such as out=
                    result = NotImplemented
                if result is not NotImplemented:
                    return result
        self.routed = self.routed or _routes(func, args)
        return func(*args, **kwargs)

    def keeps_rows_apart(self, result: Tensor) -> bool:
        """Whether the calls that were seen prove that no row of the result has to do with another.

        Then each use knows the layout in which its rows lie.
        """
        return self._apart is not None and self._apart.has(result) and not self._own_backward(result)

    def _own_backward(self, result: Tensor) -> bool:
        """Whether a backward in Python is behind the result that is not of this library: it may do anything."""
        nodes = graph_nodes(result.grad_fn) if result.grad_fn is not None else ()
        return any(isinstance(node, BackwardCFunction) and not isinstance(node, _OURS) for node in nodes)

    def _names_any(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return any(id(value) in self.names for value in (*args, *kwargs.values()))

    def name(self, value: Any) -> str | None:
        """The name of a counting parameter, or of a value made from such; None for any other."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        own = self.names.get(id(value)) or self._made_names.get((id(value), value._version))
        if own is None and value.grad_fn is not None:
            names = parameters_behind(value, self.names, self._recorded)
            if names:
                own = made_name(len(self.made))
                self.made.append(Made(value, names))
                self._made_names[id(value), value._version] = own
        return own

    def record(
        self,
        kind: str,
        weight: Tensor | None,
        bias: Tensor | None,
        input: Tensor,
        call: Callable[[Tensor | None, Tensor | None], Tensor],
        shape: Callable[[Tensor], torch.Size] = lambda result: result.shape,
        keep_input: bool = True,
        **options: Any,
    ) -> Tensor:
        """Run call(weight, bias) with counting parameters detached, and record the use.

        Args:
            keep_input: False where no Jacobian needs the input: then it may be written in place behind the call.
        """
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
            self._watched.append(result.grad_fn.register_prehook(self._differentiate))  # type: ignore[union-attr]
            self._recorded.add(result.grad_fn)
            kept = input if keep_input else input.new_zeros(()).expand(input.shape)
            self.uses.append(
                Use(
                    kind,
                    weight_name,
                    bias_name,
                    kept.detach(),
                    kept._version,
                    _edge(result),
                    shape(result),
                    self.number,
                    options,
                )
            )
        return result

    def _differentiate(self, gradients: Any) -> None:
        self.differentiated = True

    def unrecognised(self, result: Tensor) -> set[str]:
        """The parameters that the graph of the result still reaches."""
        reached: set[str] = set()
        if result.grad_fn is None:
            return {self.names[id(result)]} if id(result) in self.names else reached
        for node in graph_nodes(result.grad_fn):
            if node.name() == "CheckpointFunctionBackward":
                raise ValueError(
                    "model: it uses torch.utils.checkpoint with use_reentrant=True, which hides parameters from "
                    "torch.autograd.grad; pass use_reentrant=False"
                )
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self.names:
                reached.add(self.names[id(variable)])
        return reached


def made_name(index: int) -> str:
    """The name of a made value: no parameter's, for it holds a space."""
    return f"made {index}"


def _saved_tensors_hooks() -> Any:
    """Hooks such as a checkpoint's: inside it the forward runs again in the backward, without this mode."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _routes(func: Any, args: tuple[Any, ...]) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple | list) else (args[1],)
        return any(isinstance(part, Tensor | list) for part in index)
    if name in ("embedding", "embedding_bag"):  # rows of a tensor that the model computed
        return any(isinstance(value, Tensor) and value.requires_grad for value in args)
    return name in ROUTING or (name.endswith("_") and name[:-1] in ROUTING)


_OPENED: dict[FunctionType, FunctionType] = {}


def _opened(func: FunctionType) -> FunctionType:
    """The Python function without its own override check, which would call the mode again instead of the body."""
    if func not in _OPENED:
        unchecked = {
            name: (lambda *_: False)
            for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
        }
        names = {**func.__globals__, **unchecked}
        copy = FunctionType(func.__code__, names, func.__name__, func.__defaults__)
        copy.__kwdefaults__ = func.__kwdefaults__
        _OPENED[func] = copy
    return _OPENED[func]
