"""The planner's blocks and tiles for a GPU, whose memory is made up here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finite_width.ntk.capture import Capture
from finite_width.ntk.contract import Target, preserved
from finite_width.ntk.plan import Planner, Sizes, block_limits, block_rows, roles_of

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=128 << 30))


@pytest.mark.parametrize("row_bytes, rows", [(1, 4096), (4 << 20, 4096), (500 << 20, 32), (1 << 30, 16), (1 << 40, 1)])
def test_a_block_touches_an_eighth_of_the_memory(row_bytes: int, rows: int) -> None:
    assert block_rows(row_bytes, [], GPU, 100_000) == rows


def test_a_convolution_s_tiles_fill_what_a_block_may_take() -> None:
    """A sixteenth of a sweep's bytes over all rows of a block: few tiles, where the CPU has many."""
    model = nn.Sequential(nn.Conv2d(256, 512, 3, padding=1), nn.Flatten(), nn.Linear(512 * 9, 10)).eval()
    target = Target(model, None, None)
    x = torch.randn(2, 256, 3, 3)
    capture = Capture(target)
    with preserved(model), capture:
        model(x)
    roles = roles_of(capture.uses, list(target.parameters))
    sizes = Sizes(32, 32, 10, "full", 4, False)
    cuts, limit = {}, block_limits(GPU)[1] // 16
    for device in (torch.device("cpu"), GPU):
        target.device = device
        entry = Planner(target, capture.uses, 2, sizes, True).entries(roles, None)[0]
        assert (entry.method, entry.cuts[0], entry.cuts[-1]) == ("tiles", 0, 512)
        cuts[device.type] = entry.cuts
        if device is GPU:
            assert limit / 2 < 32 * entry.tile_bytes <= limit
    assert len(cuts["cuda"]) == 3 < 40 < len(cuts["cpu"])
