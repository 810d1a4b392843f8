"""The probe: a few rows show how the model uses its parameters, and that rows do not mix and nothing is random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import generic
from .capture import Capture, Use
from .contract import Batch, Target, flatten
from .layout import Layout, candidates, confined, multiplied_by_rows, rows_reached
from .plan import Entry, Plan, Planner, Sizes, block_rows, roles_of, row_axes, sweep_bytes
from .sweep import agrees, compare, last_use, pull, refuse_other_bits, row_shapes

PROBE_ROWS = 4


def _run(target: Target, batch: Batch, tensors: Sequence[Tensor]) -> tuple[Capture, Tensor]:
    capture = Capture(target.parameters)
    shapes = batch.describe()
    try:
        with capture:
            raw = target.run(batch, tensors)
    except (IndexError, RuntimeError) as error:  # torch's own complaint, such as two shapes that do not fit
        raise ValueError(f"model cannot take {batch.name} with shape {shapes}: {error}") from error
    return capture, raw


def _random_state(device: torch.device) -> list[Tensor]:
    """Of torch's generators that a model on the device draws from, the CPU's first."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def refusing_random_numbers(device: torch.device) -> Iterator[None]:
    """Raise if what runs inside draws random numbers; torch's generators are as before then."""
    state = _random_state(device)
    yield
    if not all(map(torch.equal, state, _random_state(device))):
        torch.set_rng_state(state[0])
        if state[1:]:
            torch.cuda.set_rng_state(state[1], device)
        raise ValueError(
            "model draws random numbers in its forward (dropout, noise, sampling), so its kernel is not defined; "
            "call model.eval() or remove them (check=False skips this test)"
        )


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


def _vmaps(target: Target, batch: Batch, tensors: Sequence[Tensor], names: Sequence[str], outputs: int) -> bool:
    """Whether torch.func.vmap takes this model, and gives its gradients, tried on two rows."""
    rows = [value[:2].clone() for value in tensors]
    try:
        jacobian = generic.vmapped(target, batch, rows, names, outputs, chunk=2)
    except Exception:
        return False
    weights = 1 + torch.arange(1, outputs + 1, dtype=target.dtype, device=target.device).sin() / 2
    results = [flatten(target.run(batch, [value[row : row + 1] for value in rows])) for row in range(len(jacobian))]
    expected = torch.empty(jacobian.shape[2], dtype=target.dtype, device=target.device)
    generic.gradient(target, torch.cat(results).sum(0) @ weights, names, expected)
    return agrees(weights @ jacobian.sum(0), expected)


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
    tensors = batch.take(0, rows)
    leaves = _leaves(tensors)
    with refusing_random_numbers(target.device) if check else nullcontext():
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
    if rows > 1:
        target.row_shape = raw.shape[1:]
    flat = flatten(raw)
    if flat.shape[1] == 0:
        raise ValueError(f"the model's output must have at least one value per row, got {list(raw.shape)}")
    sizes = replace(sizes, outputs=flat.shape[1])
    uses = capture.uses
    unrecognised = capture.unrecognised(raw)
    layouts, batches = _probe_rows(batch, uses, leaves, flat, check)
    names = list(target.parameters)
    roles = roles_of(uses, names)
    generic_names = [
        name
        for name in names
        if name in unrecognised
        or loop
        or method == "jacobian"
        or capture.differentiated
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
    if check:
        refuse_mixed_rows(target, batch, tensors, flat.detach())
        if not (compared and structured and batch.rows > rows):
            refuse_other_bits(target, batch, flat.detach())
    touched = sweep_bytes(uses, sizes.outputs, rows, sizes.itemsize) if structured else 0
    kept = sum(entry.row_bytes for entry in entries if not entry.roles)
    return Plan(
        outputs=sizes.outputs,
        entries=entries,
        signatures=[use.signature() for use in uses],
        layouts=layouts,
        row_shapes=row_shapes(uses, layouts, rows),
        unrecognised=unrecognised,
        block=block_rows(touched + 2 * kept, target.device),
        batched_backward=batches,
        last=last,
        sweep_bytes=touched + kept,
        copies_inputs=any(copy._version for copy in copies),
        probe=flat.detach() if check else None,
    )


class _RowTest:
    """What backward sweeps from a few rows tell of where each row lies in every tensor of a model.

    Two sweeps, the second with each row's cotangent times a power of two of its own: what depends on one row alone is
    multiplied by exactly its power. Where that fails, rows mix, or the backward does not repeat its bits (sums by
    atomic additions on a GPU): then a sweep for each row, which may reach that row's part and nothing else, decides.
    """

    def __init__(self, flat: Tensor, uses: Sequence[Use], leaves: Sequence[Tensor]) -> None:
        self.flat, self.rows = flat, len(flat)
        self.edges: list[Any] = [*(use.edge for use in uses), *leaves]
        self.shapes = [*(use.shape for use in uses), *(leaf.shape for leaf in leaves)]
        self.factors = 2.0 ** torch.arange(self.rows, dtype=flat.dtype, device=flat.device)
        # Values without a simple relation to each other, so that no sum of them cancels.
        spread = torch.arange(1, flat.numel() + 1, dtype=flat.dtype, device=flat.device)
        self.cotangent = 1 + spread.sin().reshape(flat.shape) / 2
        self.batched = True
        self.found = self._two_sweeps()
        self._by_row: list[list[Tensor | None]] | None = None

    def _two_sweeps(self) -> list[Tensor | None]:
        """[2, *shape] at each edge; sets whether several cotangents can be pulled back in one sweep."""
        both = torch.stack([self.cotangent, self.cotangent * self.factors[:, None]])
        if self.flat.shape[1] > 1:
            try:
                stacked = pull(self.flat, self.edges, both, batched=True)
            except Exception:
                self.batched = False
            else:
                # The gradient of the sum: torch has batching rules that give it for the first cotangent alone.
                single = pull(self.flat, self.edges, both.sum(0, keepdim=True), batched=False)
                self.batched = all(
                    one is two if one is None or two is None else agrees(two.sum(0), one[0])
                    for one, two in zip(single, stacked, strict=True)
                )
                if self.batched:
                    return stacked
        return pull(self.flat, self.edges, both, batched=False)

    def reached(self, place: int) -> bool:
        return self.found[place] is not None

    def fits(self, place: int, layout: Layout) -> bool:
        """Whether each row's part of the tensor, by this layout, depends on that row alone."""
        value = self.found[place]
        if value is None:
            return True
        one, two = value.reshape(2, *self.shapes[place])
        if multiplied_by_rows(one, two, layout, self.factors):
            return True
        if self._by_row is None:
            unit = torch.eye(self.rows, dtype=self.flat.dtype, device=self.flat.device)
            each = [pull(self.flat, self.edges, (self.cotangent * row[:, None])[None], batched=False) for row in unit]
            self._by_row = each
        return all(
            value is None or confined(value.reshape(self.shapes[place]), layout, self.rows, row)
            for row, value in enumerate(deltas[place] for deltas in self._by_row)
        )

    def layout(self, place: int, axes: Sequence[int]) -> Layout | None:
        """The layout in which the rows lie in the tensor, of those with the rows on one of the axes; None: in none."""
        shape = self.shapes[place]
        found = candidates(shape, self.rows, axes)
        if not found or self.rows == 1 or not self.reached(place):
            return found[0] if found else None
        value = self.found[place]
        assert value is not None
        for layout in found:
            # Where several would do, zeros could hide that one does not.
            clear = len(found) == 1 or rows_reached(value[0].reshape(shape), layout, self.rows) > 1
            if clear and self.fits(place, layout):
                return layout
        return None


def _probe_rows(
    batch: Batch, uses: list[Use], leaves: list[Tensor], flat: Tensor, check: bool
) -> tuple[list[Layout | None], bool]:
    """Where the rows lie in every use, and whether several cotangents can be pulled back in one sweep."""
    floats = [leaf for leaf in leaves if leaf.requires_grad]
    if not flat.requires_grad or not (uses or floats):
        return [None] * len(uses), True
    test = _RowTest(flat, uses, floats)
    if check and not all(test.fits(place, ("axis", 0)) for place in range(len(uses), len(test.edges))):
        raise _mixes(batch)
    layouts = [test.layout(place, row_axes(use)) for place, use in enumerate(uses)]
    for use, layout in zip(uses, layouts, strict=True):
        if check and layout is None and use.kind == "embedding" and not floats:
            raise _mixes(batch)
    return layouts, test.batched


def refuse_mixed_rows(target: Target, batch: Batch, tensors: Sequence[Tensor], expected: Tensor) -> None:
    """Raise unless fewer rows, in another order, give nearly the outputs that they gave together.

    That finds what a gradient does not show, such as a scale by the largest of all values, detached.
    """
    rows = len(expected)
    order = torch.arange(rows, device=target.device)
    chosen = max(1, rows // 2)
    # The last ones in reverse: what depends on the rows before, or on the largest of all, changes with one of them.
    for some in (order[:chosen], order[chosen:].flip(0)):
        if not len(some):
            continue
        try:
            found = flatten(target.run(batch, [value[some] for value in tensors]))
        except Exception:
            if len(some) == 1:
                continue  # a model for two rows or more
            raise
        try:
            compare(found, expected[some])
        except ValueError:
            refuse_other_bits(target, batch, expected)  # random numbers or a state, rather
            raise


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
