"""What a Path-SGD step has to know of the batches that fed it: σ of every BatchNorm in training mode."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

# Σ σ over batches, and over how many.
Sum = tuple[Tensor, Tensor | int]


class BatchDeviations:
    """σ = sqrt(var + eps) of what BatchNorms saw in training mode, averaged over the forwards that fed a step.

    A forward feeds a step once a gradient comes back to its BatchNorm's output, unless gradients are dropped before the
    step. A BatchNorm to which none comes (frozen, before a detach), or that is compiled, counts with all forwards since
    the last step.

    Args:
        calls: BatchNorm -> its qualified name, and how often a forward calls it.
        distributed: average σ over the processes.
    """

    def __init__(self, calls: Mapping[Any, tuple[str, int]], distributed: bool) -> None:
        self.modules, self.calls, self.distributed = list(calls), dict(calls), distributed
        self.seen: dict[Any, Sum] = {}
        self.fed: dict[Any, dict[int, Sum]] = {}  # BatchNorm -> number of the forward -> its σ
        self.numbers = count(1)
        for module in self.modules:
            handle = module.register_forward_hook(_Hook(self), with_kwargs=True)
            weakref.finalize(self, handle.remove).atexit = False

    def record(self, module: Any, x: Tensor, output: Tensor) -> None:
        """Take notice of a forward."""
        if not (module in self.modules and _uses_batch(module) and torch.is_grad_enabled()):
            return
        deviation = _deviation(x.detach(), module.eps)
        before = [self.seen[module]] if module in self.seen else []
        self.seen[module] = _sum([*before, (deviation, 1)])
        if output.requires_grad and not torch.compiler.is_compiling():  # a hook would break the graph
            number, recorder = next(self.numbers), weakref.ref(self)

            def fed(gradient: Tensor) -> None:
                this = recorder()
                if this is not None:
                    this.fed.setdefault(module, {})[number] = (deviation, 1)

            output.register_hook(fed)

    def deviations(self) -> dict[Any, Tensor]:
        """BatchNorm in training mode -> its σ."""
        found = {}
        for module in self.modules:
            if not _uses_batch(module):
                continue
            name, times = self.calls[module]
            if times > 1:
                raise ValueError(
                    f"{name}: a BatchNorm in training mode that a forward calls {times} times has another σ at each "
                    "call; use one BatchNorm for each, call eval() on it, or use batchnorm='running'"
                )
            if module not in self.seen and module not in self.fed:
                raise RuntimeError(
                    f"{name}: a BatchNorm in training mode saw no batch since the last step; run a forward with "
                    "gradients first, call eval() on it, or use batchnorm='running'"
                )
            total, number = self._sum_of(module)
            found[module] = total / number
            if self.distributed:
                torch.distributed.all_reduce(found[module])
                found[module] /= torch.distributed.get_world_size()
        return found

    def _sum_of(self, module: Any) -> Sum:
        fed = self.fed.get(module)
        return _sum([fed[number] for number in sorted(fed)]) if fed else self.seen[module]

    def gradients_dropped(self) -> None:
        """Forget the forwards whose gradients have come back; one whose backward is still to come feeds the step."""
        self.fed = {}

    def clear(self) -> None:
        """A step was taken."""
        self.seen, self.fed = {}, {}

    def state(self, root: nn.Module) -> dict[str, tuple[Tensor, int]]:
        """What `load` takes: for each BatchNorm by name, Σ σ and over how many batches."""
        names = {module: name for name, module in root.named_modules()}
        sums = {names[module]: self._sum_of(module) for module in self.seen | self.fed}
        return {name: (total, int(number)) for name, (total, number) in sums.items()}

    def load(self, state: dict[str, tuple[Tensor, int]], root: nn.Module) -> None:
        """Continue where a saved one stood: its batches have fed the step that comes."""
        self.seen = {root.get_submodule(name): (total.clone(), number) for name, (total, number) in state.items()}
        self.fed = {module: {0: each} for module, each in self.seen.items()}


class _Hook:
    """A BatchNorm's forward hook. Copies of it, with a copied or saved model, record nothing."""

    def __init__(self, recorder: BatchDeviations | None = None) -> None:
        self.recorder = None if recorder is None else weakref.ref(recorder)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        recorder = None if self.recorder is None else self.recorder()
        if recorder is not None:
            recorder.record(module, args[0] if args else kwargs["input"], output)


def _deviation(x: Tensor, eps: float) -> Tensor:
    """sqrt(var + eps) of every channel, in float64."""
    if x.dtype in (torch.float32, torch.float64):  # torch's own, to the dtype's rounding: less than half the time
        _, _, inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)
        return 1 / inverse.to(torch.float64)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return (x.to(torch.float64).var(axes, unbiased=False) + eps).sqrt()


def is_own_hook(hook: Any) -> bool:
    """Whether a forward hook is this wing's, which records σ and changes nothing."""
    return isinstance(hook, _Hook)


def _sum(parts: Sequence[Sum]) -> Sum:
    """Of several, only batches with finite σ count: another one has fed no step that was taken."""
    if len(parts) == 1:
        return parts[0]
    finite = [total.isfinite().all() for total, _ in parts]
    totals = [torch.where(each, total, 0.0) for each, (total, _) in zip(finite, parts, strict=True)]
    numbers = [each * number for each, (_, number) in zip(finite, parts, strict=True)]
    return sum(totals[1:], totals[0]), sum(numbers[1:], numbers[0])


def _uses_batch(module: Any) -> bool:
    return bool(module.training or module.running_var is None)
