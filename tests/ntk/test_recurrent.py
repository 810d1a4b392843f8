"""Recurrent layers are unrolled into dense ones: exact, and without a backward for each row and output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import finite_width as fw
from ntk.jacobians import jacobian

LENGTH, FEATURES, HIDDEN = 6, 3, 4


class Recurrent(nn.Module):
    """A recurrent layer on [n, T, F], and a head on its outputs and last states."""

    def __init__(self, layer: nn.Module, width: int, time_first: bool = False, start: bool = False) -> None:
        super().__init__()
        self.layer, self.head, self.time_first = layer, nn.Linear(width, 2), time_first
        self.start = nn.Parameter(torch.randn(1, 1, HIDDEN)) if start else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.time_first else x
        state = [] if self.start is None else [self.start.expand(-1, len(x), -1).contiguous()]
        outputs, last = self.layer(x, *state)
        outputs = outputs.transpose(0, 1) if self.time_first else outputs
        states = [last] if isinstance(last, Tensor) else list(last)
        parts = [outputs.tanh().mean(1), *(state.transpose(0, 1).flatten(1) for state in states)]
        return self.head(torch.cat(parts, 1))


class Cells(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for part in x.unbind(1):
            state = self.cell(part, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def _build(name: str) -> nn.Module:
    kind, _, rest = name.partition(", ")
    options: dict[str, Any] = {"batch_first": "time first" not in rest}
    options |= {"num_layers": 2} if "layers" in rest else {}
    options |= {"bidirectional": True} if "both ways" in rest else {}
    options |= {"bias": False} if "no bias" in rest else {}
    options |= {"proj_size": 2} if "projected" in rest else {}
    options |= {"nonlinearity": "relu"} if "relu" in rest else {}
    layer = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}[kind](FEATURES, HIDDEN, **options)
    states = (2 if "layers" in rest else 1) * (2 if "both ways" in rest else 1)
    out = 2 if "projected" in rest else HIDDEN
    width = out * (2 if "both ways" in rest else 1) + states * out + (states * HIDDEN if kind == "LSTM" else 0)
    if "normed" in rest:
        layer = parametrizations.weight_norm(layer, "weight_hh_l0")
    return Recurrent(layer, width, "time first" in rest, "learned start" in rest)


LAYERS = [
    "LSTM",
    "LSTM, layers, both ways",
    "LSTM, projected, no bias",
    "LSTM, time first",
    "GRU",
    "GRU, layers, both ways, time first",
    "GRU, no bias, learned start",
    "GRU, normed",
    "RNN",
    "RNN, relu, layers",
    "RNN, both ways, no bias",
]


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    torch.manual_seed(0)
    model, x = _build(name).double(), torch.randn(7, LENGTH, FEATURES).double()
    j = jacobian(model, x)
    right = torch.einsum("nap,mbp->nmab", j, j)
    for one, two in ((7, 7), (1, 7), (5, 1)):
        found = fw.ntk.empirical_ntk(model, x[:one], x[:two])
        torch.testing.assert_close(found, right[:one, :two], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(fw.ntk.empirical_ntk(model, x, memory_budget=1 << 20), right, rtol=1e-11, atol=1e-12)
    methods = {row.method for row in fw.ntk.explain(model, x).rows}
    assert not methods & {"vmap", "loop"}


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Cells(kind(FEATURES, HIDDEN)).double(), torch.randn(5, LENGTH, FEATURES).double()
    j = jacobian(model, x)
    right = torch.einsum("nap,map->nm", j, j)
    torch.testing.assert_close(fw.ntk.empirical_ntk(model, x, compute="trace"), right, rtol=1e-11, atol=1e-12)
    assert not {row.method for row in fw.ntk.explain(model, x).rows} & {"vmap", "loop"}


def test_packed_sequences_are_left_to_autograd() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(FEATURES, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 2)

        def forward(self, x: Tensor) -> Tensor:
            lengths = 1 + (x[:, 0, 0] > 0).long()
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.layer(packed)[1][0])

    torch.manual_seed(0)
    model, x = Packed().double(), torch.randn(5, LENGTH, FEATURES).double()
    j = jacobian(model, x)
    right = torch.einsum("nap,mbp->nmab", j, j)
    torch.testing.assert_close(fw.ntk.empirical_ntk(model, x), right, rtol=1e-11, atol=1e-12)
