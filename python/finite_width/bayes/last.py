"""What a layer remembers of its last forward, so that kl() need not compute the same again."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Steps:
    """How many steps all optimizers have made: a fused one writes parameters without raising their versions."""

    count = 0


def _count_step(*_: Any) -> None:
    _Steps.count += 1


register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """The number of optimizer steps so far, in this process."""
    return _Steps.count


class _Used:
    """Whether a graph has been run backward. Held by the graph's hooks, so it must not hold the graph."""

    value = False

    def mark(self, *_: Any) -> None:
        self.value = True


class Last(threading.local):
    """What this thread's last forward left for kl(): valid while nothing has changed and its graph is unused.

    Each thread has its own: the graph that kl() shares is that of its forward. Copies and pickles are empty: it holds
    tensors of a graph.
    """

    def __init__(self) -> None:  # called anew in every thread
        self.clear()

    def clear(self) -> None:
        self.result: Any = None
        self.state: Any = None
        self.used = _Used()

    def put(self, result: Any, nodes: list[Tensor], state: Any) -> None:
        self.result, self.state, self.used = result, state, _Used()
        for tensor in nodes:
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_hook(self.used.mark)

    def get(self, state: Any) -> Any:
        if self.result is None or self.used.value or len(state) != len(self.state):
            return None
        pairs = zip(state, self.state, strict=True)
        return self.result if all(a is b or (type(a) is int and a == b) for a, b in pairs) else None

    def __deepcopy__(self, memo: Any) -> Last:
        return Last()

    def __reduce__(self) -> Any:
        return Last, ()
