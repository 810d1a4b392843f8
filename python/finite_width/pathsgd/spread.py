"""Raises where a large p takes the path sums of units so far apart that the smaller ones' paths would be lost unseen.

Path sums of one layer share a power of two. Units that a rescaling has put 2^±60 apart differ by 2^(120 p), which
float64 holds up to p = 8; beyond it this is looked at, in passes of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .chain import Dense, Norm, PathVectors, find_chain, no_update
from .masses import masses
from .structure import Structure

_HELD = 8  # the largest p at which units 2^±60 apart keep their paths


def check_spread(structure: Structure, p: float, sigma: dict[Any, Tensor] | None = None) -> None:
    """Raise ValueError where sums that are positive at p = 1 vanish at p.

    Args:
        structure: of the model.
        p: any; nothing is looked at up to 8 and at ∞.
        sigma: BatchNorm module -> the batch's standard deviation.
    """
    if p <= _HELD or math.isinf(p):
        return
    stages = find_chain(structure)
    tiny = torch.finfo(torch.float64).tiny
    sums = [
        _vectors(stages, each, sigma) if stages is not None else _masses(structure, each, sigma) for each in (p, 1.0)
    ]
    if any(bool(((large < tiny) & (plain > 0)).any()) for large, plain in zip(*sums, strict=True)):
        raise ValueError(
            f"p = {p:g} takes paths of this model out of float64's range: units of one layer are so far apart that the "
            f"{p:g}-th powers of their path sums differ by more than 2^1000; use a smaller p (up to 8 units may be "
            "2^±60 apart), or bring the units closer together (balance_)"
        )


def _vectors(stages: list[Dense | Norm], p: float, sigma: dict[Any, Tensor] | None) -> Sequence[Tensor]:
    """F and B of a chain."""
    vectors = PathVectors(stages, p)
    with torch.no_grad():
        vectors.run(True, no_update, sigma)
        forward = [vector[:-1].clone() for vector in vectors.forward]
        vectors.run(False, no_update, sigma)
    return [*forward, *(vector[:-1] for vector in vectors.backward)]


def _masses(structure: Structure, p: float, sigma: dict[Any, Tensor] | None) -> Sequence[Tensor]:
    """∂Φ/∂|w|^p of every parameter."""
    found = masses(structure, p, sigma).dense()
    return [found[each] for each in structure.module.parameters() if each in found]
