"""K v = J1 (J2ᵀ v) by one rank or many, with the same bits: fixed blocks of rows, summed in a fixed tree."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .contract import Batch
from .products import Products, Vectors
from .ranks import Ranks

# The blocks of rows are summed in so many parts, which are halves of halves of the whole: so many ranks can share a
# product, and one rank holds log2 of it vectors more. Part of the bits.
_PARTS = 16

Blocks = list[tuple[int, int]]


def owner(index: int, count: int, ranks: Ranks) -> int:
    """The rank of the index-th of `count` pieces: each rank has a stretch of them."""
    return index * ranks.size // count


def pull(products: Products, batch: Batch, blocks: Blocks, cotangents: Tensor, ranks: Ranks) -> Vectors:
    """Jᵀ u over all rows, on every rank: cotangents [k, n, O] to one vector per parameter."""
    count = min(len(blocks), _PARTS)

    def part(index: int) -> Vectors:
        total: Vectors = {}
        for begin, end in blocks[index * len(blocks) // count : (index + 1) * len(blocks) // count]:
            pulled = products.pull(batch, begin, end, cotangents[:, begin:end])
            total = _add(total, pulled) if total else pulled
        return total

    def empty() -> Vectors:
        size = len(cotangents)
        return {name: value.new_empty(size, *value.shape) for name, value in products.target.parameters.items()}

    return tree_sum(part, count, ranks, empty)


def tree_sum(part: Callable[[int], Vectors], count: int, ranks: Ranks, empty: Callable[[], Vectors]) -> Vectors:
    """Σ part(index) on every rank, by halves of halves: each rank sums the branches whose parts are all its own.

    Args:
        empty: tensors of a part's shapes, to receive the branch of another rank.
    """
    own: dict[tuple[int, int], Vectors] = {}

    def single(begin: int, end: int) -> bool:
        return owner(begin, count, ranks) == owner(end - 1, count, ranks)

    def alone(begin: int, end: int) -> Vectors:
        if end - begin == 1:
            return part(begin)
        middle = (begin + end) // 2
        return _add(alone(begin, middle), alone(middle, end))

    def compute(begin: int, end: int) -> None:
        if not single(begin, end):
            compute(begin, (begin + end) // 2)
            compute((begin + end) // 2, end)
        elif owner(begin, count, ranks) == ranks.rank:
            own[begin, end] = alone(begin, end)

    def exchange(begin: int, end: int) -> Vectors:
        if not single(begin, end):
            middle = (begin + end) // 2
            return _add(exchange(begin, middle), exchange(middle, end))
        branch = own.pop((begin, end)) if (begin, end) in own else empty()
        return {name: ranks.send(value, owner(begin, count, ranks)) for name, value in branch.items()}

    compute(0, count)  # all ranks at once, before any waits for another
    return exchange(0, count)


def push(products: Products, batch: Batch, blocks: Blocks, vectors: Vectors, ranks: Ranks) -> Tensor:
    """J w [k, n, O] for all rows, on every rank."""
    size, like = len(next(iter(vectors.values()))), next(iter(vectors.values()))
    dtype = products.target.dtype
    result = like.new_zeros(size, batch.rows, products.outputs, dtype=dtype)
    for index, (begin, end) in enumerate(blocks):
        if owner(index, len(blocks), ranks) == ranks.rank:
            result[:, begin:end] = products.push(batch, begin, end, vectors)
    return ranks.sum(result)


def _add(one: Vectors, other: Vectors) -> Vectors:
    return {name: value + other[name] for name, value in one.items()}
