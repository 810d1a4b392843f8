"""One forward and one batched backward over a block of rows: the factors that every entry of the plan keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import generic, ops
from .agreement import agrees
from .backward import cotangents, output_weights, pull, through_made
from .capture import Capture, PlanMismatchError, Use, made_name
from .contract import Batch, Target, flatten
from .factors import ConvInputs, DenseInputs, Factor, Ghost, Gram, Jacobian, Last, Tiled, Tokens
from .layout import Layout, by_rows, multiplied_by_rows, row_shape
from .made import Made
from .plan import Entry, Plan, Role
from .probing import Seen, compare

# Relative to a row's cotangent: far above the rounding of sums in another order, far below what another row's factor
# makes, which differs by one part in 8192 or more (blocks have 4096 rows at most).
PLACE_TOLERANCE = 5e-5


def last_use(uses: Sequence[Use], raw: Tensor) -> int | None:
    """The dense use whose output is the model's output itself, if there is one."""
    for index, use in enumerate(uses):
        if use.kind == "dense" and raw.dim() == 2 and raw.grad_fn is use.edge.node and use.shape == raw.shape:
            return index
    return None


class Rows:
    """A use's input and cotangents, arranged by rows."""

    def __init__(self, use: Use, layout: Layout, rows: int, delta: Tensor | None) -> None:
        self.use, self.rows = use, rows
        self.layout = layout
        # [n, O, ...]
        self.delta = None if delta is None else by_rows(delta, layout, rows, 1).transpose(0, 1)

    @property
    def d(self) -> Tensor:
        assert self.delta is not None
        return self.delta

    def inputs(self) -> Tensor:
        return by_rows(self.use.input, self.layout, self.rows)

    def dense(self) -> tuple[Tensor, Tensor]:
        """a [n, T, I] and d [n, O, T, C]."""
        a, d = self.inputs(), self.d
        return a.unsqueeze(1).flatten(1, -2), d.unsqueeze(2).flatten(2, -2)

    def conv(self) -> ConvInputs:
        a, d = self.inputs(), self.d
        if not self.layout.merged:
            a, d = a.unsqueeze(1), d.unsqueeze(2)
        return ConvInputs(a, d, self.use.options["geometry"], self.use.kind == "conv_transpose")

    def jacobian(self, role: str, with_bias: bool = False) -> Tensor:
        """[n, O, P] of the use's weight or bias, or of both: each row of the weight with its bias behind."""
        kind, d = self.use.kind, self.d
        if kind in ("conv", "conv_transpose"):
            inputs = self.conv()
            if role == "weight":
                rows = inputs.a.shape[2] if inputs.transposed else inputs.d.shape[3]
                return inputs.gradients(0, rows, with_bias)
            return inputs.d.flatten(4).sum((2, 4))
        if kind == "dense":
            a, d = self.dense()
            if role == "bias":
                return d.sum(2) if d.shape[2] != 1 else d[:, :, 0]
            return dense_gradients(a, d, self.use.options["flipped"])
        if kind == "embedding":
            return self._embedding()
        return self._scale(role, with_bias)

    def _scale(self, role: str, with_bias: bool) -> Tensor:
        d, (begin, end) = self.d, self.use.options["axes"]
        if role == "weight" and d.dim() > 3 and (begin, end) == (1, 2) and self.layout == Layout(0) and not d.is_cuda:
            # A convolution of one position and one channel a group: one pass over the cotangents.
            a = self.inputs().flatten(2)
            return ops.conv_gradients(a, d.flatten(3), [1], [1], [0], [1], a.shape[1], with_bias)
        if with_bias:
            return torch.stack([self._scale("weight", False), self._scale("bias", False)], 3).flatten(2)
        # Behind the rows and the outputs stand the other axes in their order; those of the weight stay.
        alone, row_axis = not self.layout.merged, self.layout.axis
        kept = {axis + 2 - (1 if alone and axis > row_axis else 0) for axis in range(begin, end)}
        product = d if role == "bias" else d * self.inputs().unsqueeze(1)
        summed = [axis for axis in range(2, d.dim()) if axis not in kept]
        return (product.sum(summed) if summed else product).reshape(*d.shape[:2], -1)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens [n, T], -1 for padding, and d [n, O, T, D]."""
        tokens = self.inputs().reshape(self.rows, -1)
        padding = self.use.options["padding_idx"]
        d = self.d.reshape(*self.d.shape[:2], tokens.shape[1], -1)
        return (tokens.masked_fill(tokens == padding, -1) if padding >= 0 else tokens), d

    def _embedding(self) -> Tensor:
        tokens, d = self.tokens()
        result = d.new_zeros(*d.shape[:2], self.use.options["size"], d.shape[3])
        index = tokens.clamp(min=0)[:, None, :, None].expand_as(d)
        return result.scatter_add_(2, index, d.masked_fill((tokens < 0)[:, None, :, None], 0)).flatten(2)


def dense_gradients(a: Tensor, d: Tensor, flipped: bool) -> Tensor:
    """[n, O, P] from a [n, T, I] and d [n, O, T, C]: P is C · I, or I · C where flipped."""
    gradients = ops.position_gradients(a, d)
    return gradients.unflatten(2, (d.shape[3], a.shape[2])).transpose(2, 3).flatten(2) if flipped else gradients


def _side_by_side(uses: Sequence[Rows]) -> tuple[Tensor, Tensor]:
    """a [n, T, I] and d [n, O, T, C] of several dense uses of one weight, over the positions of all."""
    pairs = [use.dense() for use in uses]
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([a for a, _ in pairs], 1), torch.cat([d for _, d in pairs], 2)


@dataclass
class Arranged:
    """What one sweep gave: the uses of the structured entries by rows, by their places, and the made values."""

    uses: dict[int, Rows]
    made: list[Made]

    def made_jacobian(self, plan: Plan, name: str, parameter: Tensor, own: Sequence[Role]) -> Tensor | None:
        """[n, O, P]: the Jacobian of the parameter through the values that are made from it, by these roles."""
        total: Tensor | None = None
        for index, value in enumerate(plan.made):
            roles = [(use, role) for use, role in own if self._name(use, role) == made_name(index)]
            if name in value.names and roles:
                jacobian = self.jacobian(roles)
                part = through_made(self.made[index], jacobian, parameter, value.batched)
                total = part if total is None else total + part
        return total

    def jacobian(self, roles: Sequence[Role], with_bias: bool = False) -> Tensor:
        """[n, O, P]: the sum over the uses of one parameter or made value."""
        uses = [self.uses[index] for index, _ in roles]
        dense = all(use.use.kind == "dense" and role == "weight" for use, (_, role) in zip(uses, roles, strict=True))
        flipped = {use.use.options["flipped"] for use in uses} if dense else set()
        if len(uses) > 1 and len(flipped) == 1:  # such as a recurrent layer's, step by step
            return dense_gradients(*_side_by_side(uses), flipped.pop())
        total = self.uses[roles[0][0]].jacobian(roles[0][1], with_bias)
        for index, role in roles[1:]:
            total = total + self.uses[index].jacobian(role, with_bias)
        return total

    def direct(self, name: str, own: Sequence[Role]) -> list[Role]:
        """The roles of the parameter itself."""
        return [(index, role) for index, role in own if self._name(index, role) == name]

    def _name(self, index: int, role: str) -> str | None:
        use = self.uses[index].use
        return use.weight if role == "weight" else use.bias


def arrange(target: Target, plan: Plan, batch: Batch, begin: int, end: int, check: bool = False) -> Arranged:
    """The uses of the plan's structured entries on rows [begin, end), by one forward and one batched backward.

    Args:
        check: compare the first rows with those that the plan was made from.

    Raises:
        PlanMismatchError: the block used the parameters in another way than the plan says, or its rows lie otherwise.
    """
    rows, tensors = end - begin, batch.take(begin, end, plan.copies_inputs)
    arranged = Arranged({}, [])
    if not any(entry.roles for entry in plan.entries):
        return arranged
    followed = plan.apart and rows > 1  # a single row lies in every layout, and has no other to mix with
    capture = Capture(target, tensors if followed else ())
    with capture:
        raw = target.run(batch, tensors)
    flat = flatten(raw)
    uses = capture.uses
    changed = any(use.input._version != use.version for use in uses) or any(made.changed for made in capture.made)
    if (
        changed
        or capture.differentiated
        or flat.shape[1] != plan.outputs
        or [use.signature() for use in uses] != plan.signatures
        or row_shapes(uses, plan.layouts, rows) != plan.row_shapes
        or [made.names for made in capture.made] != [made.names for made in plan.made]
        or capture.unrecognised(raw) != plan.unrecognised
        or last_use(uses, raw) != plan.last
    ):
        raise PlanMismatchError
    needed = plan.needed
    doubtful = [index for index in needed if capture.routed or not plan.sure[index]]
    verified = bool(doubtful) and rows > 1 and flat.requires_grad
    deltas = cotangents([uses[index] for index in needed], flat, plan.batched_backward, keep=verified)
    if verified:
        _refuse_other_places(plan, uses, doubtful, [deltas[needed.index(index)] for index in doubtful], flat)
    if check and plan.probe is not None:
        count = min(rows, plan.probe.count)
        found = Seen.of(flat, capture, plan.layouts, count)
        compare(target, batch, plan.probe, found)
        # The same rows, but not in the same places?
        if not plan.apart and not all(map(agrees, found.inputs, plan.probe.rows(0, count).inputs)):
            raise PlanMismatchError
    if followed and not (capture.keeps_rows_apart(raw) and [use.layout for use in uses] == plan.layouts):
        raise PlanMismatchError
    del raw, flat
    for index in {index for entry in plan.entries for index, _ in entry.roles}:
        layout = plan.layouts[index]
        assert layout is not None
        delta = deltas[needed.index(index)] if index in needed else None
        arranged.uses[index] = Rows(uses[index], layout, rows, delta)
    arranged.made = capture.made
    return arranged


def row_shapes(uses: Sequence[Use], layouts: Sequence[Layout | None], rows: int) -> list[tuple[int, ...] | None]:
    """The shape of one row's part of each use that has a layout, which all blocks of rows share."""
    return [
        None if layout is None else row_shape(use.shape, layout, rows)
        for use, layout in zip(uses, layouts, strict=True)
    ]


def _refuse_other_places(
    plan: Plan, uses: Sequence[Use], doubtful: Sequence[int], deltas: Sequence[Tensor], flat: Tensor
) -> None:
    """Raise unless this block's rows lie in the doubtful uses where the plan's layouts say, by one more sweep.

    The rows that the plan was made from may lie otherwise: in another order, where values or their number decide it, or
    merged with other axes, of which few entries were reached.
    """
    rows, weights = len(flat), output_weights(flat)
    # Rows by factors all different.
    factors = 1 + torch.arange(rows, dtype=flat.dtype, device=flat.device) / rows
    edges = [uses[index].edge for index in doubtful]
    found = pull(flat, edges, (factors[:, None] * weights).unsqueeze(0), batched=False, keep=False)
    for index, delta, value in zip(doubtful, deltas, found, strict=True):
        layout = plan.layouts[index]
        assert layout is not None
        first = torch.tensordot(weights, delta, 1)
        if value is not None and not multiplied_by_rows(
            first, value.reshape(first.shape), layout, factors, PLACE_TOLERANCE
        ):
            raise PlanMismatchError


def collect(target: Target, plan: Plan, batch: Batch, begin: int, end: int, check: bool = False) -> list[Factor]:
    """The factors of rows [begin, end), one per entry of the plan; see `arrange`."""
    arranged = arrange(target, plan, batch, begin, end, check)
    columns = generic_jacobians(target, plan, batch, batch.take(begin, end, plan.copies_inputs))
    return [_factor(target, plan, entry, arranged) if entry.roles else columns.pop(0) for entry in plan.entries]


def generic_jacobians(target: Target, plan: Plan, batch: Batch, tensors: Sequence[Tensor]) -> list[Jacobian]:
    """The Jacobians of the entries that autograd computes, in their order."""
    entries = [entry for entry in plan.entries if not entry.roles]
    names = [name for entry in entries for name in entry.names]
    if not names:
        return []
    if entries[0].method == "vmap":
        jacobian = generic.vmapped(target, batch, tensors, names, plan.outputs)
    else:
        jacobian = generic.looped(target, batch, tensors, names, plan.outputs)
    widths = [sum(target.width(name) for name in entry.names) for entry in entries]
    return [Jacobian(part) for part in jacobian.split(widths, 2)]


def _factor(target: Target, plan: Plan, entry: Entry, arranged: Arranged) -> Factor:
    uses, outputs = [arranged.uses[index] for index, _ in entry.roles], plan.outputs
    if entry.method == "last":
        return Last(uses[0].inputs().reshape(uses[0].rows, -1), outputs, entry.bias)
    if entry.method in ("gram", "ghost"):
        a, d = _side_by_side(uses)
        return Gram(a[:, 0], d[:, :, 0], entry.bias) if entry.method == "gram" else Ghost(a, d, entry.bias)
    if entry.method == "tokens":
        found = [use.tokens() for use in uses]
        if len(found) == 1:
            return Tokens(*found[0])
        return Tokens(torch.cat([tokens for tokens, _ in found], 1), torch.cat([d for _, d in found], 2))
    if entry.method == "tiles":
        dense = uses[0].use.kind == "dense"
        return Tiled([DenseInputs(*_side_by_side(uses))] if dense else [use.conv() for use in uses], entry.cuts)
    if entry.method == "made":
        name = entry.names[0]
        through = arranged.made_jacobian(plan, name, target.parameters[name], entry.roles)
        own = arranged.direct(name, entry.roles)
        if through is None or not own:
            return Jacobian(arranged.jacobian(own) if through is None else through)
        return Jacobian(through + arranged.jacobian(own))
    return Jacobian(arranged.jacobian(entry.roles, entry.bias != 0))
