"""What a Path-SGD step has to know of the batches that fed it: σ of every BatchNorm in training mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class BatchDeviations:
    """Records σ = sqrt(var + eps) of what BatchNorms see in training mode, averaged over the forwards of a step."""

    def __init__(self, modules: Sequence[Any], distributed: bool) -> None:
        self.modules, self.distributed = list(modules), distributed
        self.sums: dict[Any, Tensor] = {}
        self.counts: dict[Any, int] = {}
        for module in self.modules:
            module.register_forward_pre_hook(self.record)

    def record(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        """The forward pre-hook."""
        if not (_uses_batch(module) and torch.is_grad_enabled()):
            return
        x = inputs[0].detach()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        deviation = (x.to(torch.float64).var(axes, unbiased=False) + module.eps).sqrt()
        self.sums[module] = self.sums[module] + deviation if module in self.sums else deviation
        self.counts[module] = self.counts.get(module, 0) + 1

    def deviations(self) -> dict[Any, Tensor]:
        """BatchNorm in training mode -> its σ."""
        found = {}
        for module in self.modules:
            if not _uses_batch(module):
                continue
            if module not in self.sums:
                raise RuntimeError(
                    "a BatchNorm in training mode saw no batch since the last step; run a forward with "
                    "gradients first, call eval() on it, or use batchnorm='running'"
                )
            found[module] = self.sums[module] / self.counts[module]
            if self.distributed:
                torch.distributed.all_reduce(found[module])
                found[module] /= torch.distributed.get_world_size()
        return found

    def clear(self) -> None:
        self.sums, self.counts = {}, {}

    def state(self, root: nn.Module) -> dict[str, tuple[Tensor, int]]:
        names = {module: name for name, module in root.named_modules()}
        return {names[module]: (total, self.counts[module]) for module, total in self.sums.items()}

    def load(self, state: dict[str, tuple[Tensor, int]], root: nn.Module) -> None:
        self.sums = {root.get_submodule(name): total.clone() for name, (total, _) in state.items()}
        self.counts = {root.get_submodule(name): count for name, (_, count) in state.items()}


def _uses_batch(module: Any) -> bool:
    return bool(module.training or module.running_var is None)
