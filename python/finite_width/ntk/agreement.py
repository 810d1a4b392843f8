"""Whether two computations of the same rows agree, and the errors where they should and do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .capture import Capture
from .contract import Batch, Target, flatten


def _random_state(device: torch.device) -> list[Tensor]:
    """Of torch's generators that a model on the device draws from, the CPU's first."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def refusing_random_numbers(device: torch.device) -> Iterator[None]:
    """Raise if what runs inside draws random numbers; torch's generators are as before then."""
    state = _random_state(device)
    drawn = True
    try:
        yield
        drawn = not all(map(torch.equal, state, _random_state(device)))
    finally:
        if drawn:
            torch.set_rng_state(state[0])
            if state[1:]:
                torch.cuda.set_rng_state(state[1], device)
    if drawn:
        raise ValueError(
            "model draws random numbers in its forward (dropout, noise, sampling), so its kernel is not defined; "
            "call model.eval() or remove them (check=False skips this test)"
        )


def refuse_other_bits(target: Target, batch: Batch, expected: Tensor) -> None:
    """Raise unless another forward of the batch's first rows gives the expected outputs, bit for bit."""
    tensors = [value.clone() for value in batch.take(0, len(expected))]
    with Capture(target):
        again = flatten(target.run(batch, tensors)).detach()
    if not (torch.equal(again, expected) or torch.equal(torch.nan_to_num(again), torch.nan_to_num(expected))):
        raise ValueError(
            "model: two forwards of the same rows differ; it draws random numbers or keeps a state between calls "
            "(check=False skips this test)"
        )


def agrees(found: Tensor, expected: Tensor, floor: float = 0.0) -> bool:
    """Whether two computations of the same values differ by no more than roundings: what a wrong formula does not.

    Args:
        floor: a norm below which values are roundings themselves.
    """
    if torch.equal(found, expected):
        return True
    if not expected.is_floating_point() and not expected.is_complex():
        return False
    return _difference(found, expected, floor) <= (1e-3 if _single(expected) else 1e-7)


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two computations of the same values by the same steps agree: their bits, but for a few roundings."""
    if found.shape != expected.shape:
        return False
    return torch.equal(found, expected) or _difference(found, expected) <= (1e-5 if _single(expected) else 1e-12)


def row_mixing_error() -> ValueError:
    """The error of a model that mixes rows."""
    return ValueError(
        "model: its output for a row depends on other rows of the batch (batch statistics, attention or a reduction "
        "over the batch axis); the model mixes rows, so its kernel is not defined row by row "
        "(check=False skips this test)"
    )


def _single(value: Tensor) -> bool:
    return value.dtype in (torch.float32, torch.complex64)


def _difference(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Relative to the larger one, so that it is no matter which is called expected."""
    found, expected = (torch.nan_to_num(value.detach(), 0, 0, 0) for value in (found, expected))
    scale = max(float(found.norm()), float(expected.norm()), floor)
    return float((found - expected).norm()) / scale if scale > 0 else 0.0
