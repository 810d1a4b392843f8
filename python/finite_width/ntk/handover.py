"""The NTK operator in the shape that linear_operator and GPyTorch work with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .operator import NTKOperator


def to_linear_operator(operator: NTKOperator) -> Any:
    """See `NTKOperator.to_linear_operator`."""
    try:
        from linear_operator import LinearOperator
    except ImportError:
        raise ImportError("to_linear_operator needs linear_operator: pip install linear_operator") from None

    class NTKLinearOperator(LinearOperator):
        """A kernel that is applied, never formed; constant for autograd, as its hyperparameters stand outside."""

        def __init__(self, *, operator: NTKOperator) -> None:
            super().__init__(operator=operator)
            self.operator = operator

        def _matmul(self, rhs: Tensor) -> Tensor:
            if rhs.dim() <= 2:
                return self.operator @ rhs
            # Leading axes of the right-hand side are further columns.
            columns = rhs.movedim(-2, 0)
            result = self.operator @ columns.reshape(columns.shape[0], -1)
            return result.reshape(-1, *columns.shape[1:]).movedim(0, -2)

        def _size(self) -> torch.Size:
            return torch.Size(self.operator.shape)

        def _transpose_nonbatch(self) -> Any:
            return NTKLinearOperator(operator=self.operator.T)

        def _diagonal(self) -> Tensor:
            return self.operator.diagonal()

        def to_dense(self) -> Tensor:
            return self.operator.to_dense()

        @property
        def dtype(self) -> torch.dtype:
            return self.operator.dtype

        @property
        def device(self) -> torch.device:
            return self.operator.device

        def requires_grad_(self, val: bool) -> Any:
            return self

    return NTKLinearOperator(operator=operator)
