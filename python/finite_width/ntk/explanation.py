"""The plan of a kernel as a table."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import Plan, Sizes

REASONS = {
    "gram": "dense, one position: (a a' + bias) ∘ (δ δ')",
    "last": "the output layer: its cotangents are the identity",
    "ghost": "dense, several positions: Σ (a_t a_s)(δ_t δ_s)",
    "gradients": "per-example gradients, kept",
    "tiles": "per-example gradients, in tiles over the weight",
    "made": "through a value that all rows share: its per-example gradients, pulled back",
    "tokens": "embedding: equal tokens meet",
    "vmap": "a use that is not recognised: vmap of vector-Jacobian products",
    "loop": "vmap refuses: a loop of torch.autograd.grad",
    "products": "Jacobian-vector products of vector-Jacobian products",
}


def _with_unit(value: float, unit: str) -> str:
    """A quantity with the largest of the prefixes k, M, G and T that leaves at least 1: 570 FLOP, 1.2 MB."""
    prefixes = ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}"


@dataclass
class ExplanationRow:
    """One line of the plan: parameters computed together.

    Attributes:
        parameters: their names.
        method: how their part of the kernel is computed; `reason` says why.
        flops: operations of the whole kernel's part.
        bytes: kept, for all rows of both batches.
    """

    parameters: tuple[str, ...]
    method: str
    flops: float
    bytes: int

    @property
    def reason(self) -> str:
        """Why the method fits, in words."""
        return REASONS[self.method]


@dataclass
class Explanation:
    """How a kernel will be computed; `print` it for a table.

    Attributes:
        rows: one for each group of parameters that are computed together.
        outputs: of the model, for each row of data.
        block_rows: rows of data that are run through the model at a time.
        sweeps: forward and backward passes over a block of rows.
        blocks: of both batches.
        batched_backward: whether one backward sweep serves all outputs.
    """

    rows: list[ExplanationRow]
    outputs: int
    block_rows: int
    sweeps: int
    blocks: int
    batched_backward: bool

    @property
    def recomputations(self) -> int:
        """Blocks computed more than once, because the memory budget does not hold them all."""
        return self.sweeps - self.blocks

    @classmethod
    def make(cls, plan: Plan, sizes: Sizes, method: str, sweeps: int, left: int, right: int) -> Explanation:
        count = sizes.rows if sizes.symmetric else sizes.rows + sizes.columns
        rows = [
            ExplanationRow(entry.names, entry.method, entry.flops, entry.row_bytes * count) for entry in plan.entries
        ]
        if method == "products":
            rows = [ExplanationRow(row.parameters, "products", row.flops, 0) for row in rows]
        blocks = left if sizes.symmetric else left + right
        return cls(rows, plan.outputs, plan.block, sweeps, blocks, plan.batched_backward)

    def __str__(self) -> str:
        table = [("parameters", "method", "operations", "memory", "why")]
        for row in self.rows:
            names = ", ".join(row.parameters[:3]) + (
                f" and {len(row.parameters) - 3} more" if len(row.parameters) > 3 else ""
            )
            table.append((names, row.method, _with_unit(row.flops, "FLOP"), _with_unit(row.bytes, "B"), row.reason))
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]])
            for line in table
        ]
        backward = "one sweep for all outputs" if self.batched_backward else "one sweep per output (vmap refuses)"
        lines.append(
            f"outputs: {self.outputs}; blocks of {self.block_rows} rows: {self.blocks}, "
            f"recomputed: {self.recomputations}; backward: {backward}"
        )
        return "\n".join(lines)
