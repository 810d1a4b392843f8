"""A chain's steps on a GPU: one op a step, and nothing that is read on the host.

Which of F and B is of the weights as they are, and Φ, stand in a small tensor beside the vectors. The kernels read it
there and sweep in the other direction, so a step that was captured in a graph can be replayed any number of times, with
other steps in between. That weights were changed outside without a trace also shows there, as a count, which is copied
to the host on the side and looked at a few steps later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import reference
from .arguments import UNCHANGED
from .chain import Dense, Norm, Scaling, Supply
from .ops import path_step_unchecked

KNOWS_FORWARD, KNOWS_BACKWARD = reference.KNOWS_FORWARD, reference.KNOWS_BACKWARD
_LOOK_EVERY = 16  # steps between two looks at the count of surprises


class DeviceChain:
    """Path vectors of a chain of Linear layers and their state, both on the device.

    Args:
        stages: the chain.
        p: at least 1, or inf.
        stored: parameter -> what takes its updates.
    """

    def __init__(self, stages: Sequence[Dense], p: float, stored: Callable[[Tensor], Tensor]) -> None:
        self.stages, self.p, self.stored = list(stages), p, stored
        weights = [stage.weight for stage in self.stages]
        units = weights[0].shape[1] + sum(weight.shape[0] for weight in weights)
        size = 2 * (units + len(weights) + 1) + 4 * len(weights)
        device = weights[0].device
        self.vectors = torch.zeros(size, dtype=torch.float64, device=device)
        forward, backward, _ = reference.pieces(weights, self.vectors)
        for outer in (forward[0], backward[-1]):
            outer[:-1].fill_(1.0)
        self.state = torch.zeros(4, dtype=torch.float64, device=device)
        self._copy = torch.zeros(1, dtype=torch.float64, device="cpu", pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None
        self._steps, self._surprises = 0, 0

    def step(self, supply: Supply, scaling: Scaling, rebuild: int = 0) -> None:
        """One step in the direction that the state asks for.

        Args:
            supply: parameter -> gradient, momentum, rates and lr, or None to leave it.
            scaling: grad_scale and found_inf.
            rebuild: KNOWS_FORWARD or KNOWS_BACKWARD: makes those vectors of the weights first.
        """
        lists: list[list[Tensor | None]] = [[] for _ in range(6)]
        rates: list[float] = []
        lrs: list[Tensor | None] = []
        written: list[tuple[Tensor, Tensor]] = []  # a parameter or momentum, and the dense copy that takes its place
        for stage in self.stages:
            dtype = self.stored(stage.weight).dtype
            for side, parameter in enumerate((stage.weight, stage.bias)):
                given = None if parameter is None else supply(parameter)
                values = (None if parameter is None else self.stored(parameter).detach(), *(given or (None, None))[:2])
                for kind, value in enumerate(values):
                    # A frozen bfloat16 bias beside a float32 copy of its weight; a parameter of other strides.
                    dense = None if value is None else value.to(dtype).contiguous()
                    if value is not None and dense is not None and dense is not value and kind != 1:
                        written.append((value, dense))
                    lists[3 * side + kind].append(dense)
                rates += given[2] if given else UNCHANGED
                lrs.append(given[3] if given else None)
        weights, grads, momenta, biases, bias_grads, bias_momenta = lists
        lrs = lrs if any(each is not None for each in lrs) else []
        path_step_unchecked(
            *([each for each in weights if each is not None], grads, momenta, biases, bias_grads, bias_momenta),
            *(self.vectors, self.state, self.p, rates, lrs, *scaling, rebuild),
        )
        for value, dense in written:
            value.copy_(dense)

    def surprises(self) -> int:
        """How many steps met weights that had been changed without a trace, as far as is known without waiting."""
        self._steps += 1
        if self._steps % _LOOK_EVERY or (self._copied is not None and not self._copied.query()):
            return self._surprises
        self._surprises = int(self._copy)  # on the host, from an earlier look
        self._copy.copy_(self.state[3:], non_blocking=True)
        if self.state.device.type == "cuda":
            self._copied = self._copied or torch.cuda.Event()
            self._copied.record()
        return self._surprises

    def knows_forward(self) -> bool:
        """Whether F is of the weights as they are, so that the next sweep goes backward; waits for the device."""
        return int(self.state[0]) == KNOWS_FORWARD


def fits(stages: Sequence[Dense | Norm], stored: Callable[[Tensor], Tensor]) -> bool:
    """Whether `DeviceChain` takes these stages: Linear layers whose weights have one dtype."""
    return all(isinstance(stage, Dense) for stage in stages) and (
        len({stored(stage.weight).dtype for stage in stages if stage.weight is not None}) == 1
    )
