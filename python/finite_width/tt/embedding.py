"""TTEmbedding: an embedding table that is a Tensor Train, looked up row by row."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from . import decomposition, reference
from .linear import Ranks, TTCores, check_trained, exact, find_modes, largest_rank, ranks_within

INDEX_DTYPES = (torch.int64, torch.int32)


class TTEmbedding(TTCores):
    """Rows of a table W [num_embeddings, embedding_dim] that is a Tensor Train; single rows, or sums or means of bags.

    W[(v_1 ... v_d), (e_1 ... e_d)] = G_1[v_1, e_1] ··· G_d[v_d, e_d]. A row is the product of two factors, looked up
    in the merged halves of the train, which have about √num_embeddings rows each: the table is never built. Equal
    indices are computed once.

    Args:
        num_embeddings, embedding_dim: of the table.
        rank: one integer for all inner bonds, lowered where a bond cannot use so many; or a list, one for each.
        mode: None for single rows; "sum" or "mean" of bags of rows.
        padding_idx: the index of a row that is zero and has no gradient; bags leave it out, of the mean's count too.
            Negative ones count from the end.
        num_modes, dim_modes: factors of num_embeddings and embedding_dim; balanced ones if left out.
        device, dtype: of the parameters.

    Raises:
        ValueError: modes that do not multiply to the size, a rank of 0, a padding_idx outside of the table.

    Source: Hrinchuk et al., "Tensorized Embedding Layers", 2020; Yin et al., "TT-Rec", MLSys 2021.

    Example:
        >>> import torch, finite_width as fw
        >>> table = fw.tt.TTEmbedding(50_000, 64, rank=8)
        >>> table(torch.tensor([[3, 49_999], [3, 0]])).shape, round(table.compression_ratio)
        (torch.Size([2, 2, 64]), 1124)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        rank: Ranks = 8,
        mode: str | None = None,
        padding_idx: int | None = None,
        num_modes: Sequence[int] | None = None,
        dim_modes: Sequence[int] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check.positive_int("num_embeddings", num_embeddings)
        _check.positive_int("embedding_dim", embedding_dim)
        _check.one_of("mode", mode, (None, "sum", "mean"))
        if padding_idx is not None:
            _check.integer("padding_idx", padding_idx)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx must lie between {-num_embeddings} and {num_embeddings - 1}, got {padding_idx}"
            )
        self.num_embeddings, self.embedding_dim, self.mode = num_embeddings, embedding_dim, mode
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.dim_modes, self.num_modes = find_modes(
            embedding_dim, num_embeddings, dim_modes, num_modes, "matrix", ("embedding_dim", "num_embeddings")
        )
        self.padded_dim, self.padded_num = prod(self.dim_modes), prod(self.num_modes)
        pairs = list(zip(self.num_modes, self.dim_modes, strict=True))
        bonds = (1, *ranks_within("rank", rank, tuple(v * e for v, e in pairs)), 1)
        self._register_cores([(bonds[k], *pair, bonds[k + 1]) for k, pair in enumerate(pairs)], device, dtype)
        # The cut where the two halves hold the least.
        sizes = [
            bonds[k] * (prod(v * e for v, e in pairs[:k]) + prod(v * e for v, e in pairs[k:]))
            for k in range(1, len(pairs))
        ]
        self._split = 1 + sizes.index(min(sizes)) if sizes else 0
        self._num_right = prod(self.num_modes[self._split :])
        self.reset_parameters()

    def reset_parameters(self, variance: float = 1.0) -> None:
        """Draw new values: W of the given mean square (default 1, nn.Embedding's)."""
        if not variance > 0:
            raise ValueError(f"variance must be positive, got {variance}")
        self._start(variance)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding | nn.EmbeddingBag,
        *,
        eps: float | None = None,
        max_rank: int | Sequence[int] | None = None,
        target_params: int | None = None,
        num_modes: Sequence[int] | None = None,
        dim_modes: Sequence[int] | None = None,
    ) -> TTEmbedding:
        """The Tensor Train of a trained table (TT-SVD in float64).

        Args:
            embedding: an nn.Embedding, or an nn.EmbeddingBag of mode "sum" or "mean"; without max_norm,
                scale_grad_by_freq, sparse and include_last_offset; the row of its padding_idx must be zero. Left as it
                is.
            eps, max_rank, target_params: as in `TTLinear.from_linear`.
            num_modes, dim_modes: as in the constructor.

        Raises:
            ValueError: none of eps, max_rank and target_params; NaN weights; an embedding of another kind.
            TypeError: not an nn.Embedding or nn.EmbeddingBag; otherwise as `TTLinear.from_linear`.
        """
        if not isinstance(embedding, (nn.Embedding, nn.EmbeddingBag)):
            raise TypeError(f"embedding must be an nn.Embedding or nn.EmbeddingBag, got {type(embedding).__name__}")
        decomposition.one_given(eps=eps, max_rank=max_rank, target_params=target_params)
        check_trained("embedding", embedding.weight)
        if unlike := unlike_a_train(embedding):
            raise ValueError(f"embedding must be one that a TTEmbedding can stand for, but has {unlike}")
        weight, padding_idx = embedding.weight.detach(), embedding.padding_idx
        modes_dim, modes_num = find_modes(
            embedding.embedding_dim,
            embedding.num_embeddings,
            dim_modes,
            num_modes,
            "matrix",
            ("embedding_dim", "num_embeddings"),
        )
        if target_params is not None:
            _check.positive_int("target_params", target_params)
            sizes = tuple(v * e for v, e in zip(modes_num, modes_dim, strict=True))
            max_rank = largest_rank(sizes, target_params, max_rank, f"target_params = {target_params}")
        padded = F.pad(
            weight.double(),
            (0, prod(modes_dim) - embedding.embedding_dim, 0, prod(modes_num) - embedding.num_embeddings),
        )
        cores = decomposition.tt_matrix_svd(padded, modes_num, modes_dim, eps=eps, max_rank=max_rank)
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            rank=[core.shape[0] for core in cores[1:]],
            mode=embedding.mode if isinstance(embedding, nn.EmbeddingBag) else None,
            padding_idx=padding_idx,
            num_modes=exact(modes_num, embedding.num_embeddings),
            dim_modes=exact(modes_dim, embedding.embedding_dim),
            device=weight.device,
            dtype=weight.dtype,
        )
        layer.set_cores(cores)
        return layer.train(embedding.training)

    def forward(self, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Rows, or sums or means of bags.

        Args:
            indices: int64 or int32; any shape for mode None; [B, L], B bags of L, or [n] with offsets, for bags.
            offsets: [B], where each bag begins in a flat `indices`: from 0, never falling; int64 or int32.

        Returns:
            [..., embedding_dim] of the cores' dtype, under autocast too; an empty bag gives zeros. Half precision is
            multiplied and summed in float32.

        Raises:
            IndexError: an index below 0 or from num_embeddings on. Not looked for under torch.compile and vmap.
            ValueError: shapes that do not fit; offsets that fall, or that go beyond the indices. The values are not
                looked at under torch.compile and vmap.
            TypeError: other dtypes.
        """
        _check.is_tensor("indices", indices)
        _check.is_dtype("indices", indices, INDEX_DTYPES)
        self._check_bags(indices, offsets)
        plain = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
        if plain and indices.numel():
            low, high = indices.aminmax()
            if low < 0 or high >= self.num_embeddings:
                worst = int(low if low < 0 else high)
                raise IndexError(f"indices must lie between 0 and {self.num_embeddings - 1}, got {worst}")
        if plain and offsets is not None:
            self._check_offsets(offsets, len(indices))
        return self._look_up(indices, offsets, plain).to(self.cores[0].dtype)

    @reference.without_autocast
    def _look_up(self, indices: Tensor, offsets: Tensor | None, plain: bool) -> Tensor:
        """What `forward` returns, before it is rounded to half precision; `plain`: neither compiled nor mapped."""
        if plain:
            distinct, places = torch.unique(indices, return_inverse=True)
            rows = self._rows(distinct)
            if offsets is not None:
                offsets = offsets.to(places.dtype)
                if self.mode == "sum" or self.padding_idx is None:
                    return _bags(rows, places, offsets, str(self.mode))
                counts = F.embedding_bag(places, self._counted(distinct, rows)[:, None], offsets, mode="sum")
                return _bags(rows, places, offsets, "sum") / counts.clamp_min(1)
            found = F.embedding(places, rows)
        else:
            found = self._rows(indices.reshape(-1)).reshape(*indices.shape, self.embedding_dim)
            if offsets is not None:
                return self._flat_bags(found, self._counted(indices, found), offsets)
        if self.mode is None:
            return found
        if self.mode == "sum":
            return found.sum(-2)
        return found.sum(-2) / self._counted(indices, found).sum(-1, keepdim=True).clamp_min(1)

    def _counted(self, indices: Tensor, like: Tensor) -> Tensor:
        """1 for each index that a mean counts, 0 for padding; of `like`'s dtype."""
        if self.padding_idx is None:
            return torch.ones_like(indices, dtype=like.dtype)
        return (indices != self.padding_idx).to(like.dtype)

    def _check_bags(self, indices: Tensor, offsets: Tensor | None) -> None:
        if self.mode is None:
            if offsets is not None:
                raise ValueError('offsets are for bags: give mode="sum" or "mean" to the layer')
            return
        if offsets is None:
            if indices.dim() != 2:
                raise ValueError(f"indices must have shape [B, L] without offsets, got {list(indices.shape)}")
            return
        _check.is_tensor("offsets", offsets)
        _check.is_dtype("offsets", offsets, INDEX_DTYPES)
        if indices.dim() != 1 or offsets.dim() != 1:
            raise ValueError(
                f"indices and offsets must have shapes [n] and [B], got {list(indices.shape)} and {list(offsets.shape)}"
            )

    @staticmethod
    def _check_offsets(offsets: Tensor, count: int) -> None:
        if not offsets.numel():
            return
        if offsets[0] != 0 or offsets[-1] > count or (offsets[1:] < offsets[:-1]).any():
            raise ValueError(
                f"offsets must rise from 0 to at most {count}, the number of indices, got {offsets.tolist()}"
            )

    def _flat_bags(self, rows: Tensor, counted: Tensor, offsets: Tensor) -> Tensor:
        """Bags of adjacent rows [n, D] by plain indexing, for torch.compile and vmap."""
        bag = torch.bucketize(torch.arange(rows.shape[0], device=rows.device), offsets, right=True) - 1
        sums = rows.new_zeros(offsets.shape[0], rows.shape[1]).index_add(0, bag, rows)
        if self.mode == "sum":
            return sums
        counts = torch.zeros_like(sums[:, 0]).index_add(0, bag, counted)
        return sums / counts.clamp_min(1)[:, None]

    def _rows(self, indices: Tensor) -> Tensor:
        """The rows [n, embedding_dim] of indices [n]; that of padding_idx is zero and has no gradient."""
        rows = self._products(indices)
        if self.padding_idx is None:
            return rows
        return rows.masked_fill((indices == self.padding_idx)[:, None], 0.0)

    def _products(self, indices: Tensor) -> Tensor:
        """The rows of the train: a product of two looked-up factors each, wide."""
        cores = [core.to(reference.accumulation_dtype(core.dtype)) for core in self.cores]
        if len(cores) == 1:
            return F.embedding(indices, cores[0][0, :, :, 0])[:, : self.embedding_dim]
        left, right = reference.halves(cores, self._split)  # [V1, E1, r], [r, V2, E2]
        first = _entries(left, indices // self._num_right)
        second = _entries(right.transpose(0, 1), indices % self._num_right)
        return (first @ second).flatten(1)[:, : self.embedding_dim]

    def to_dense(self) -> Tensor:
        """W [num_embeddings, embedding_dim]; differentiable."""
        table = decomposition.tt_to_dense(self.cores)[: self.num_embeddings, : self.embedding_dim]
        if self.padding_idx is None:
            return table
        padding = torch.arange(self.num_embeddings, device=table.device) == self.padding_idx
        return table.masked_fill(padding[:, None], 0.0)

    @property
    def compression_ratio(self) -> float:
        """Parameters of the table over those of the train."""
        return self.num_embeddings * self.embedding_dim / self.core_parameters

    def extra_repr(self) -> str:
        text = (
            f"{self.num_embeddings}, {self.embedding_dim}, num_modes={self.num_modes}, dim_modes={self.dim_modes}, "
            f"ranks={self.ranks}, mode={self.mode!r}"
        )
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.padded_num != self.num_embeddings:
            text += f", rows beyond {self.num_embeddings} of {self.padded_num} never looked up"
        if self.padded_dim != self.embedding_dim:
            text += f", columns beyond {self.embedding_dim} of {self.padded_dim} dropped"
        return text


def _entries(table: Tensor, indices: Tensor) -> Tensor:
    """table[indices] along the first axis, by F.embedding: its gradient has the same bits for any number of threads."""
    return F.embedding(indices, table.flatten(1)).unflatten(1, table.shape[1:])


_MODES = {"sum": 0, "mean": 1}  # as the op behind F.embedding_bag numbers them


def _bags(rows: Tensor, places: Tensor, offsets: Tensor, mode: str) -> Tensor:
    """F.embedding_bag with derivatives of any order by the rows; torch's own has the first alone."""
    if not rows.requires_grad:
        return F.embedding_bag(places, rows, offsets, mode=mode)
    result: Tensor = _Bags.apply(rows, places, offsets, _MODES[mode])
    return result


class _Bags(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, offsets: Tensor, mode: int) -> Tensor:
        bags: Tensor
        bags, *lengths = torch._embedding_bag(rows, places, offsets, False, mode)
        ctx.save_for_backward(places, offsets, *lengths)
        ctx.count, ctx.mode = rows.shape[0], mode
        return bags

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _BagsGradient.apply(grad, ctx.count, ctx.mode, *ctx.saved_tensors), None, None, None
        return _bags_gradient(grad, ctx.count, ctx.mode, *ctx.saved_tensors), None, None, None


class _BagsGradient(torch.autograd.Function):
    """Linear in the gradient of the bags; its own gradient by that is bags again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, count: int, mode: int, *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved[:2])
        ctx.mode, ctx.inputs = mode, 3 + len(saved)
        return _bags_gradient(grad, count, mode, *saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Bags.apply(grad, *ctx.saved_tensors, ctx.mode), *[None] * (ctx.inputs - 1)


def _bags_gradient(grad: Tensor, count: int, mode: int, *saved: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten._embedding_bag_backward.default(grad, *saved, count, False, mode, False, None)
    return result


def unlike_a_train(embedding: nn.Embedding | nn.EmbeddingBag) -> str:
    """What the table has or does that a TTEmbedding cannot, or ""."""
    if embedding.max_norm is not None:
        return f"max_norm = {embedding.max_norm}: the rows of a train are not free"
    for option in ("scale_grad_by_freq", "sparse", "include_last_offset"):
        if getattr(embedding, option, False):
            return f"{option}=True"
    if isinstance(embedding, nn.EmbeddingBag) and embedding.mode not in ("sum", "mean"):
        return f"mode={embedding.mode!r}"
    if embedding.padding_idx is not None and bool(embedding.weight[embedding.padding_idx].any()):
        return f"a row of padding_idx = {embedding.padding_idx} that is not zero, as TTEmbedding's is"
    return ""
