"""Which way a Tensor-Train product is computed: the search over contraction trees of consecutive cores, and its cost.

Merging consecutive cores first and then meeting x with the merged cores one after another is a contraction tree:

- two groups, "halves": the fused kernel, whose intermediate stays in cache, forward and backward;
- one group, "dense": W is built and multiplied, in any of the three passes (result, gradient of x, of the cores);
- three groups or more, "chain": plain torch, worth it for many cores of small rank.

The cost of a tree is its time in nanoseconds on two cores: multiply-adds / rate + bytes / bandwidth + launches, for
forward and backward together. It decides between trees; it does not predict times on other machines. On a GPU with
CUDA kernels the costs are those of gpu_costs.py, and a plan takes one method for all three passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, combinations, pairwise, product
from math import prod

import torch

from .. import _library
from . import gpu_costs
from .precision import PRECISIONS

# Measured on two cores with AVX-512; only their ratios matter for the choice.
FUSED_RATE = 180.0  # multiply-adds of the fused kernel per nanosecond, float32
CHAIN_RATE = 40.0  # multiply-adds of torch.matmul on small matrices per nanosecond, float32
BANDWIDTH = 20.0  # bytes per nanosecond
FUSED_LAUNCH = 12_000.0  # nanoseconds for the fused op and its backward, each
CHAIN_LAUNCH = 12_000.0  # nanoseconds for one step of a chain (merge, permutation, product), each way
STORE = 3.0  # writing one vector of a product costs as much as so many multiply-adds of it

LONG = 10  # with more cores than that, chains of at most four groups are considered

CoreShape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Plan:
    """One way to compute a Tensor-Train product, and what it costs for one batch.

    Attributes:
        method: "halves", "dense" or "chain".
        groups: how many consecutive cores are merged into each factor.
        left_first: whether x meets the leftmost factor first.
        dense_forward, dense_input_grad, dense_core_grads: the passes that build W or its gradient.
        batch: the batch the plan was made for: the next power of two.
        multiply_adds_forward, multiply_adds_backward: of the whole call, merging included.
        bytes_moved: read and written by forward and backward, apart from what stays in cache.
        cost: estimated nanoseconds on the machine that the constants above were measured on, forward and backward;
            only its ratio to other plans' costs means anything elsewhere.
        precision: of float32 on a GPU (`cuda_precision`); None on a CPU.
    """

    method: str
    groups: tuple[int, ...]
    left_first: bool
    dense_forward: bool
    dense_input_grad: bool
    dense_core_grads: bool
    batch: int
    multiply_adds_forward: float
    multiply_adds_backward: float
    bytes_moved: float
    cost: float
    precision: str | None = None

    def code(self, in_cores: int) -> tuple[int, ...]:
        """The plan as the ops take it (`reference.Plan`)."""
        flags = (self.left_first, self.dense_forward, self.dense_input_grad, self.dense_core_grads)
        code = (self.groups[0], *map(int, flags), in_cores)
        return code if self.precision is None else (*code, PRECISIONS.index(self.precision))

    def __str__(self) -> str:
        first = "the left factor first" if self.left_first else "the right factor first"
        names = ("result", "gradient of x", "gradients of the cores")
        dense = [
            n
            for n, on in zip(names, (self.dense_forward, self.dense_input_grad, self.dense_core_grads), strict=True)
            if on
        ]
        how = {
            "halves": f"fused halves, {first}" + (f"; through the dense W: {', '.join(dense)}" if dense else ""),
            "dense": "the dense W, built in each call",
            "chain": f"a chain in plain torch, {first}",
        }[self.method]
        return (
            f"batch {self.batch}: cores merged as {'+'.join(map(str, self.groups))}; {how}\n"
            f"  forward  {self.multiply_adds_forward / 1e6:10.3f} M multiply-adds\n"
            f"  backward {self.multiply_adds_backward / 1e6:10.3f} M multiply-adds\n"
            f"  memory   {self.bytes_moved / 1e6:10.3f} MB moved\n"
            f"  estimated cost (relative) {self.cost / 1e6:.3f}, forward and backward"
        )


def bucket(batch: int) -> int:
    """The next power of two."""
    return 1 << max(int(batch) - 1, 0).bit_length()  # of numpy's, or a tensor under torch.jit.trace, too


def plan(
    shapes: Sequence[Sequence[int]], batch: int, dtype: torch.dtype = torch.float32, precision: str | None = None
) -> Plan:
    """The cheapest plan for cores of these shapes [r_{k-1}, m_k, n_k, r_k] and a batch; found once, then cached.

    Args:
        shapes: of the cores.
        batch: rows of x.
        dtype: of x and the cores.
        precision: None for the CPU, and where no CUDA kernel is registered; else the GPU's, with this `cuda_precision`.

    Example:
        >>> from finite_width.tt.planner import plan
        >>> plan([(1, 4, 4, 8), (8, 8, 8, 8), (8, 8, 8, 8), (8, 4, 4, 1)], 64).groups
        (2, 2)
    """
    found = tuple(map(tuple, shapes))
    if precision is None:
        return _search(found, bucket(batch), 8 if dtype == torch.float64 else 4)
    return _search_gpu(found, bucket(batch), dtype, precision)


@_library.constant_while_tracing
def plan_code(
    shapes: tuple[CoreShape, ...], batch: int, dtype: torch.dtype, in_cores: int, precision: str | None = None
) -> tuple[int, ...]:
    """`plan(...).code(in_cores)`; for a chain (0, left_first, *groups), of one group where W itself is built."""
    return _code(shapes, bucket(batch), dtype, in_cores, precision)


@cache
def _code(
    shapes: tuple[CoreShape, ...], batch: int, dtype: torch.dtype, in_cores: int, precision: str | None
) -> tuple[int, ...]:
    best = plan(shapes, batch, dtype, precision)
    if best.method == "chain" or (best.method == "dense" and precision is not None):
        return (0, int(best.left_first), *best.groups)
    return best.code(in_cores)


@cache
def _search(shapes: tuple[CoreShape, ...], batch: int, itemsize: int) -> Plan:
    if len(shapes) == 1:
        _, m, n, _ = shapes[0]
        adds = float(batch * m * n)
        moved = float(itemsize * (3 * m * n + batch * (2 * m + 3 * n)))
        return Plan("dense", (1,), True, True, True, True, batch, adds, 2 * adds, moved, 3 * adds / FUSED_RATE)
    candidates = [*_halves(shapes, batch, itemsize), *_chains(shapes, batch, itemsize)]
    return min(candidates, key=lambda candidate: candidate.cost)


@cache
def _search_gpu(shapes: tuple[CoreShape, ...], batch: int, dtype: torch.dtype, precision: str) -> Plan:
    """The plan of a GPU: its FLOPs and bytes are the CPU planner's for the same tree, its cost gpu_costs.py's."""
    kind = {torch.float32: precision, torch.float64: "float64"}.get(dtype, "half")
    size = gpu_costs.itemsize(kind)
    rows, columns = prod(s[1] for s in shapes), prod(s[2] for s in shapes)
    dense = Plan(
        "dense", (len(shapes),), True, True, True, True, batch,
        float(batch * rows * columns), 2.0 * batch * rows * columns,
        float(size * (batch * (2 * rows + 3 * columns) + 6 * rows * columns)),
        gpu_costs.dense(shapes, batch, kind), precision,
    )  # fmt: skip
    candidates = [dense]
    for each in _halves(shapes, batch, size) if len(shapes) > 1 else ():
        if not (each.dense_forward or each.dense_input_grad or each.dense_core_grads):
            cost = gpu_costs.fused(shapes, each.groups[0], each.left_first, batch, kind)
            candidates.append(replace(each, cost=cost, precision=precision))
    for each in _chains(shapes, batch, size):
        adds = each.multiply_adds_forward + each.multiply_adds_backward
        cost = adds / gpu_costs.TORCH_RATES["ieee" if kind == "half" else kind]  # in float32, as reference.py
        cost += each.bytes_moved / gpu_costs.BANDWIDTH + 10 * len(each.groups) * gpu_costs.LAUNCH
        candidates.append(replace(each, cost=cost, precision=precision))
    return min(candidates, key=lambda candidate: candidate.cost)


def _merge_adds(shapes: Sequence[CoreShape], from_left: bool) -> float:
    """Multiply-adds of merging consecutive cores one by one."""
    total, order = 0.0, list(shapes) if from_left else list(reversed(shapes))
    merged = prod(order[0])
    for core in order[1:]:
        shared = core[0] if from_left else core[3]
        merged = merged // shared * prod(core) // shared
        total += float(merged * shared)
    return total


def _product(rows: float, lanes: int, inner: float, itemsize: int) -> float:
    """Multiply-adds of [rows, inner] @ [inner, lanes], idle lanes and the writing of the result counted too."""
    width = 64 // itemsize
    return rows * (-(-lanes // width) * width) * (inner + STORE)


def _halves(shapes: tuple[CoreShape, ...], batch: int, itemsize: int) -> Iterator[Plan]:
    rows, columns = prod(s[1] for s in shapes), prod(s[2] for s in shapes)
    rate = FUSED_RATE * 4 / itemsize
    for split in range(1, len(shapes)):
        left, right = shapes[:split], shapes[split:]
        m1, n1 = prod(s[1] for s in left), prod(s[2] for s in left)
        m2, n2 = prod(s[1] for s in right), prod(s[2] for s in right)
        rank = right[0][0]
        merge = _merge_adds(left, True) + _merge_adds(right, False)
        to_rows, to_columns = (_product(batch, *pair, itemsize) for pair in ((rows, columns), (columns, rows)))
        sizes = rank * (m1 * n1 + m2 * n2)
        for left_first in (True, False):
            first, second, grad_first, grad_second = _pair(batch, m1, n1, m2, n2, rank, left_first, itemsize)
            outer = _product(*((rows, columns) if left_first else (columns, rows)), batch, itemsize)
            builds, unbuild = _dense(m1, n1, m2, n2, rank, left_first, itemsize)
            for dense in product((False, True), repeat=3):
                forward = merge + (builds[0] + to_rows if dense[0] else first + second)
                backward = 3 * merge  # merged again, then unmerged
                middle = 0.0 if dense[1] and dense[2] else second  # the gradient of the intermediate
                backward += middle
                backward += builds[1] + to_columns if dense[1] else first
                backward += outer + unbuild if dense[2] else first + grad_first + grad_second
                moved = itemsize * (batch * (2 * rows + 3 * columns) + 6.0 * sizes + 2.0 * rows * columns * sum(dense))
                cost = (forward + backward) / rate + moved / BANDWIDTH + 2 * FUSED_LAUNCH
                method = "dense" if all(dense) else "halves"
                groups = (split, len(shapes) - split)
                yield Plan(
                    method, groups, left_first, dense[0], dense[1], dense[2], batch, forward, backward, moved, cost
                )


def _pair(
    batch: int, m1: int, n1: int, m2: int, n2: int, rank: int, left_first: bool, itemsize: int
) -> tuple[float, float, float, float]:
    """Multiply-adds of the first product, the second, and the gradients of the first and the second factor."""
    if not left_first:  # the same with both halves and both modes exchanged, but for what lies along the lanes
        first = _product(batch * n1, rank * m2, n2, itemsize)
        second = _left_product(batch, m1, m2, n1 * rank, itemsize)
        return (
            first,
            second,
            _product(n2, rank * m2, batch * n1, itemsize),
            _product(n1 * rank, m1, batch * m2, itemsize),
        )
    first = _left_product(batch, m1 * rank, n2, n1, itemsize)
    second = _product(batch * m1, m2, rank * n2, itemsize)
    return first, second, _product(m1 * rank, n1, batch * n2, itemsize), _product(m2, rank * n2, batch * m1, itemsize)


def _dense(
    m1: int, n1: int, m2: int, n2: int, rank: int, left_first: bool, itemsize: int
) -> tuple[tuple[float, float], float]:
    """Multiply-adds of building W for the result and for the gradient of x, and of the factors' gradients from W's.

    In the kernel's letters (csrc/tt/halves.h): W [(s q), (i j)].
    """
    i, s, q, j = (n1, m1, m2, n2) if left_first else (m1, n1, n2, m2)
    if j > 1:
        build = _product(s * q * i, j, rank, itemsize)
        unbuild = _product(q * rank, j, s * i, itemsize) + _product(s * i, rank, q * j, itemsize)
        return (build, build), unbuild
    builds = (_product(s * i, q, rank, itemsize), _product(s * q, i, rank, itemsize))
    unbuild = _product(q, rank, s * i, itemsize) + _product(s * i, rank, q, itemsize)
    return (builds if left_first else (builds[1], builds[0])), unbuild


def _left_product(batch: int, rows: int, lanes: int, inner: int, itemsize: int) -> float:
    """[rows, inner] @ [inner, lanes] for each of a batch; one column each becomes one product of the whole batch."""
    if lanes == 1:
        return _product(batch, rows, inner, itemsize)
    return _product(batch * rows, lanes, inner, itemsize)


def _chains(shapes: tuple[CoreShape, ...], batch: int, itemsize: int) -> Iterator[Plan]:
    count = len(shapes)
    columns = prod(s[2] for s in shapes)
    rate = CHAIN_RATE * 4 / itemsize
    most = count - 1 if count <= LONG else 3
    for cuts in chain.from_iterable(combinations(range(1, count), number) for number in range(2, most + 1)):
        groups = [end - begin for begin, end in pairwise((0, *cuts, count))]
        merged, merge, start = [], 0.0, 0
        for size in groups:
            part = shapes[start : start + size]
            merge += _merge_adds(part, True)
            merged.append((part[0][0], prod(s[1] for s in part), prod(s[2] for s in part), part[-1][3]))
            start += size
        for left_first in (True, False):
            adds, moved, done, left = 0.0, 0.0, 1, columns
            for r, m, n, r_right in merged if left_first else reversed(merged):
                before, after = (r, r_right) if left_first else (r_right, r)
                left //= n
                adds += float(batch * done * left * (before * n) * (m * after))
                moved += 3.0 * itemsize * batch * done * left * (before * n + m * after)
                done *= m
            total = 3 * (merge + adds)
            cost = total / rate + 3 * moved / BANDWIDTH + 2 * CHAIN_LAUNCH * len(groups)
            yield Plan(
                "chain",
                tuple(groups),
                left_first,
                False,
                False,
                False,
                batch,
                merge + adds,
                2 * (merge + adds),
                3 * moved,
                cost,
            )
