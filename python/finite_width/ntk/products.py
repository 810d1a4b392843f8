"""Vector-Jacobian and Jacobian-vector products of the whole model, and the kernel by them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._interrupts import closed_transforms
from .agreement import agrees
from .contract import Batch, Target, flatten
from .norms import norms_by_formula
from .problem import Problem, progress_bar
from .walk import mirror

Vectors = dict[str, Tensor]  # parameter name -> [k, *its shape]


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by plain products: torch's fused kernels have neither forward-mode nor second derivatives."""
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class Products:
    """Jᵀ u and J w for rows of a batch, k vectors at once where the model allows it."""

    def __init__(self, target: Target, batch: Batch, outputs: int, copies: bool) -> None:
        self.target, self.outputs, self.copies = target, outputs, copies
        self.batched_pull = True
        self.push_route = ""
        self._choose(batch)

    def pull(self, batch: Batch, begin: int, end: int, cotangents: Tensor) -> Vectors:
        """Σ over rows of Jᵀ u: cotangents [k, n, O] to one vector per parameter."""
        with _plain_attention(), closed_transforms(), norms_by_formula(end - begin):
            return self._pull(batch, begin, end, cotangents)

    def _pull(self, batch: Batch, begin: int, end: int, cotangents: Tensor) -> Vectors:
        parameters = list(self.target.parameters.values())
        result = flatten(self.target.run(batch, batch.take(begin, end, self.copies)))
        if result.grad_fn is None:
            return {
                name: value.new_zeros(len(cotangents), *value.shape) for name, value in self.target.parameters.items()
            }

        def single(cotangent: Tensor) -> tuple[Tensor, ...]:
            found = torch.autograd.grad(result, parameters, cotangent, retain_graph=True, allow_unused=True)
            return tuple(
                torch.zeros_like(parameter) if value is None else value.to_dense() if value.is_sparse else value
                for parameter, value in zip(parameters, found, strict=True)
            )

        if self.batched_pull and len(cotangents) > 1:
            stacked = torch.func.vmap(single)(cotangents)
        else:
            stacked = tuple(torch.stack(column) for column in zip(*map(single, cotangents), strict=True))
        return {name: value.detach() for name, value in zip(self.target.parameters, stacked, strict=True)}

    def push(self, batch: Batch, begin: int, end: int, vectors: Vectors) -> Tensor:
        """J w for each row: [k, n, O]."""
        with _plain_attention(), closed_transforms(), norms_by_formula(end - begin):
            return self._pushes[self.push_route](batch, batch.take(begin, end, self.copies), vectors)

    @property
    def _pushes(self) -> dict[str, Callable[[Batch, Sequence[Tensor], Vectors], Tensor]]:
        return {
            "batched forward mode": lambda *args: self._forward_mode(*args, batched=True),
            "forward mode": lambda *args: self._forward_mode(*args, batched=False),
            "double backward": self._double_backward,
            "rows": self._by_rows,
        }

    def _forward_mode(self, batch: Batch, tensors: Sequence[Tensor], vectors: Vectors, *, batched: bool) -> Tensor:
        values = {name: value.detach() for name, value in self.target.parameters.items()}

        def function(values: Vectors) -> Tensor:
            return flatten(self.target.run(batch, tensors, values))

        def single(vector: Vectors) -> Tensor:
            result: Tensor = torch.func.jvp(function, (values,), (vector,))[1]
            return result

        with torch.no_grad():
            if batched:
                return torch.func.vmap(single, randomness="error")(vectors)
            count = len(next(iter(vectors.values())))
            return torch.stack([single({name: value[i] for name, value in vectors.items()}) for i in range(count)])

    def _double_backward(self, batch: Batch, tensors: Sequence[Tensor], vectors: Vectors) -> Tensor:
        """J w is the derivative of ⟨Jᵀ u, w⟩ by u."""
        parameters = list(self.target.parameters.values())
        result = flatten(self.target.run(batch, tensors))
        dummy = torch.zeros_like(result, requires_grad=True)
        gradients = torch.autograd.grad(result, parameters, dummy, create_graph=True, allow_unused=True)
        columns = []
        for index in range(len(next(iter(vectors.values())))):
            terms = [
                torch.real(gradient.conj() * vectors[name][index]).sum()
                if gradient.is_complex()
                else (gradient * vectors[name][index]).sum()
                for name, gradient in zip(self.target.parameters, gradients, strict=True)
                if gradient is not None and gradient.requires_grad
            ]
            if not terms:
                columns.append(torch.zeros_like(result))
                continue
            (column,) = torch.autograd.grad(torch.stack(terms).sum(), dummy, retain_graph=True)
            columns.append(column)
        return torch.stack(columns).detach()

    def _by_rows(self, batch: Batch, tensors: Sequence[Tensor], vectors: Vectors) -> Tensor:
        """The definition: one gradient per row and output."""
        result = flatten(self.target.run(batch, tensors))
        count = len(next(iter(vectors.values())))
        out = result.new_zeros(count, *result.shape)
        parameters = list(self.target.parameters.values())
        for row in range(result.shape[0]):
            for output in range(result.shape[1]):
                found = torch.autograd.grad(result[row, output], parameters, retain_graph=True, allow_unused=True)
                for (_, vector), gradient in zip(vectors.items(), found, strict=True):
                    if gradient is not None:
                        gradient = gradient.to_dense() if gradient.is_sparse else gradient
                        product = gradient.conj() * vector
                        out[:, row, output] += (product.real if product.is_complex() else product).flatten(1).sum(1)
        return out.detach()

    def _choose(self, batch: Batch) -> None:
        """Pick the quickest route that works, tried on two rows: ⟨u, J w⟩ must be ⟨Jᵀ u, w⟩."""
        rows = min(2, batch.rows)
        generator = torch.Generator(device=self.target.device).manual_seed(0)
        shape = (2, rows, self.outputs)
        cotangents = torch.randn(shape, generator=generator, dtype=self.target.dtype, device=self.target.device)
        single = self.pull(batch, 0, rows, cotangents.sum(0, keepdim=True))
        try:
            pulled = self.pull(batch, 0, rows, cotangents)
            self.batched_pull = all(agrees(pulled[name].sum(0), single[name][0]) for name in single)
        except Exception:
            self.batched_pull = False
        if not self.batched_pull:
            pulled = self.pull(batch, 0, rows, cotangents)
        vectors = {
            name: torch.randn(value.shape, generator=generator, dtype=value.dtype, device=value.device)
            for name, value in pulled.items()
        }
        expected = torch.stack(
            [
                sum(
                    (torch.real(pulled[name][i].conj() * vectors[name][i]).sum() for name in pulled),
                    start=torch.zeros((), dtype=self.target.dtype, device=self.target.device),
                )
                if any(value.is_complex() for value in pulled.values())
                else torch.stack([(pulled[name][i] * vectors[name][i]).sum() for name in pulled]).sum()
                for i in range(2)
            ]
        )
        tolerance = 1e-3 if self.target.dtype == torch.float32 else 1e-8
        for route in self._pushes:
            self.push_route = route
            if route == "rows":
                warnings.warn(
                    "model has neither forward-mode nor second derivatives, so that every product with its kernel "
                    "takes one backward for each row and output; where it fits in memory, empirical_ntk is quicker",
                    stacklevel=5,
                )
                return
            try:
                pushed = self.push(batch, 0, rows, vectors)
            except Exception:
                continue
            found = (pushed * cotangents).sum((1, 2))
            scale = float((pushed.norm() * cotangents.norm()).clamp(min=float(expected.norm())))
            if float((found - expected).norm()) <= tolerance * max(scale, 1e-30):
                return


def kernel(problem: Problem) -> Tensor:
    """The kernel column by column: pull one row and output of x2 back, push the result forward over all of x1."""
    plan = problem.plan(compared=False)
    products = Products(problem.target, problem.left, plan.outputs, plan.copies_inputs)
    out = problem.empty(plan.outputs)
    left, _ = problem.blocks(plan)
    unit = torch.eye(plan.outputs, dtype=out.dtype, device=out.device)[:, None, :]
    with progress_bar(problem.progress, problem.right.rows, "empirical NTK") as advance:
        for column in range(problem.right.rows):
            vectors = products.pull(problem.right, column, column + 1, unit)
            for begin, end in left:
                if problem.symmetric and begin > column:
                    continue
                # [b, n, a]
                pushed = products.push(problem.left, begin, end, vectors)
                if problem.compute == "full":
                    out[begin:end, column] = pushed.permute(1, 2, 0)
                else:
                    diagonal = pushed.diagonal(dim1=0, dim2=2)
                    out[begin:end, column] = diagonal if problem.compute == "diagonal" else diagonal.sum(1)
            advance(1)
    if problem.symmetric:
        mirror(out, [(0, problem.left.rows)], problem.compute)
    return out
