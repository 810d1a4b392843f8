"""A chain of Linear layers whose steps are one op each: on a GPU, nothing is read on the host.

Which of F and B is of the weights as they are, and Φ, stand in a small tensor beside the vectors. The kernels read it
there and sweep in the other direction, so a step that was captured in a graph can be replayed any number of times, with
other steps in between. That weights were changed outside without a trace also shows there, as a count. On the CPU it is
read after each step; on a GPU it is copied to the host on the side and looked at a few steps later.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from .arguments import UNCHANGED
from .chain import Dense, PathVectors, Scaling, Supply
from .ops import path_step_unchecked

KNOWS_FORWARD, KNOWS_BACKWARD = reference.KNOWS_FORWARD, reference.KNOWS_BACKWARD
_LOOK_EVERY = 16  # steps between two looks at the count of surprises


class DenseChain:
    """Linear layers in a chain, with the state of their path vectors.

    Args:
        vectors: of a chain that `fits`; what takes a parameter's updates is what `vectors.stored` says.
    """

    def __init__(self, vectors: PathVectors) -> None:
        self.vectors = vectors
        self.stages = [stage for stage in vectors.stages if isinstance(stage, Dense)]
        device = vectors.memory.device
        self.state = torch.zeros(4, dtype=torch.float64, device=device)
        self._none = torch.zeros(0, dtype=torch.float64, device=device)  # what an op takes for None in a list
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
        if rebuild:
            for outer in (self.vectors.forward[0], self.vectors.backward[-1]):
                outer[:-1] = 1.0
                outer[-1:] = 0.0
        none, stored, layers = self._none, self.vectors.stored, len(self.stages)
        tensors, grads, momenta = ([[none] * layers, [none] * layers] for _ in range(3))  # of the weights, the biases
        rates: list[float] = []
        lrs = [none] * (2 * layers)
        copies: list[tuple[Tensor, Tensor]] = []  # a parameter or momentum, and the dense copy that takes its place
        for index, stage in enumerate(self.stages):
            dtype = stored(stage.weight).dtype
            for side, parameter in enumerate((stage.weight, stage.bias)):
                given = None if parameter is None else supply(parameter)
                if parameter is not None:
                    tensors[side][index] = _dense(stored(parameter), dtype, copies)
                if given is None:
                    rates += UNCHANGED
                    continue
                grad, momentum, own_rates, lr = given
                grads[side][index] = _dense(grad, dtype)
                if momentum is not None:
                    momenta[side][index] = _dense(momentum, dtype, copies)
                rates += own_rates
                if lr is not None:
                    lrs[2 * index + side] = lr
        (weights, biases), (weight_grads, bias_grads), (weight_momenta, bias_momenta) = tensors, grads, momenta
        path_step_unchecked(
            *(weights, weight_grads, weight_momenta, biases, bias_grads, bias_momenta),
            *(self.vectors.memory, self.state, self.vectors.p, rates),
            *(lrs if any(each is not none for each in lrs) else [], *scaling, rebuild),
        )
        for value, dense in copies:
            value.copy_(dense)

    def outcome(self) -> tuple[bool, int]:
        """Whether Φ is a number, and how many steps met weights changed without a trace; waits for the device."""
        _, value, _, surprises = self.state.tolist()
        return not math.isnan(value), int(surprises)

    def path_total(self) -> tuple[float, float]:
        """Φ of the weights as they are, value and exponent; waits for the device."""
        _, value, exponent, _ = self.state.tolist()
        return value, exponent

    def surprises_so_far(self) -> int:
        """How many steps met weights changed without a trace, as far as is known without waiting."""
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


def _dense(value: Tensor, dtype: torch.dtype, copies: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """The tensor, or a copy of this dtype without gaps, which is noted in `copies` beside it.

    Of a frozen bfloat16 bias beside a float32 copy of its weight, or of a parameter of other strides.
    """
    if value.dtype == dtype and value.is_contiguous():
        return value
    dense = value.detach().to(dtype).contiguous()
    if copies is not None:
        copies.append((value, dense))
    return dense


def fits(vectors: PathVectors) -> bool:
    """Whether `DenseChain` takes this chain: Linear layers whose weights have one dtype."""
    weights = [vectors.stored(stage.weight) for stage in vectors.stages if isinstance(stage, Dense)]
    return len(weights) == len(vectors.stages) and len({weight.dtype for weight in weights}) == 1


def is_remote(device: torch.device) -> bool:
    """Whether reading a tensor's value there means to wait."""
    return device.type != "cpu"
