"""The kernel as a linear operator, never formed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .._interrupts import ends_its_contexts
from . import shared_products
from .contract import Inputs, preserved, refuse_training_modules
from .empirical import run
from .fingerprint import fingerprint
from .plan import Plan
from .problem import Problem
from .products import Products
from .ranks import Ranks
from .walk import Walk


class NTKOperator:
    """The empirical NTK as a matrix [N O, M O] that is applied without being formed: K v = J1 (J2ᵀ v).

    Row n O + a stands for output a of row n. Each product costs one forward and backward over x2 and one over x1;
    the memory is that of a few vectors of all parameters.

    Args:
        model: see `empirical_ntk`, as for all other arguments.

    Attributes:
        shape: (N O, M O).
        outputs: O.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        ValueError: see `empirical_ntk`.
        TypeError: see `empirical_ntk`.

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> x = torch.randn(5, 3)
        >>> op = fw.ntk.NTKOperator(model, x)
        >>> v = torch.randn(10)
        >>> bool((op @ v - op.to_dense() @ v).norm() < 1e-4 * (op @ v).norm())
        True
    """

    @ends_its_contexts
    def __init__(
        self,
        model: nn.Module,
        x1: Inputs,
        x2: Inputs | None = None,
        *,
        params: Mapping[str, Tensor] | None = None,
        output: Callable[[Any], Tensor] | None = None,
        memory_budget: int | None = None,
        progress: bool = False,
        check: bool = True,
    ) -> None:
        self._problem = Problem(
            model,
            x1,
            x2,
            compute="full",
            method="auto",
            params=params,
            output=output,
            memory_budget=memory_budget,
            progress=progress,
            check=check,
        )
        with preserved(model):
            self._plan: Plan = self._problem.plan(compared=False)
            plan = self._plan
            self._products = Products(self._problem.target, self._problem.left, plan.outputs, plan.copies_inputs)
        self._training = {name: module.training for name, module in model.named_modules()}
        self._flipped = False

    @property
    def outputs(self) -> int:
        """O, the model's outputs for each row."""
        return self._plan.outputs

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters when the operator was made, and of what is multiplied."""
        return self._problem.target.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters, and of what is multiplied."""
        return self._problem.target.device

    @property
    def shape(self) -> tuple[int, int]:
        """(N O, M O); the other way round for the transpose."""
        left, right = self._sides()
        return left.rows * self.outputs, right.rows * self.outputs

    @property
    def T(self) -> NTKOperator:
        """The transpose; shares everything with this operator."""
        other = object.__new__(NTKOperator)
        other.__dict__.update(self.__dict__)
        other._flipped = not self._flipped
        return other

    def _sides(self) -> tuple[Any, Any]:
        sides = (self._problem.left, self._problem.right)
        return sides[::-1] if self._flipped else sides

    def __matmul__(self, vector: Tensor) -> Tensor:
        """K v for v [M O] or [M O, k]."""
        return self.product(vector, Ranks())

    @ends_its_contexts
    def product(self, vector: Tensor, ranks: Ranks) -> Tensor:
        """K v on every rank: each does a stretch of the blocks of rows, and all make the same call.

        The bits are those of one rank.
        """
        left, right = self._sides()
        rows, columns = self.shape
        self._refuse_changed()
        _check.is_tensor("the vector", vector)
        _check.is_dense("the vector", vector)
        if vector.dim() not in (1, 2) or vector.shape[0] != columns:
            raise ValueError(f"the vector must have shape [{columns}] or [{columns}, k], got {list(vector.shape)}")
        if vector.dtype != self.dtype:
            raise TypeError(f"the vector has dtype {vector.dtype}, but the operator has {self.dtype}")
        if vector.device != self.device:
            raise ValueError(f"the vector is on {vector.device}, but the operator is on {self.device}")
        cotangents = vector.detach().reshape(right.rows, self.outputs, -1).permute(2, 0, 1)
        count = cotangents.shape[0]
        if count == 0:
            return vector.new_zeros(rows, 0)
        with preserved(self._problem.target.model):
            total = shared_products.pull(self._products, right, self._blocks(right), cotangents, ranks)
            pushed = shared_products.push(self._products, left, self._blocks(left), total, ranks)
        result = pushed.reshape(count, rows).t()
        return result[:, 0] if vector.dim() == 1 else result

    def fingerprint(self) -> dict[str, str]:
        """What ranks that share a product must agree on."""
        return fingerprint(self._problem, self._plan)

    def _refuse_changed(self) -> None:
        """Raise where the model is not what it was when the operator was made; new values are all that may come."""
        target, again = self._problem.target, "or make a new operator"
        refuse_training_modules(target.model)
        for name, module in target.model.named_modules():
            if module.training != self._training.get(name, module.training):
                was, now = ("eval", "train") if module.training else ("train", "eval")
                raise ValueError(
                    f"model: module {name!r} ({type(module).__name__}) was put from {was} into {now} mode after the "
                    f"operator was made; call model.{was}() {again}"
                )
        for name, value in target.parameters.items():
            if not value.requires_grad:
                raise ValueError(
                    f"parameter {name!r} was frozen (requires_grad is False) after the operator was made; unfreeze it "
                    f"{again}"
                )
            real = value.dtype.to_real() if value.is_complex() else value.dtype
            if real != self.dtype:
                raise TypeError(
                    f"parameter {name!r} was converted from {self.dtype} to {real} after the operator was made; "
                    f"convert it back {again}"
                )
            if value.device != self.device:
                raise ValueError(
                    f"parameter {name!r} was moved from {self.device} to {value.device} after the operator was made; "
                    f"move it back {again}"
                )

    def _blocks(self, batch: Any) -> list[tuple[int, int]]:
        return [(begin, min(begin + self._plan.block, batch.rows)) for begin in range(0, batch.rows, self._plan.block)]

    @ends_its_contexts
    def diagonal(self) -> Tensor:
        """The main diagonal [min(N, M) O], by blocks of rows."""
        self._refuse_changed()
        with preserved(self._problem.target.model):
            return self._problem.with_plan(self._diagonal, self._plan)

    def _diagonal(self, plan: Plan) -> Tensor:
        count, block = min(self._problem.left.rows, self._problem.right.rows), plan.block
        cuts = [(begin, min(begin + block, count)) for begin in range(0, count, block)]
        return torch.cat([Walk.pair(self._problem, plan, *cut) for cut in cuts]).flatten()

    def to_dense(self) -> Tensor:
        """The matrix [N O, M O]."""
        self._refuse_changed()
        kernel = run(self._problem)
        assert isinstance(kernel, Tensor)
        matrix = kernel.permute(0, 2, 1, 3).reshape(kernel.shape[0] * self.outputs, kernel.shape[1] * self.outputs)
        return matrix.t() if self._flipped else matrix

    def to_linear_operator(self) -> Any:
        """The same operator as a `linear_operator.LinearOperator`, for GPyTorch and its solvers.

        It is constant for autograd: scales, noise and other hyperparameters stand outside of it.

        Returns:
            A LinearOperator of this shape; nothing is computed or copied.

        Raises:
            ImportError: linear_operator is not installed.

        Example:
            >>> import torch, finite_width as fw
            >>> op = fw.ntk.NTKOperator(torch.nn.Linear(3, 1), torch.randn(5, 3))
            >>> lazy = op.to_linear_operator()  # doctest: +SKIP
            >>> lazy.add_diagonal(torch.tensor(0.1)).solve(torch.randn(5, 1))  # doctest: +SKIP
        """
        from .handover import to_linear_operator

        return to_linear_operator(self)

    def __repr__(self) -> str:
        return f"NTKOperator(shape={self.shape}, outputs={self.outputs}, dtype={self.dtype})"
