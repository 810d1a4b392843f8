"""Balanced factors ("modes") of a layer's sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, log, prod
from numbers import Integral
from typing import Any

from .. import _check

# Cores are of about this mode: 1024 becomes (8, 4, 4, 8).
TYPICAL_MODE = 8


def number_of_cores(*sizes: int) -> int:
    """How many cores sizes of this order ask for: modes of at most about 8, at least two cores.

    Example:
        >>> from finite_width.tt.modes import number_of_cores
        >>> number_of_cores(784, 625)
        4
    """
    return max(2, ceil(log(max(sizes)) / log(TYPICAL_MODE) - 1e-9))


def _prime_factors(size: int) -> list[int]:
    factors, divisor = [], 2
    while divisor * divisor <= size:
        while size % divisor == 0:
            factors.append(divisor)
            size //= divisor
        divisor += 1
    return [*factors, size] if size > 1 else factors


def _balanced(size: int, count: int) -> tuple[int, ...]:
    """`count` factors of size as equal as a greedy choice makes them, the largest at the ends.

    The inner cores hold two ranks: small modes there make the fewest parameters.
    """
    modes = [1] * count
    for factor in sorted(_prime_factors(size), reverse=True):
        modes[modes.index(min(modes))] *= factor
    descending = sorted(modes, reverse=True)
    return tuple(descending[::2] + descending[1::2][::-1])


def choose_modes(size: int, count: int) -> tuple[int, ...]:
    """`count` balanced modes whose product is size, or slightly more where size has a large prime factor.

    The product is the smallest number from size on whose largest mode is at most 2.5 times the balanced one,
    size^(1/count), or at most 5. A layer pads its input with zeros and drops rows of its result accordingly.

    Example:
        >>> from finite_width.tt.modes import choose_modes
        >>> choose_modes(1024, 4), choose_modes(997, 4)
        ((8, 4, 4, 8), (8, 5, 5, 5))
    """
    _check.positive_int("size", size)
    _check.positive_int("count", count)
    limit = max(2.5 * size ** (1 / count), 5.0)
    padded = size
    while max(modes := _balanced(padded, count)) > limit:
        padded += 1
    return modes


def as_modes(name: str, modes: Any) -> tuple[int, ...]:
    """The modes as a tuple, integers of numpy's as Python's; TypeError for what is no list."""
    if isinstance(modes, str) or not isinstance(modes, Iterable):
        raise TypeError(f"{name} must be a list of ints, such as [4, 8, 8, 4], got {modes!r}")
    return tuple(int(m) if isinstance(m, Integral) and not isinstance(m, bool) else m for m in modes)


def check_modes(name: str, modes: tuple[int, ...], size: int, size_name: str) -> None:
    """Raise ValueError unless the modes are positive and multiply to size."""
    if not modes or any(isinstance(m, bool) or not isinstance(m, int) or m < 1 for m in modes):
        raise ValueError(f"{name} must be positive integers, got {modes}")
    if prod(modes) != size:
        raise ValueError(f"{name} must multiply to {size_name} = {size}, but {modes} multiply to {prod(modes)}")


def train_size(sizes: Sequence[int], ranks: Sequence[int]) -> int:
    """Parameters of a train: Σ r_{k-1} s_k r_k, with s_k = m_k n_k for a TT-matrix and the d - 1 inner ranks."""
    bonds = (1, *ranks, 1)
    return sum(a * size * b for a, size, b in zip(bonds[:-1], sizes, bonds[1:], strict=True))


def bond_limits(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The largest ranks that a tensor with modes of these sizes can have."""
    return tuple(min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes)))
