"""The probe: a few rows show how the model uses its parameters, and that rows do not mix and nothing is random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import generic
from .capture import Capture, Use
from .contract import Batch, Target, flatten
from .layout import Layout, candidates, confined
from .plan import Entry, Plan, Planner, Sizes, block_rows, roles_of, row_axes, sweep_bytes
from .sweep import compare, cotangents, last_use, refuse_other_bits

PROBE_ROWS = 4


def _run(target: Target, batch: Batch, tensors: Sequence[Tensor]) -> tuple[Capture, Tensor]:
    capture = Capture(target.parameters)
    shapes = batch.describe()
    try:
        with capture:
            raw = target.run(batch, tensors)
    except RuntimeError as error:  # torch's own complaint, such as two shapes that do not fit
        raise ValueError(f"model cannot take {batch.name} with shape {shapes}: {error}") from error
    return capture, raw


def _random_state(device: torch.device) -> list[Tensor]:
    """Of torch's generators that a model on the device draws from, the CPU's first."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [value.clone().requires_grad_(value.is_floating_point()) for value in tensors]


def _mixes(batch: Batch) -> ValueError:
    return ValueError(
        f"model: the output of one row of {batch.name} depends on other rows (batch statistics, attention or a "
        "reduction over the batch axis), so its kernel is not defined row by row"
    )


def _unstructured(names: list[str], loop: bool) -> ValueError:
    which = f"parameter {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    why = "differently from row to row" if loop else "in a way that is not recognised"
    return ValueError(
        f"method must be 'auto' (or 'jacobian') here, got 'structured': the model uses {which} {why}, so that their "
        "Jacobians need autograd"
    )


def _layout(use: Use, delta: Tensor | None, rows: int, chosen: int) -> Layout | None:
    """The layout in which the cotangent of the chosen rows stays within these rows; None where none fits."""
    found = candidates(use.shape, rows, row_axes(use))
    if delta is None:
        return found[0] if found else None
    delta = delta.reshape(use.shape)
    if rows == 1 and found:
        return found[0]
    ambiguous = len(found) > 1
    for layout in found:
        if confined(delta, layout, rows, chosen, ambiguous):
            return layout
    return None


def _vmaps(target: Target, batch: Batch, tensors: Sequence[Tensor], names: Sequence[str], outputs: int) -> bool:
    """Whether torch.func.vmap takes this model, tried on one row."""
    try:
        generic.vmapped(target, batch, [value[:1].clone() for value in tensors], names, outputs)
    except Exception:
        return False
    return True


def make_plan(
    target: Target,
    batch: Batch,
    sizes: Sizes,
    *,
    method: str,
    check: bool,
    separate: bool,
    loop: bool = False,
    compared: bool = True,
) -> Plan:
    """Run a few rows and choose how each parameter's part of the kernel is computed.

    Args:
        sizes: the numbers of rows and what is computed; its `outputs` is filled in here.
        separate: one entry per parameter, nothing fused.
        loop: no structure: every Jacobian by a loop of torch.autograd.grad, for models whose graph changes with the
            rows.
        compared: the first block's outputs will be compared with those of the probe (sweep.py), so that no further
            forward is needed here to see whether anything is random or depends on the other rows.

    Raises:
        ValueError: the model draws random numbers or mixes rows (with check=True), or cannot take the input; with
            method "structured", a parameter that has no structure.
    """
    rows = min(batch.rows, PROBE_ROWS)
    chosen = max(1, rows // 2)
    tensors = batch.take(0, rows)
    leaves = _leaves(tensors)
    state = _random_state(target.device) if check else None
    copies = [leaf.clone() for leaf in leaves]
    try:
        capture, raw = _run(target, batch, copies)
    except ValueError as error:
        if "out=" not in str(error):
            raise
        # A model that writes into a given tensor cannot have an input that requires a gradient.
        leaves = [value.clone() for value in tensors]
        copies = [leaf.clone() for leaf in leaves]
        capture, raw = _run(target, batch, copies)
    if state is not None and not all(map(torch.equal, state, _random_state(target.device))):
        torch.set_rng_state(state[0])
        if state[1:]:
            torch.cuda.set_rng_state(state[1], target.device)
        raise ValueError(
            "model draws random numbers in its forward (dropout, noise, sampling), so its kernel is not defined; "
            "call model.eval() or remove them (check=False skips this test)"
        )
    flat = flatten(raw)
    if flat.shape[1] == 0:
        raise ValueError(f"the model's output must have at least one value per row, got {list(raw.shape)}")
    sizes = replace(sizes, outputs=flat.shape[1])
    uses = capture.uses
    unrecognised = capture.unrecognised(raw)
    layouts = _probe_rows(batch, uses, leaves, flat, rows, chosen, check)
    names = list(target.parameters)
    roles = roles_of(uses, names)
    generic_names = [
        name
        for name in names
        if name in unrecognised
        or loop
        or method == "jacobian"
        or any(layouts[index] is None or uses[index].input._version != uses[index].version for index, _ in roles[name])
    ]
    if method == "structured" and generic_names:
        raise _unstructured(generic_names, loop)
    last = last_use(uses, raw, rows)
    if last is not None and layouts[last] != ("axis", 0):
        last = None
    roles = {name: own for name, own in roles.items() if name not in generic_names}
    entries = Planner(target, uses, layouts, rows, sizes, not separate).entries(roles, last)
    entries += _generic_entries(target, batch, tensors, generic_names, sizes, separate, loop)
    structured = any(entry.roles for entry in entries)
    if check and not (compared and structured and batch.rows > rows):
        _check_repeats(target, batch, tensors, flat.detach(), chosen)
    touched = sweep_bytes(uses, sizes.outputs, rows, sizes.itemsize) if structured else 0
    kept = sum(entry.row_bytes for entry in entries if not entry.roles)
    return Plan(
        outputs=sizes.outputs,
        entries=entries,
        signatures=[use.signature() for use in uses],
        layouts=layouts,
        unrecognised=unrecognised,
        block=block_rows(touched + 2 * kept, target.device),
        batched_backward=not structured or _batches(uses, flat),
        last=last,
        sweep_bytes=touched + kept,
        copies_inputs=any(copy._version for copy in copies),
        probe=flat.detach() if check else None,
    )


def _probe_rows(
    batch: Batch, uses: list[Use], leaves: list[Tensor], flat: Tensor, rows: int, chosen: int, check: bool
) -> list[Layout | None]:
    """Where the rows lie in every use, by one backward of a cotangent on the first rows alone."""
    floats = [leaf for leaf in leaves if leaf.requires_grad]
    edges: list[Any] = [*(use.edge for use in uses), *floats]
    if not flat.requires_grad or not edges:
        return [None] * len(uses)
    # Values without a simple relation to each other, so that no sum of them cancels.
    cotangent = torch.zeros_like(flat)
    spread = torch.arange(1, chosen * flat.shape[1] + 1, dtype=flat.dtype, device=flat.device)
    cotangent[:chosen] = 1 + spread.sin().reshape(chosen, -1) / 2
    found = torch.autograd.grad(flat, edges, cotangent, retain_graph=True, allow_unused=True)
    deltas, gradients = found[: len(uses)], found[len(uses) :]
    if check and any(value is not None and value[chosen:].any() for value in gradients):
        raise _mixes(batch)
    layouts = [_layout(use, delta, rows, chosen) for use, delta in zip(uses, deltas, strict=True)]
    for use, layout in zip(uses, layouts, strict=True):
        if check and layout is None and use.kind == "embedding" and not floats:
            raise _mixes(batch)
    return layouts


def _check_repeats(target: Target, batch: Batch, tensors: Sequence[Tensor], expected: Tensor, chosen: int) -> None:
    """Raise unless a second forward gives the same bits, and fewer rows nearly the same outputs."""
    refuse_other_bits(target, batch, expected)
    with torch.no_grad():
        try:
            fewer = flatten(target.run(batch, [value[:chosen].clone() for value in tensors]))
        except Exception:
            if chosen == 1:
                return  # a model that squeezes its batch axis away; two rows or more are fine
            raise
    compare(fewer, expected)


def _batches(uses: list[Use], flat: Tensor) -> bool:
    """Whether the backward of all outputs runs as one batched sweep, tried on two of them."""
    if flat.shape[1] == 1 or not uses:
        return True
    try:
        cotangents(uses, flat[:, :2], True)
    except Exception:
        return False
    return True


def _generic_entries(
    target: Target,
    batch: Batch,
    tensors: Sequence[Tensor],
    names: list[str],
    sizes: Sizes,
    separate: bool,
    loop: bool,
) -> list[Entry]:
    if not names:
        return []
    method = "vmap" if not loop and _vmaps(target, batch, tensors, names, sizes.outputs) else "loop"
    groups = [(name,) for name in names] if separate else [tuple(names)]
    entries = []
    for group in groups:
        size = sum(target.width(name) for name in group)
        flops = 2 * sizes.pairs * sizes.products * size
        entries.append(Entry(method, group, [], 0.0, flops, sizes.outputs * size * sizes.itemsize))
    return entries
