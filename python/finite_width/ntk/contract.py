"""What the kernel functions accept: the model, its counting parameters, batches of rows, and the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import _check
from .._interrupts import closed_transforms, compiled_models_run_eagerly, grad_mode, left_as_it_was
from .made import Choices
from .precision import ieee_products

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
FLOATS = (torch.float32, torch.float64)


class Batch:
    """Rows of the model's input: one tensor, or a tuple or dict of tensors that share their first axis."""

    def __init__(self, name: str, x: Any) -> None:
        self.name = name
        if isinstance(x, Tensor):
            named: dict[Any, Any] = {name: x}
        elif isinstance(x, tuple):
            named = {f"{name}[{index}]": value for index, value in enumerate(x)}
        elif isinstance(x, Mapping):
            named = {f"{name}[{key!r}]": value for key, value in x.items()}
        else:
            raise TypeError(f"{name} must be a tensor, or a tuple or dict of tensors, got {type(x).__name__}")
        if isinstance(x, Mapping) and not all(isinstance(key, str) for key in x):
            raise TypeError(f"{name} must have strings as keys, the names of forward's arguments, got {list(x)}")
        if not named:
            raise ValueError(f"{name} must hold at least one tensor, got an empty {type(x).__name__}")
        self.keys = list(x) if isinstance(x, Mapping) else None
        self.single = isinstance(x, Tensor)
        self.tensors: dict[str, Tensor] = {}
        rows: int | None = None
        for label, value in named.items():
            _check.is_tensor(label, value)
            _check.is_dense(label, value)
            if value.dim() == 0:
                raise ValueError(f"{label} must have a batch axis [N, ...], got shape []")
            if rows is not None and value.shape[0] != rows:
                first = next(iter(self.tensors))
                raise ValueError(
                    f"{label} has {value.shape[0]} rows (shape {list(value.shape)}), but {first} has {rows} "
                    f"(shape {list(self.tensors[first].shape)}); all inputs must share the batch axis"
                )
            rows = value.shape[0]
            with torch.inference_mode(False):  # what inference mode made cannot be saved for a backward
                self.tensors[label] = value.clone() if value.is_inference() else value.detach()
        assert rows is not None
        if rows == 0:
            raise ValueError(f"{name} must have at least one row, got shape {self.describe()}")
        self.rows = rows

    @classmethod
    def together(cls, first: Batch, second: Batch) -> Batch:
        """The rows of both, which have the same structure, in one batch: a copy."""
        batch = cls.__new__(cls)
        batch.__dict__.update(first.__dict__)
        batch.name, batch.rows = f"{first.name} and {second.name}", first.rows + second.rows
        pairs = zip(first.tensors.items(), second.tensors.values(), strict=True)
        batch.tensors = {label: torch.cat([mine, theirs]) for (label, mine), theirs in pairs}
        return batch

    def describe(self) -> str:
        shapes = [str(list(value.shape)) for value in self.tensors.values()]
        return shapes[0] if self.single else "(" + ", ".join(shapes) + ")"

    def take(self, begin: int, end: int, copy: bool = False) -> list[Tensor]:
        """Rows [begin, end) of every tensor: views, or copies for a model that writes its input."""
        rows = [value[begin:end] for value in self.tensors.values()]
        return [value.clone() for value in rows] if copy else rows

    def call(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        """function on these tensors, passed as the user passes them."""
        if self.keys is not None:
            return function(**dict(zip(self.keys, tensors, strict=True)))
        return function(*tensors)

    def check_like(self, other: Batch) -> None:
        """Raise unless both batches have the same structure, shapes beyond the batch axis, dtypes and devices."""
        if self.keys and other.keys and set(self.keys) == set(other.keys):  # in another order
            labels = [f"{self.name}[{key!r}]" for key in other.keys]
            self.keys, self.tensors = other.keys, {label: self.tensors[label] for label in labels}
        if (self.single, self.keys) != (other.single, other.keys) or len(self.tensors) != len(other.tensors):
            raise ValueError(f"{self.name} must have the structure of {other.name}")
        for (label, mine), (their_label, theirs) in zip(self.tensors.items(), other.tensors.items(), strict=True):
            if mine.shape[1:] != theirs.shape[1:]:
                raise ValueError(
                    f"{label} has shape {list(mine.shape)}, but {their_label} has {list(theirs.shape)}; "
                    "they may differ in the number of rows only"
                )
            _check.like(label, mine, their_label, theirs)


def _check_parameter(name: str, value: Tensor) -> None:
    if is_lazy(value):
        raise ValueError(f"parameter {name!r} of a lazy module has no shape yet; run the model once first")
    if not (value.is_floating_point() or value.is_complex()):
        raise TypeError(
            f"parameter {name!r} has the integer dtype {value.dtype}; parameters must be floating point "
            "(keep integers in a buffer)"
        )


def _refuse_inference_tensor(name: str, value: Tensor) -> None:
    if value.is_inference():
        raise ValueError(
            f"model: {name!r} was made in inference mode, so that it cannot be differentiated; make, convert or load "
            "the model outside of torch.inference_mode()"
        )


def functional_call(model: nn.Module, values: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """The model's result with parameters replaced, at every place where the model has them.

    torch.func.functional_call replaces a module that stands in the model under two names twice, and puts the
    replacement back as its parameter; so each place is named once here.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    by_parameter = {id(known[name]): value for name, value in values.items()}
    everywhere = {
        f"{prefix}.{name}" if prefix else name: by_parameter[id(parameter)]
        for prefix, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in by_parameter
    }
    return torch.func.functional_call(model, everywhere, args, kwargs, tie_weights=False)


def tensors_in(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, those that modules share as often as they have them."""
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            yield from (value for value in own.values() if value is not None)


class Target:
    """The differentiated function: rows of the input to outputs [rows, O], and the parameters that count."""

    # What captures of the model's calls do, once a probe has decided.
    choices: Choices = Choices()

    def __init__(self, model: Any, params: Any, output: Any) -> None:
        _check.is_module("model", model)
        if output is not None and not callable(output):
            raise TypeError(f"output must be a function of the model's result, got {type(output).__name__}")
        self.model, self.output = model, output
        self.own = dict(model.named_parameters())
        for name, value in self.own.items():
            _check_parameter(name, value)
        for name, tensor in (*self.own.items(), *model.named_buffers()):
            _refuse_inference_tensor(name, tensor)
        # Of one row's output, once several rows have run: a model that squeezes gives a single row without its axis.
        self.row_shape: torch.Size | None = None
        # Set where `params` replaces the model's own values; then the model runs by functional_call.
        self.substitutes: dict[str, Tensor] | None = None
        if params is None:
            self.parameters: dict[str, Tensor] = {
                name: value for name, value in self.own.items() if value.requires_grad
            }
        else:
            self._substitute(params)
        if not self.parameters:
            where = "params" if params is not None else "model"
            raise ValueError(f"{where} has no trainable parameter: none has requires_grad=True")
        self._check_dtypes()

    @cached_property
    def constants(self) -> frozenset[int]:
        """The ids of the tensors that a forward finds in the model."""
        # Kept alive, so that nothing else gets their ids.
        self._held = (*tensors_in(self.model), *(self.substitutes or {}).values())
        return frozenset(map(id, self._held))

    def _substitute(self, params: Any) -> None:
        if not isinstance(params, Mapping):
            raise TypeError(f"params must be a dict from parameter names to tensors, got {type(params).__name__}")
        every = dict(self.model.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}  # id of a parameter -> the name under which it is given first
        self.substitutes, self.parameters = {}, {}
        for name, value in params.items():
            if name not in every:
                raise ValueError(f"params has the key {name!r}, but the model has no parameter of that name")
            _check.is_tensor(f"params[{name!r}]", value)
            _check_parameter(name, value)
            if value.shape != every[name].shape:
                raise ValueError(
                    f"params[{name!r}] has shape {list(value.shape)}, but the model's has {list(every[name].shape)}"
                )
            given = first.setdefault(id(every[name]), name)
            if given != name:
                if value is not params[given]:
                    raise ValueError(
                        f"params[{name!r}] and params[{given!r}] are one parameter of the model, which shares it; give "
                        "one of them, or the same tensor for both"
                    )
                continue
            leaf = value.detach().requires_grad_(value.requires_grad)
            self.substitutes[name] = leaf
            if value.requires_grad:
                self.parameters[name] = leaf

    def _check_dtypes(self) -> None:
        name, first = next(iter(self.parameters.items()))
        self.device = first.device
        self.dtype = first.dtype.to_real() if first.is_complex() else first.dtype
        for other, value in self.parameters.items():
            real = value.dtype.to_real() if value.is_complex() else value.dtype
            if real not in FLOATS:
                raise TypeError(
                    f"parameter {other!r} has dtype {value.dtype}; the kernel is computed in float32 or float64, "
                    "convert the model first (model.float())"
                )
            if real != self.dtype:
                raise TypeError(
                    f"parameter {other!r} has dtype {value.dtype}, but {name!r} has {first.dtype}; convert one of them"
                )
            if value.device != self.device:
                raise ValueError(
                    f"parameter {other!r} is on {value.device}, but {name!r} is on {self.device}; move one of them"
                )

    def check_batch(self, batch: Batch) -> None:
        """Raise unless the batch's floating-point tensors have the parameters' dtype, and all their device."""
        for label, value in batch.tensors.items():
            if value.is_floating_point() and value.dtype != self.dtype:
                raise TypeError(
                    f"{label} has dtype {value.dtype}, but the model's parameters have {self.dtype}; "
                    "convert one of them"
                )
            if value.device != self.device:
                raise ValueError(
                    f"{label} is on {value.device}, but the model's parameters are on {self.device}; move one of them"
                )

    def run(self, batch: Batch, tensors: Sequence[Tensor], values: Mapping[str, Tensor] | None = None) -> Tensor:
        """The outputs as the model gives them, before they are flattened to [rows, O].

        Args:
            values: replace parameters by these, beside `params`.
        """
        substitutes = self.substitutes if values is None else {**(self.substitutes or {}), **values}
        if substitutes is None:
            function: Callable[..., Any] = self.model
        else:

            def function(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self.model, substitutes, args, kwargs)

        result = batch.call(function, tensors)
        return self.pick(result, tensors[0].shape[0], batch)

    def pick(self, result: Any, rows: int, batch: Batch) -> Tensor:
        """The output tensor [rows, ...] of the model's result, checked."""
        if self.output is not None:
            result = self.output(result)
        if not isinstance(result, Tensor):
            raise TypeError(
                f"the model's result is a {type(result).__name__}, not a tensor; pass output=, a function that picks "
                "a tensor [N, ...] from it"
            )
        if rows == 1 and self.row_shape is not None and result.shape == self.row_shape:
            result = result.unsqueeze(0)
        if result.dim() == 0 or result.shape[0] != rows:
            raise ValueError(
                f"the model's output must have a batch axis: [{rows}, ...] for {rows} rows of {batch.name} "
                f"(shape {batch.describe()}), got {list(result.shape)}; pass output= to pick or reshape it"
            )
        if result.dtype != self.dtype:
            raise TypeError(f"the model's output has dtype {result.dtype}, but its parameters have {self.dtype}")
        return result

    def width(self, name: str) -> int:
        """How many real numbers a parameter counts."""
        value = self.parameters[name]
        return value.numel() * (2 if value.is_complex() else 1)


def flatten(raw: Tensor) -> Tensor:
    """[rows, ...] to [rows, O]; the same object where it has that shape already."""
    return raw if raw.dim() == 2 else raw.reshape(raw.shape[0], -1)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Run the model with gradients on, autocast and TF32 off; put it back as it was, also after an exception or Ctrl-C.

    The kernels never write parameters, `.grad` or hooks; what a forward itself writes is put back.
    """
    on_gpu = any(value.is_cuda for value in tensors_in(model))
    with (
        left_as_it_was(model),
        torch.inference_mode(False),
        grad_mode(True),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False) if on_gpu else nullcontext(),
        ieee_products(on_gpu),
        compiled_models_run_eagerly(),  # their calls must be seen one by one
        closed_transforms(),
    ):
        yield


def refuse_training_modules(model: nn.Module) -> None:
    """Raise where a module in train mode makes the outputs random or makes rows depend on each other."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise ValueError(f"model: {name or 'it'} has max_norm, which rewrites its weight in every forward")
        if not module.training:
            continue
        label = f"module {name!r} ({type(module).__name__})" if name else f"the module ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"model: {label} is in train mode, where its output for a row depends on the other rows; "
                "call model.eval() first"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"model: {label} is in train mode and draws random numbers; call model.eval() first")
        if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1:
            raise ValueError(f"model: {label} is in train mode with dropout; call model.eval() first")
