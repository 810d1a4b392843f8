"""What a few rows tell: where each row lies in every tensor of a model, and that rows do not mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .agreement import agrees, refuse_other_bits, row_mixing_error, same
from .backward import output_weights, pull
from .capture import Capture, Use
from .contract import Batch, Target, flatten
from .layout import Layout, by_rows, candidates, confined, multiplied_by_rows, rows_reached

PROBE_ROWS = 4


class RowTest:
    """What backward sweeps from a few rows tell of where each row lies in every tensor of a model.

    Two sweeps, the second with each row's cotangent times a power of two of its own: what depends on one row alone is
    multiplied by exactly its power. Where that fails, rows mix, or the backward does not repeat its bits (sums by
    atomic additions on a GPU): then a sweep for each row, which may reach that row's part and nothing else, decides.
    """

    def __init__(self, flat: Tensor, uses: Sequence[Use], leaves: Sequence[Tensor]) -> None:
        self.flat, self.rows = flat, len(flat)
        self.edges: list[Any] = [*(use.edge for use in uses), *leaves]
        self.shapes = [*(use.shape for use in uses), *(leaf.shape for leaf in leaves)]
        self.factors = flat.new_tensor([2.0**row for row in range(self.rows)])
        self.cotangent = output_weights(flat).expand_as(flat)
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

    def fitting(self, place: int, layouts: Sequence[Layout]) -> list[Layout]:
        """Those of the layouts by which each row's part of the tensor depends on that row alone."""
        value = self.found[place]
        if value is None:
            return list(layouts)
        one, two = value.reshape(2, *self.shapes[place])
        # Where one layout fits exactly, the bits repeat, and the others do not fit.
        exact = [layout for layout in layouts if multiplied_by_rows(one, two, layout, self.factors)]
        return exact or [layout for layout in layouts if self._confined(place, layout)]

    def _confined(self, place: int, layout: Layout) -> bool:
        if self._by_row is None:
            unit = torch.eye(self.rows, dtype=self.flat.dtype, device=self.flat.device)
            each = [pull(self.flat, self.edges, (self.cotangent * row[:, None])[None], batched=False) for row in unit]
            self._by_row = each
        return all(
            value is None or confined(value.reshape(self.shapes[place]), layout, self.rows, row)
            for row, value in enumerate(deltas[place] for deltas in self._by_row)
        )

    def layout(self, place: int, axes: Sequence[int]) -> tuple[Layout | None, bool]:
        """The layout in which the rows lie in the tensor, on one of the axes, or None; and whether it is sure.

        Where few entries are reached, zeros may hide that it is another; where rows are merged with other axes, other
        numbers of rows may lie otherwise. Then each block must show that its own rows lie so.
        """
        shape = self.shapes[place]
        fitting = self.fitting(place, candidates(shape, self.rows, axes))
        value = self.found[place]
        for layout in fitting:
            if value is not None and rows_reached(value[0].reshape(shape), layout, self.rows) > 1:
                return layout, not layout.merged and len(fitting) == 1
        return (fitting[0], self.rows == 1) if fitting else (None, False)


@dataclass
class Seen:
    """What a forward of some rows gave: the outputs [n, O], and each use's input by rows, where its layout is known."""

    outputs: Tensor
    inputs: list[Tensor]

    @classmethod
    def of(cls, flat: Tensor, capture: Capture, layouts: Sequence[Layout | None], count: int | None = None) -> Seen:
        """Of all rows, or a copy of the first `count`."""
        # Where values decide where rows go, these lie otherwise for other rows.
        uses = [] if capture.routed else list(zip(capture.uses, layouts, strict=True))
        known = [(use.input, layout) for use, layout in uses if layout is not None]
        inputs = (by_rows(value, layout, len(flat)) for value, layout in known)
        if count is not None:
            return cls(flat[:count].detach(), [value[:count].clone() for value in inputs])
        return cls(flat.detach(), list(inputs))

    @property
    def count(self) -> int:
        return len(self.outputs)

    def rows(self, begin: int, end: int) -> Seen:
        return Seen(self.outputs[begin:end], [value[begin:end] for value in self.inputs])


def refuse_mixed_rows(
    target: Target,
    batch: Batch,
    tensors: Sequence[Tensor],
    expected: Seen,
    layouts: Sequence[Layout | None] = (),
) -> None:
    """Raise unless rows give the same bits beside other rows.

    That finds what a gradient does not show, such as a scale by the largest of all values, detached. Layers' inputs
    count as well: the outputs may be zero for all rows.

    Args:
        expected: what all of the rows gave together.
        layouts: where rows lie in each use.
    """
    rows = expected.count
    half = rows // 2
    for begin, end in ((0, half), (half, rows)) if rows > 1 else ():
        # The kept rows in their places, and again in the places of the others: the same steps, so the same bits.
        index = [begin + (row - begin) % (end - begin) for row in range(rows)]
        found = _seen_in_forward(target, batch, [value[index] for value in tensors], layouts)
        if found is not None:
            one, two = found.rows(begin, end), expected.rows(begin, end)
            pairs = zip((one.outputs, *one.inputs), (two.outputs, *two.inputs), strict=False)
            if not all(same(*pair) for pair in pairs if _comparable(*pair)):
                refuse_other_bits(target, batch, expected.outputs)  # random numbers or a state, rather
                raise row_mixing_error()


def refuse_other_outputs_of_fewer(
    target: Target,
    batch: Batch,
    tensors: Sequence[Tensor],
    expected: Seen,
    layouts: Sequence[Layout | None] = (),
) -> None:
    """Raise unless half of the rows give nearly the values that they gave among all: a model may ask how many they are.

    Args:
        expected: what all of the rows gave together.
        layouts: where rows lie in each use.
    """
    some = [value[: max(1, expected.count // 2)].clone() for value in tensors]
    found = _seen_in_forward(target, batch, some, layouts)
    if found is not None:
        compare(target, batch, expected, found)


def _comparable(found: Tensor, expected: Tensor) -> bool:
    """Whether two values can be of the same steps and have roundings: of one shape, and not tokens."""
    return found.shape == expected.shape and expected.is_floating_point()


def _seen_in_forward(
    target: Target, batch: Batch, tensors: Sequence[Tensor], layouts: Sequence[Layout | None]
) -> Seen | None:
    """What a forward gives; None where the model takes no single row."""
    capture = Capture(target)
    try:
        with capture:
            flat = flatten(target.run(batch, tensors))
    except Exception:
        if len(tensors[0]) == 1:
            return None
        raise
    try:
        return Seen.of(flat, capture, layouts)
    except (RuntimeError, ValueError):  # other uses than of the rows together, or of other shapes
        return Seen(flat.detach(), [])


def compare(target: Target, batch: Batch, expected: Seen, found: Seen) -> None:
    """Raise where the first rows gave other outputs among fewer or more rows."""
    count = min(expected.count, found.count)
    one, two = found.outputs[:count], expected.outputs[:count]
    if torch.equal(one, two):
        return
    refuse_other_bits(target, batch, expected.outputs)  # random numbers or a state, rather
    # Below this, outputs are roundings: a difference of two networks that are equal, a loss at its minimum.
    floor = 1e-3 * max(
        (float(value[:count].norm()) for value in expected.inputs if value.is_floating_point()), default=0
    )
    if not agrees(one, two, floor):
        raise row_mixing_error()
