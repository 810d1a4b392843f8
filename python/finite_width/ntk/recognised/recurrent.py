"""Recurrent layers step by step, so that every use of their weights is a dense layer's, which a capture records.

torch runs a recurrent layer as one operation that torch.func.vmap refuses: its Jacobian would need a backward for each
row and output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ..capture import Capture

State = tuple[Tensor, ...]  # h, and for an LSTM c
# (the input's part [n, gates], the state, weight_hh, bias_hh, weight_hr) to the next state.
Step = Callable[[Tensor, State, Tensor, Tensor | None, Tensor | None], State]


def _plain_step(nonlinearity: Callable[[Tensor], Tensor]) -> Step:
    def step(part: Tensor, state: State, weight: Tensor, bias: Tensor | None, _: Tensor | None) -> State:
        return (nonlinearity(part + F.linear(state[0], weight, bias)),)

    return step


def _gru_step(part: Tensor, state: State, weight: Tensor, bias: Tensor | None, _: Tensor | None) -> State:
    (h,) = state
    (reset, update, new), (by_reset, by_update, by_new) = part.chunk(3, 1), F.linear(h, weight, bias).chunk(3, 1)
    candidate = torch.tanh(new + torch.sigmoid(reset + by_reset) * by_new)
    return (candidate + torch.sigmoid(update + by_update) * (h - candidate),)


def _lstm_step(part: Tensor, state: State, weight: Tensor, bias: Tensor | None, projection: Tensor | None) -> State:
    h, c = state
    enter, forget, cell, leave = (part + F.linear(h, weight, bias)).chunk(4, 1)
    c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(cell)
    h = torch.sigmoid(leave) * torch.tanh(c)
    return (h if projection is None else F.linear(h, projection)), c


_TANH, _RELU = _plain_step(torch.tanh), _plain_step(torch.relu)


def _known(capture: Capture, weights: Sequence[Tensor]) -> bool:
    return any(capture.name(weight) for weight in weights)


def _layer(step: Step) -> Callable[..., Any]:
    """torch.lstm, gru, rnn_tanh, rnn_relu on padded sequences."""

    def recognise(
        capture: Capture,
        input: Tensor,
        initial: Any,
        weights: Any,
        has_biases: Any,
        layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        if not isinstance(weights, Sequence) or not _known(capture, weights) or (train and dropout > 0):
            return NotImplemented  # packed sequences have the batch sizes in the second place
        states = (initial,) if isinstance(initial, Tensor) else tuple(initial)
        directions = 2 if bidirectional else 1
        each = len(weights) // (layers * directions)  # w_ih, w_hh, maybe b_ih, b_hh, maybe w_hr
        finals: list[State] = []
        with capture:
            value = input.transpose(0, 1) if batch_first else input
            for layer in range(layers):
                outputs = []
                for direction in range(directions):
                    place = layer * directions + direction
                    own = list(weights[place * each : (place + 1) * each])
                    bias_ih, bias_hh = own[2:4] if has_biases else (None, None)
                    projection = own[-1] if each == (5 if has_biases else 3) else None
                    state = tuple(part[place] for part in states)
                    parts = F.linear(value, own[0], bias_ih).unbind(0)
                    steps = []
                    for part in reversed(parts) if direction else parts:
                        state = step(part, state, own[1], bias_hh, projection)
                        steps.append(state[0])
                    outputs.append(torch.stack(steps[::-1] if direction else steps))
                    finals.append(state)
                value = torch.cat(outputs, 2) if bidirectional else outputs[0]
            last = [torch.stack(parts) for parts in zip(*finals, strict=True)]
            return (value.transpose(0, 1) if batch_first else value, *last)

    return recognise


def _cell(step: Step) -> Callable[..., Any]:
    """torch.lstm_cell, gru_cell, rnn_tanh_cell, rnn_relu_cell."""

    def recognise(
        capture: Capture,
        input: Tensor,
        state: Any,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None = None,
        bias_hh: Tensor | None = None,
    ) -> Any:
        weights = [weight for weight in (weight_ih, weight_hh, bias_ih, bias_hh) if weight is not None]
        if input.dim() != 2 or not _known(capture, weights):
            return NotImplemented
        before = (state,) if isinstance(state, Tensor) else tuple(state)
        with capture:
            after = step(F.linear(input, weight_ih, bias_ih), before, weight_hh, bias_hh, None)
        return after[0] if isinstance(state, Tensor) else after

    return recognise


RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.lstm: _layer(_lstm_step),
    torch.gru: _layer(_gru_step),
    torch.rnn_tanh: _layer(_TANH),
    torch.rnn_relu: _layer(_RELU),
    torch.lstm_cell: _cell(_lstm_step),
    torch.gru_cell: _cell(_gru_step),
    torch.rnn_tanh_cell: _cell(_TANH),
    torch.rnn_relu_cell: _cell(_RELU),
}
