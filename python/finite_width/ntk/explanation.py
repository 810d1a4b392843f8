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


@dataclass
class ExplanationRow:
    """One line of the plan: parameters computed together."""

    parameters: tuple[str, ...]
    method: str
    flops: float
    bytes: int  # kept, for all rows of both batches

    @property
    def reason(self) -> str:
        return REASONS[self.method]


@dataclass
class Explanation:
    """How a kernel will be computed; `print` it for a table."""

    rows: list[ExplanationRow]
    outputs: int
    block_rows: int
    sweeps: int  # forward and backward passes over a block of rows
    blocks: int  # of both batches
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
        table = [("parameters", "method", "GFLOP", "MB", "why")]
        for row in self.rows:
            names = ", ".join(row.parameters[:3]) + (
                f" and {len(row.parameters) - 3} more" if len(row.parameters) > 3 else ""
            )
            table.append((names, row.method, f"{row.flops / 1e9:.3g}", f"{row.bytes / 1e6:.3g}", row.reason))
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]])
            for line in table
        ]
        backward = "one sweep for all outputs" if self.batched_backward else "one sweep per output (vmap refuses)"
        lines.append(
            f"{self.outputs} outputs, blocks of {self.block_rows} rows, {self.blocks} blocks, "
            f"{self.recomputations} recomputed; backward: {backward}"
        )
        return "\n".join(lines)
