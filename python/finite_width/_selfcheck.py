"""A small example of every op, run by the kernel and by its reference: what `python -m finite_width` shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from . import _library


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _vector(size: int) -> Tensor:
    """Positive float64 values and a last one of 0, as a path vector has."""
    return torch.cat([_randn(size - 1).double().abs() + 0.5, torch.zeros(1, dtype=torch.float64)])


def _positive(*shape: int) -> Tensor:
    """Path sums: positive, in float64."""
    return _randn(*shape).double().abs() + 0.5


_WINDOW = ([2, 1], [1, 0], [1, 1], 2)  # stride, padding, dilation, groups

# Relative to a tensor's largest entry. Kernel and reference sum the same few hundred terms in other orders: each
# errs by some √600 roundings of 2^-24 or 2^-53, and these are six times that.
BOUNDS = {torch.float32: 1e-5, torch.float64: 2e-14}

# Op -> arguments of the raw op, in float32.
EXAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "gemm": lambda: (_randn(33, 65), _randn(65, 17), _randn(17)),
    "ntk_gram_accumulate": lambda: (
        *(torch.zeros(7, 5, 3, 3), _randn(7, 33), _randn(5, 33), _randn(7, 3, 17), _randn(5, 3, 17)),
        *(1.0, 0, 0),
    ),
    "ntk_jacobian_accumulate": lambda: (torch.zeros(7, 5), _randn(7, 3, 65), _randn(5, 3, 65), 2, 0),
    "ntk_ghost_accumulate": lambda: (
        *(torch.zeros(7, 5, 3), _randn(7, 4, 33), _randn(5, 6, 33), _randn(7, 3, 4, 17), _randn(5, 3, 6, 17)),
        *(1.0, 1, 0),
    ),
    "ntk_position_gradients": lambda: (_randn(7, 4, 33), _randn(7, 3, 4, 17), 0),
    "ntk_conv_gradients": lambda: (
        *(_randn(3, 4, 9, 7), _randn(3, 2, 6, 5, 4)),
        *([3, 3], [2, 2], [1, 1], [1, 1], 2, True, 0),
    ),
    "ntk_gated_product": lambda: (_randn(26, 65), _randn(65, 33), _randn(13, 33)),
    "ntk_convolve": lambda: (
        *(_randn(6, 24, 9, 7), _randn(25, 24, 3, 3), _randn(25), _randn(3, 25, 9, 9)),
        *([1, 2], [1, 1], 1, False),
    ),
    "tt_linear": lambda: (_randn(7, 35), [_randn(1, 3, 5, 4), _randn(4, 6, 7, 1)], _randn(18), [1, 0, 0, 0, 0, 0]),
    "tt_linear_backward": lambda: (
        *(_randn(7, 18), _randn(7, 35), [_randn(1, 3, 5, 4), _randn(4, 6, 7, 1)]),
        *([1, 1, 0, 0, 0, 0], [1, 1, 1]),
    ),
    "path_sweep": lambda: (
        *(_randn(33, 65), _randn(65, 33).T.contiguous(), None, _randn(33), _randn(33), None),
        *(_vector(66), _vector(66), _vector(34), _vector(34), torch.zeros(2, dtype=torch.float64), True, 2.0),
        *((0.1, 0.0, 0.0, 1.0, 1.0), (0.1, 0.0, 0.0, 1.0, 1.0), torch.tensor(8.0), None, None, None),
    ),
    "path_step": lambda: (
        *([_randn(33, 65), _randn(5, 33)], [_randn(33, 65), _randn(5, 33)], [_randn(0)] * 2),
        *([_randn(33), _randn(0)], [_randn(33), _randn(0)], [_randn(0)] * 2),
        *(torch.ones(66 + 34 + 6 + 66 + 34 + 6 + 8, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 2.0),
        *([0.1, 0.0, 0.0, 1.0, 1.0] * 4, [], torch.tensor(8.0), None, 2),
    ),
    "path_update": lambda: (
        *(_randn(65), _randn(65), None, _vector(65), torch.zeros((), dtype=torch.float64), 2.0),
        *((0.1, 0.0, 0.0, 1.0, 1.0), torch.tensor(8.0), None, None),
    ),
    "path_convolution": lambda: (_positive(1, 6, 7, 9), _randn(8, 3, 3, 2), 2.0, *_WINDOW),
    "path_convolution_backward": lambda: (
        *(_positive(1, 8, 4, 8), _positive(1, 6, 7, 9), _randn(8, 3, 3, 2), 2.0, *_WINDOW),
    ),
    "path_convolution_update": lambda: (
        *(_randn(8, 3, 3, 2), _randn(8, 3, 3, 2), None, _positive(1, 6, 7, 9), _positive(1, 8, 4, 8)),
        *(torch.zeros((), dtype=torch.float64), 2.0, (0.1, 0.0, 0.0, 1.0, 1.0), *_WINDOW, None, None, None),
    ),
    "bayes_noise": lambda: (torch.zeros(3, 67), torch.tensor(5), 2, 1),
    "bayes_sample": lambda: (_randn(3, 67), _randn(3, 67), torch.tensor(5), _randn(67, 3).mT, 0.5, 0, False, None),
    "bayes_sample_backward": lambda: (
        *(_randn(3, 67), torch.tensor(0.5), _randn(3, 67), _randn(3, 67), torch.tensor(5)),
        *(None, 0.5, 0, False),
    ),
    "bayes_kl": lambda: ([_randn(3, 67), _randn(65)], [_randn(3, 67), _randn(65)], [_randn(0), _randn(65)], [0.5, 2.0]),
    "bayes_kl_backward": lambda: (
        *(torch.tensor(0.5), [_randn(3, 67), _randn(65)], [_randn(3, 67), _randn(65)], [_randn(0), _randn(65)]),
        [0.5, 2.0],
    ),
    "bayes_linear": lambda: (
        *(_randn(7, 35), _randn(18, 35), _randn(18, 35), _randn(18), _randn(18), torch.tensor(5)),
        *(None, None, 0.5),
    ),
    "bayes_linear_backward": lambda: (
        *(_randn(7, 18), torch.tensor(0.5), _randn(7, 35), _randn(18, 35), _randn(18, 35), _randn(18), _randn(18)),
        *(torch.tensor(5), None, None, 0.5, True),
    ),
    "bayes_local": lambda: (
        *(_randn(7, 35), _randn(18, 35), _randn(18, 35), _randn(18), _randn(18), torch.tensor(5)),
        *(None, None, 0.5),
    ),
    "bayes_local_backward": lambda: (
        *(_randn(7, 18), torch.tensor(0.5), _randn(7, 35), _randn(18, 35), _randn(18, 35), _randn(18), _randn(18)),
        *(torch.tensor(5), None, None, 0.5, _randn(7, 18).abs() + 0.5, True),
    ),
    "bayes_linear_samples": lambda: (
        *(_randn(1, 7, 35), _randn(18, 35), _randn(18, 35), _randn(18), _randn(18), torch.tensor(5)),
        *(0, 3),
    ),
}


def self_check() -> Iterator[tuple[str, float, float]]:
    """For each op: its name, and of its tensor that is nearest to its bound the relative difference and the bound."""
    for name, example in EXAMPLES.items():
        op = getattr(torch.ops.finite_width, name).default
        results, rights = _outcome(op, example()), _outcome(_library.REFERENCES[name], example())
        pairs = zip(results, rights, strict=True)
        found = [(_difference([result], [right]), BOUNDS.get(right.dtype, 0.0)) for result, right in pairs]
        yield name, *max(found, key=_excess)


def _excess(found: tuple[float, float]) -> float:
    """A difference in multiples of its bound; infinite for NaN, and beyond a bound of 0."""
    difference, bound = found
    if bound == 0:
        return 0.0 if difference == 0 else math.inf
    return math.inf if math.isnan(difference) else difference / bound


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a call returns and what it leaves in its arguments (an op may write them)."""
    copies = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments)
    leaves = tree_flatten((function(*copies), copies))[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _difference(results: list[Tensor], rights: list[Tensor]) -> float:
    """max |result − right| / max |right|, the largest over the tensors; NaN where one is NaN."""
    worst = 0.0
    for result, right in zip(results, rights, strict=True):
        if right.numel() == 0 or not right.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(result, right) else float("inf"))
            continue
        difference = float((result.double() - right.double()).abs().max() / right.double().abs().max().clamp_min(1e-30))
        worst = difference if not difference <= worst else worst
    return worst
