"""The probe: a few rows show how the model uses its parameters, and that rows do not mix and nothing is random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import generic
from .agreement import agrees, refuse_other_bits, refusing_random_numbers, row_mixing_error
from .backward import output_weights, through_made
from .capture import Capture, PlanMismatchError, made_name
from .contract import Batch, Target, flatten
from .layout import Layout
from .made import Choices, Made
from .plan import Entry, MadeValue, Plan, Planner, Role, Sizes, block_rows, roles_of, row_axes, sweep_bytes
from .probing import PROBE_ROWS, RowTest, Seen, refuse_mixed_rows, refuse_other_outputs_of_fewer
from .sweep import last_use, row_shapes

# Forwards of the probe, each with the uses left out that had no rows of their own in the one before.
MOST_PROBES = 4


def _run(target: Target, batch: Batch, tensors: Sequence[Tensor], followed: bool) -> tuple[Capture, Tensor]:
    capture = Capture(target, tensors if followed else ())
    shapes = batch.describe()
    try:
        with capture:
            raw = target.run(batch, tensors)
    except (IndexError, RuntimeError) as error:  # torch's own complaint, such as two shapes that do not fit
        raise ValueError(f"model cannot take {batch.name} with shape {shapes}: {error}") from error
    return capture, raw


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [value.clone().requires_grad_(value.is_floating_point()) for value in tensors]


def _unstructured_error(names: list[str], differs: bool) -> ValueError:
    which = f"parameter {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    why = "differently from row to row" if differs else "in a way that is not recognised"
    return ValueError(
        f"method must be 'auto' (or 'jacobian') here, got 'structured': the model uses {which} {why}, so that their "
        "Jacobians need autograd"
    )


def _vmaps(target: Target, batch: Batch, tensors: Sequence[Tensor], names: Sequence[str], outputs: int) -> bool:
    """Whether torch.func.vmap takes this model, and gives its gradients, tried on two rows."""
    rows = [value[:2].clone() for value in tensors]
    try:
        jacobian = generic.vmapped(target, batch, rows, names, outputs, chunk=2)
    except Exception:
        return False
    results = [generic.single_row(target, batch, rows, row) for row in range(len(jacobian))]
    weights = output_weights(results[0])
    expected = torch.empty(jacobian.shape[2], dtype=target.dtype, device=target.device)
    generic.gradient(target, torch.cat(results).sum(0) @ weights, names, expected)
    return agrees(weights @ jacobian.sum(0), expected)


@dataclass
class _Probe:
    """A forward of a few rows, and where they lie in each recorded use."""

    capture: Capture
    raw: Tensor
    flat: Tensor
    unrecognised: set[str]
    layouts: list[Layout | None]
    sure: list[bool]
    batched_backward: bool
    writes_inputs: bool
    apart: bool  # its calls prove that rows do not mix


def _probed(target: Target, batch: Batch, tensors: Sequence[Tensor], check: bool, followed: bool) -> _Probe:
    """The probe, by which `target.choices` are made.

    A use without rows of its own, such as an embedding of positions, is left to autograd in another forward: then it
    may be a part of what made a value that all rows share. Where the model sets hooks or differentiates, ReLUs keep
    a backward of their own.
    """
    target.choices = Choices()
    for _ in range(MOST_PROBES):
        try:
            probe = _probe(target, batch, tensors, check, followed)
        except PlanMismatchError:
            target.choices = Choices(gates=False)
            probe = _probe(target, batch, tensors, check, followed)
        uses = probe.capture.uses
        rowless = {use.number for use, layout in zip(uses, probe.layouts, strict=True) if layout is None}
        if not rowless:
            break
        target.choices = replace(target.choices, attached=target.choices.attached | rowless)
    target.choices = replace(target.choices, shared=frozenset(probe.capture.shared))
    return probe


def _probe(target: Target, batch: Batch, tensors: Sequence[Tensor], check: bool, followed: bool) -> _Probe:
    """One forward of these rows, and where they lie: by its calls, or by a test; an error where they mix."""
    leaves = _leaves(tensors)
    with refusing_random_numbers(target.device) if check else nullcontext():
        copies = [leaf.clone() for leaf in leaves]
        try:
            capture, raw = _run(target, batch, copies, followed)
        except ValueError as error:
            if "out=" not in str(error):
                raise
            # A model that writes into a given tensor cannot have an input that requires a gradient.
            leaves = [value.clone() for value in tensors]
            copies = [leaf.clone() for leaf in leaves]
            capture, raw = _run(target, batch, copies, followed)
    if len(tensors[0]) > 1:
        target.row_shape = raw.shape[1:]
    flat, unrecognised = flatten(raw), capture.unrecognised(raw)
    if flat.shape[1] == 0:
        raise ValueError(f"the model's output must have at least one value per row, got {list(raw.shape)}")
    uses, floats = capture.uses, [leaf for leaf in leaves if leaf.requires_grad]
    found: list[tuple[Layout | None, bool]] = [(None, True)] * len(uses)
    batched, apart = True, capture.keeps_rows_apart(raw)
    if apart:
        found = [(use.layout, True) for use in uses]
    elif flat.requires_grad and (uses or floats):
        test = RowTest(flat, uses, floats)
        if check and not all(test.fitting(place, [Layout(0)]) for place in range(len(uses), len(test.edges))):
            raise row_mixing_error()
        found = [test.layout(place, row_axes(use)) for place, use in enumerate(uses)]
        batched = test.batched
    layouts, sure = [layout for layout, _ in found], [certain for _, certain in found]
    writes_inputs = any(copy._version for copy in copies)
    return _Probe(capture, raw, flat, unrecognised, layouts, sure, batched, writes_inputs, apart)


def make_plan(
    target: Target,
    batch: Batch,
    sizes: Sizes,
    *,
    method: str,
    check: bool,
    separate: bool,
    structured: bool = True,
    compared: bool = True,
) -> Plan:
    """Run a few rows and choose how each parameter's part of the kernel is computed.

    Args:
        sizes: the numbers of rows and what is computed; its `outputs` is filled in here.
        separate: one entry per parameter, nothing fused.
        structured: False where a block did not follow such a plan: then every Jacobian is autograd's.
        compared: the first block's outputs will be compared with those of the probe (sweep.py), so that no further
            forward is needed here to see whether anything is random or depends on the other rows.

    Raises:
        ValueError: the model draws random numbers or mixes rows (with check=True), or cannot take the input; with
            method "structured", a parameter that has no structure.
    """
    tensors = batch.take(0, min(batch.rows, PROBE_ROWS))
    # A single row lies in every layout.
    probe = _probed(target, batch, tensors, check, followed=structured and len(tensors[0]) > 1)
    capture, flat, uses, layouts = probe.capture, probe.flat, probe.capture.uses, probe.layouts
    rows = len(flat)
    sizes = replace(sizes, outputs=flat.shape[1])
    certain = [layout if sure else None for layout, sure in zip(layouts, probe.sure, strict=True)]
    seen = Seen.of(flat, capture, layouts)
    compared = compared and batch.rows > rows
    if check:
        expected = Seen.of(flat, capture, certain)
        if not probe.apart:
            refuse_mixed_rows(target, batch, tensors, expected, certain)
        if not compared:
            refuse_other_outputs_of_fewer(target, batch, tensors, expected, certain)
    names = list(target.parameters)
    made = [MadeValue(value.names, value.value.numel(), True) for value in capture.made]
    roles = _roles(names, capture)
    generic_names = [
        name
        for name in names
        if name in probe.unrecognised
        or not structured
        or method == "jacobian"
        or capture.differentiated
        or any(layouts[index] is None or uses[index].input._version != uses[index].version for index, _ in roles[name])
        or any(value.changed for value in capture.made if name in value.names)
    ]
    if method == "structured" and generic_names:
        raise _unstructured_error(generic_names, not structured)
    last = last_use(uses, probe.raw)
    if last is not None and layouts[last] != Layout(0):
        last = None
    behind_made = {name for value in made for name in value.names} - set(generic_names)
    for place, value in enumerate(capture.made):
        if behind_made.intersection(value.names):
            made[place].batched = _batches(value, target.parameters)
    planner = Planner(target, uses, rows, sizes, not separate)
    own = {name: own for name, own in roles.items() if name not in generic_names and name not in behind_made}
    entries = planner.entries(own, last)
    entries += planner.made_entries({name: roles[name] for name in names if name in behind_made}, made)
    entries += _generic_entries(target, batch, tensors, generic_names, sizes, separate)
    by_uses = any(entry.roles for entry in entries)
    if check and not (compared and by_uses):
        refuse_other_bits(target, batch, seen.outputs)
    touched = sweep_bytes(uses, sizes.outputs, rows, sizes.itemsize) if by_uses else 0
    touched += sizes.outputs * sizes.itemsize * sum(value.size for value in made)
    kept = sum(entry.row_bytes for entry in entries if entry.method in ("made", "vmap", "loop"))
    return Plan(
        outputs=sizes.outputs,
        entries=entries,
        signatures=[use.signature() for use in uses],
        layouts=layouts,
        row_shapes=row_shapes(uses, layouts, rows),
        made=made,
        unrecognised=probe.unrecognised,
        block=block_rows(touched + 2 * kept, uses, target.device, sizes.sides),
        batched_backward=probe.batched_backward,
        last=last,
        sweep_bytes=touched + kept,
        copies_inputs=probe.writes_inputs,
        sure=probe.sure,
        apart=probe.apart,
        probe=seen if check else None,
    )


def _roles(names: Sequence[str], capture: Capture) -> dict[str, list[Role]]:
    """The uses of each parameter, and those of the values that are made from it."""
    aliases = [made_name(index) for index in range(len(capture.made))]
    roles = roles_of(capture.uses, [*names, *aliases])
    for alias, value in zip(aliases, capture.made, strict=True):
        for name in value.names:
            roles[name] = roles[name] + roles[alias]
    return {name: roles[name] for name in names}


def _batches(made: Made, parameters: Mapping[str, Tensor]) -> bool:
    """Whether several cotangents can be pulled back in one sweep: torch has rules that give it for the first alone."""
    pair = torch.arange(2 * made.value.numel(), dtype=made.value.dtype, device=made.value.device).sin()
    pair = pair.reshape(1, 2, -1)
    for name in made.names:
        single = through_made(made, pair.sum(1, keepdim=True), parameters[name], False)
        try:
            both = through_made(made, pair, parameters[name], True)
        except Exception:
            return False
        if not agrees(both.sum(1, keepdim=True), single):
            return False
    return True


def _generic_entries(
    target: Target,
    batch: Batch,
    tensors: Sequence[Tensor],
    names: list[str],
    sizes: Sizes,
    separate: bool,
) -> list[Entry]:
    if not names:
        return []
    method = "vmap" if _vmaps(target, batch, tensors, names, sizes.outputs) else "loop"
    groups = [(name,) for name in names] if separate else [tuple(names)]
    entries = []
    for group in groups:
        size = sum(target.width(name) for name in group)
        flops = 2 * sizes.pairs * sizes.products * size
        entries.append(Entry(method, group, [], 0.0, flops, sizes.outputs * size * sizes.itemsize))
    return entries
