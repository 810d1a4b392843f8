"""A chain's three-pass steps layer by layer: where BatchNorm stands in it, or `path_step` has no kernel."""

from __future__ import annotations

import math

from .chain import PathVectors, Scaling, Supply, agree, no_update
from .dense_chain import KNOWS_BACKWARD, KNOWS_FORWARD


class LayeredChain:
    """A `DenseChain` for any chain on the CPU, with its state in Python.

    Args:
        vectors: of the chain.
    """

    def __init__(self, vectors: PathVectors) -> None:
        self.vectors = vectors
        self._knows = KNOWS_BACKWARD
        self._total, self._surprises = (0.0, 0.0), 0

    def step(self, supply: Supply, scaling: Scaling, rebuild: int = 0) -> None:
        """One sweep in the direction whose other side's vectors are known; as `DenseChain.step`, without scaling."""
        if rebuild:
            _, self._total = self.vectors.sweep(rebuild == KNOWS_FORWARD, no_update)
            self._knows = rebuild
        forward = self._knows == KNOWS_BACKWARD
        old, new = self.vectors.sweep(forward, supply)
        diverged = math.isnan(old[0]) or math.isnan(self._total[0])  # Φ is infinite or NaN: nothing to compare
        self._surprises += not diverged and not agree(old, self._total)
        self._knows, self._total = KNOWS_FORWARD if forward else KNOWS_BACKWARD, new

    def outcome(self) -> tuple[bool, int]:
        """As `DenseChain.outcome`."""
        return not math.isnan(self._total[0]), self._surprises

    def knows_forward(self) -> bool:
        """As `DenseChain.knows_forward`."""
        return self._knows == KNOWS_FORWARD

    def path_total(self) -> tuple[float, float]:
        """As `DenseChain.path_total`."""
        return self._total
