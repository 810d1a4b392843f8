"""Forwards without gradient: on copies of the rows, block by block, and the test that rows do not mix."""

from __future__ import annotations

import torch
from torch import Tensor

from .._interrupts import ends_its_contexts
from .agreement import refuse_other_bits, refusing_random_numbers
from .contract import Batch, Target, flatten, preserved
from .inputs import row_cuts
from .probing import PROBE_ROWS, Seen, refuse_mixed_rows, refuse_other_outputs_of_fewer

# Rows of one forward pass: bounds the activations, whatever the number of inputs.
_ROWS = 1024


@ends_its_contexts
def outputs(target: Target, batch: Batch, *, rows: int | None = None, check: bool = False) -> Tensor:
    """The target's outputs [N, O] without gradient; the model and the batch stay as they are.

    Args:
        rows: only the first so many rows.
        check: test on a few rows that rows do not mix and that nothing is random.

    Raises:
        ValueError: the model cannot take the batch; with `check`, it mixes rows or draws random numbers.
        TypeError: the batch has another dtype than the model's parameters.
    """
    with preserved(target.model), torch.no_grad():
        if check:
            _check_rows(target, batch)
        cuts = row_cuts(batch.rows if rows is None else min(rows, batch.rows), _ROWS)
        return torch.cat([_run(target, batch, begin, end) for begin, end in cuts])


def _run(target: Target, batch: Batch, begin: int, end: int) -> Tensor:
    try:
        return flatten(target.run(batch, batch.take(begin, end, copy=True)))
    except RuntimeError as error:  # torch's own complaint, such as two shapes that do not fit
        target.check_batch(batch)  # says it better where dtype or device is the reason
        hint = ""
        if not any(value.is_floating_point() for value in batch.tensors.values()):
            hint = " (integers stay integers, for tokens and categories; convert what is neither to floating point)"
        raise ValueError(f"model cannot take {batch.name} with shape {batch.describe()}: {error}{hint}") from error


def _check_rows(target: Target, batch: Batch) -> None:
    rows = min(batch.rows, PROBE_ROWS)
    with refusing_random_numbers(target.device):
        expected = _run(target, batch, 0, rows)
    refuse_other_bits(target, batch, expected)
    tensors = batch.take(0, rows, copy=True)
    refuse_mixed_rows(target, batch, tensors, Seen(expected, []))
    refuse_other_outputs_of_fewer(target, batch, tensors, Seen(expected, []))
