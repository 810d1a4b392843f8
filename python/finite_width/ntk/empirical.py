"""The exact empirical NTK of a module: the public functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .._interrupts import ends_its_contexts
from . import products
from .contract import Inputs, preserved
from .explanation import Explanation
from .plan import Plan
from .problem import Problem
from .walk import Walk


@ends_its_contexts
def run(problem: Problem) -> dict[str, Tensor] | Tensor:
    """The kernel, or one kernel per parameter."""
    with preserved(problem.target.model):
        if problem.method == "products" and not problem.separate:
            return products.kernel(problem)
        return problem.with_plan(lambda plan: _by_tiles(problem, plan))


def _by_tiles(problem: Problem, plan: Plan) -> dict[str, Tensor] | Tensor:
    held = problem.held_blocks(plan)
    if problem.separate:
        # In the model's order, whatever that of `params` is.
        names = [name for name, _ in problem.target.model.named_parameters(remove_duplicate=False)]
        by_name = {name: problem.empty(plan.outputs) for name in names if name in problem.target.parameters}
        Walk(problem, plan, [by_name[entry.names[0]] for entry in plan.entries]).run(held)
        return by_name
    total = problem.empty(plan.outputs)
    Walk(problem, plan, [total] * len(plan.entries)).run(held)
    return total


def empirical_ntk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    compute: str = "full",
    method: str = "auto",
    params: Mapping[str, Tensor] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    out: Any = None,
    memory_budget: int | None = None,
    progress: bool = False,
    check: bool = True,
) -> Any:
    r"""The exact empirical neural tangent kernel of a module, Θ[n, m, a, b] = Σ_p ∂f_a(x1_n)/∂θ_p ∂f_b(x2_m)/∂θ_p.

    Dense layers, convolutions, norms and embeddings are computed from their inputs and output cotangents, without
    forming Jacobians where that is cheaper; every other use of a parameter is found and computed by autograd.

    Args:
        model: any module whose outputs for one row do not depend on other rows, in eval mode.
        x1: [N, ...], or a tuple (passed as arguments) or dict (as keywords) of tensors that share their first axis.
        x2: [M, ...] likewise; None stands for x1, and computes half of the (exactly symmetric) kernel.
        compute: "full" [N, M, O, O]; "diagonal" [N, M, O], the entries a = b; "trace" [N, M], their sum.
        method: "auto" chooses per parameter from shapes, and autograd where no structure is recognised; "structured"
            is the same kernel, bit for bit, but an error names a parameter that would need autograd's Jacobian;
            "jacobian" contracts Jacobians from autograd; "products" multiplies the kernel's columns by
            vector-Jacobian and Jacobian-vector products.
        params: parameter names to tensors that replace the model's own; only those with requires_grad count.
        output: picks a tensor [N, ...] from the model's result; it is flattened to O values per row.
        out: where the kernel is written instead of memory, tile by tile. A path (or Zarr store) makes a Zarr array
            (`pip install finite-width[scale]`): a run that was stopped goes on with the missing tiles, where model,
            data and arguments are the same. Any array of the right shape and dtype that can be written (numpy, a
            memory map, h5py) also works, without a memory of what is finished. Under `torchrun` all ranks make the
            same call and share the tiles of a path or memory map.
        memory_budget: bytes of working memory beyond inputs and result; default: a quarter of what is free. The
            result has the same bits for any budget.
        progress: show a progress bar.
        check: test on a few rows that rows do not mix and that nothing is random.

    Returns:
        The kernel, in the parameters' dtype (float32 or float64). Complex parameters count real and imaginary parts.
        With `out`: the Zarr array, opened for reading, or `out` itself.

    Raises:
        ValueError: empty or mismatched batches, train mode with batch norm or dropout, random or row-mixing models,
            no trainable parameter, an output without a batch axis, mixed devices, too small a budget; method
            "structured" where a parameter's use is not recognised; an `out` of
            another shape, read-only, or with the kernel of another model, data or `compute`, which stays as it was.
        TypeError: no module, no tensors, integer parameters, mixed or low-precision dtypes; an `out` of another dtype.
        OSError: `out` cannot be written (any more); finished tiles are kept.

    Source: Jacot, Gabriel and Hongler, "Neural Tangent Kernel" (2018); structured derivatives: Novak, Sohl-Dickstein
    and Schoenholz, "Fast Finite Width Neural Tangent Kernel" (2022).

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> fw.ntk.empirical_ntk(model, torch.randn(5, 3), torch.randn(4, 3)).shape
        torch.Size([5, 4, 2, 2])
    """
    problem = Problem(
        model,
        x1,
        x2,
        compute=compute,
        method=method,
        params=params,
        output=output,
        memory_budget=memory_budget,
        progress=progress,
        check=check,
    )
    if out is not None:
        from . import stream

        return stream.run(problem, out)
    result = run(problem)
    assert isinstance(result, Tensor)
    return result


def per_parameter_ntk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    compute: str = "full",
    method: str = "auto",
    params: Mapping[str, Tensor] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    memory_budget: int | None = None,
    progress: bool = False,
    check: bool = True,
) -> dict[str, Tensor]:
    """The empirical NTK's part of each parameter; their sum is `empirical_ntk`.

    Args:
        model: see `empirical_ntk`, as for all other arguments; method "products" is "jacobian" here.

    Returns:
        {parameter name: its kernel}, in the order of `model.named_parameters()`.

    Raises:
        ValueError: see `empirical_ntk`.
        TypeError: see `empirical_ntk`.

    Source: see `empirical_ntk`.

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Linear(3, 2)
        >>> kernels = fw.ntk.per_parameter_ntk(model, torch.randn(5, 3), compute="trace")
        >>> list(kernels)
        ['weight', 'bias']
    """
    problem = Problem(
        model,
        x1,
        x2,
        compute=compute,
        method="jacobian" if method == "products" else method,
        params=params,
        output=output,
        memory_budget=memory_budget,
        progress=progress,
        check=check,
        separate=True,
    )
    result = run(problem)
    assert isinstance(result, dict)
    return result


@ends_its_contexts
def explain(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    compute: str = "full",
    method: str = "auto",
    params: Mapping[str, Tensor] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    memory_budget: int | None = None,
    progress: bool = False,
    check: bool = True,
) -> Explanation:
    """How `empirical_ntk` would compute the kernel: per parameter the method, operations and bytes; prints as a table.

    Args:
        model: see `empirical_ntk`, as for all other arguments.

    Returns:
        An `Explanation`; only a few rows are run.

    Raises:
        ValueError: see `empirical_ntk`.
        TypeError: see `empirical_ntk`.

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> [row.method for row in fw.ntk.explain(model, torch.randn(5, 3)).rows]
        ['gram', 'last']
    """
    problem = Problem(
        model,
        x1,
        x2,
        compute=compute,
        method=method,
        params=params,
        output=output,
        memory_budget=memory_budget,
        progress=progress,
        check=check,
    )
    with preserved(model):
        plan = problem.plan(compared=False)
        held = problem.held_blocks(plan)
        walk = Walk(problem, plan, [])
        blocks = (1, 0) if problem.in_one_sweep(plan) else (len(walk.left), len(walk.right))
        return Explanation.make(plan, problem.sizes, problem.method, walk.sweeps(held), *blocks)
