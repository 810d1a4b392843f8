"""The NNGP (conjugate) kernel of a finite network: inner products of the last hidden layer's features."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import _check
from .._gemm import gemm
from .._interrupts import ends_its_contexts
from .contract import Batch, Target, preserved, refuse_training_modules
from .forwards import outputs
from .inputs import model_kind


@ends_its_contexts
def nngp_kernel(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    layer: str | None = None,
    normalize: bool = False,
    check: bool = True,
) -> Tensor:
    """The conjugate kernel of the last hidden layer: K = h(x1) h(x2)ᵀ.

    h are the inputs of the last `nn.Linear` that the forward pass calls (no bias feature), so that kernel ridge
    regression with K is ridge regression of that layer's weights on its inputs, W = (hᵀh + ρI)⁻¹ hᵀ y. As the width
    grows, K / width tends to the kernel of the network's Gaussian process at initialisation.

    Args:
        model: any module, in eval mode where the mode matters; it comes back unchanged.
        x1: a tensor [N, ...], or a tuple or dict of tensors with N rows each.
        x2: the same with M rows; None stands for x1.
        layer: the qualified name of the layer whose inputs are the features, such as "encoder.2". Its first input
            is flattened to [N, width].
        normalize: divide by the width (neural-tangents' convention).
        check: test on a few rows that rows do not mix and that nothing is random.

    Returns:
        [N, M], in the features' dtype; no gradient flows through it.

    Raises:
        ValueError: no such layer, a layer that the forward pass does not call or calls more than once, features
            that do not have one row per row of the input; empty batches, inputs that the model cannot take, train
            mode with batch norm or dropout, random or row-mixing models.
        TypeError: no module, no tensors, another dtype than the model's, features of lower precision than float32.

    Source:
        Lee et al., "Deep neural networks as Gaussian processes", ICLR 2018, equation 5 (its Monte Carlo form).

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>> fw.ntk.nngp_kernel(model, torch.randn(5, 3), torch.randn(4, 3)).shape
        torch.Size([5, 4])
    """
    _check.boolean("normalize", normalize)
    h1 = features(model, x1, layer=layer, name="x1", check=check)
    h2 = h1 if x2 is None else features(model, x2, layer=layer, name="x2", check=check)
    if h2.shape[1] != h1.shape[1]:
        raise ValueError(f"x1 gives features of width {h1.shape[1]}, but x2 of width {h2.shape[1]}; they must agree")
    with preserved(model):  # neither autocast nor TF32
        K = gemm(h1, h2.mT)
    return K / h1.shape[1] if normalize else K


def features(model: nn.Module, x: Any, *, layer: str | None = None, name: str = "x", check: bool = True) -> Tensor:
    """The inputs [N, width] of the last linear layer, or of the layer with that qualified name, without gradient."""
    target, batch = _Features(model, layer), Batch(name, x)
    refuse_training_modules(model)
    return outputs(target, batch, check=check)


class _Features(Target):
    """The features in the place of the model's outputs; no parameter counts, so none has to be trainable."""

    def __init__(self, model: Any, layer: str | None) -> None:
        _check.is_module("model", model)
        for name, value in model.named_parameters():
            if is_lazy(value):
                raise ValueError(f"parameter {name!r} of a lazy module has no shape yet; run the model once first")
        self.model, self.layer, self.parameters = model, layer, {}
        self.device, self.dtype = model_kind(model)
        if layer is None:
            self.watched: dict[str, nn.Module] = {
                key: each for key, each in model.named_modules() if isinstance(each, nn.Linear)
            }
            if not self.watched:
                raise ValueError(
                    f"{type(model).__name__} has no nn.Linear; name the layer whose inputs to use by layer=..."
                )
        else:
            modules = dict(model.named_modules(remove_duplicate=False))
            if layer not in modules or layer == "":
                known = ", ".join(key for key in modules if key)
                raise ValueError(f"layer {layer!r} is not a layer of {type(model).__name__}; it has {known or 'none'}")
            self.watched = {layer: modules[layer]}

    def run(self, batch: Batch, tensors: Sequence[Tensor], values: Mapping[str, Tensor] | None = None) -> Tensor:
        calls: list[tuple[str, Tensor]] = []
        with _watch(self.watched, calls):
            batch.call(self.model, tensors)
        if not calls:
            found = f"layer {self.layer!r}" if self.layer else "any of its nn.Linear modules"
            raise ValueError(
                f"the forward pass of {type(self.model).__name__} did not call {found}; name another by layer=..."
            )
        used, h = calls[-1]
        if sum(key == used for key, _ in calls) > 1:
            raise ValueError(
                f"layer {used!r} is called more than once in a forward pass; its inputs are not one matrix"
            )
        rows = tensors[0].shape[0]
        if h.dim() < 2 or h.shape[0] != rows:
            raise ValueError(
                f"the inputs of layer {used!r} have shape {list(h.shape)} for {rows} rows of {batch.name} "
                f"(shape {batch.describe()}); they must be [{rows}, ...]"
            )
        if self.layer is None and h.dim() > 2:
            raise ValueError(
                f"the last linear layer {used!r} acts on several positions per row (its inputs are {list(h.shape)}); "
                "name the layer whose flattened inputs to use by layer=..."
            )
        _check.is_float(f"the inputs of layer {used!r}", h)
        return h.flatten(1)


@contextlib.contextmanager
def _watch(modules: dict[str, nn.Module], calls: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Note the first input of every call of these modules; no hook stays, whatever happens inside."""

    def note(key: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
            if value is not None:
                # A copy: an in-place op of the layer itself or behind it may overwrite the input.
                calls.append((key, value.detach().clone()))

        return hook

    handles = []
    try:
        for key, module in modules.items():
            handles.append(module.register_forward_pre_hook(note(key), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
