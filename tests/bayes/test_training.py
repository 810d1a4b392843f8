"""Training: the defaults on the toy regression in many seeds, and gradients across processes (DDP)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import finite_width as fw


@pytest.fixture(scope="session")
def toy() -> Any:
    """docs/measure_toy.py, which holds the toy regression and its recipe."""
    spec = importlib.util.spec_from_file_location("measure_toy", Path(__file__).parents[2] / "docs" / "measure_toy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_toy_regression_stays_finite_and_learns(toy: Any) -> None:
    for seed in range(64):
        history, model, _ = toy.toy_run(seed, 10)
        assert len(history) == 10
        assert toy.is_finite(history, model)
    history, model, x = toy.toy_run(0, 2500)
    assert toy.is_finite(history, model)
    assert sum(history[-100:]) < 0.5 * sum(history[:100])
    with fw.bayes.mean_mode(model):
        error = model(x) - toy.truth(x)
    assert float(error.detach().square().mean().sqrt()) < 0.2


def test_toy_regression_tells_divergence(toy: Any) -> None:
    """The count in docs/results/bayes_toy.json can be something else than 0: SGD at 1e-3 diverges."""
    history, model, _ = toy.toy_run(0, 500, "SGD, learning rate 1e-3")
    assert not toy.is_finite(history, model)


@pytest.mark.slow
def test_toy_regression_in_256_seeds(toy: Any) -> None:
    for seed in range(256):
        history, model, _ = toy.toy_run(seed, 500)
        assert toy.is_finite(history, model)


DDP_SCRIPT = """
import os, sys, torch
import torch.distributed as dist
from torch import nn
import finite_width as fw
from finite_width.bayes import ops
from finite_width.bayes.layers import draw_seed

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
torch.manual_seed(0)
layer = fw.bayes.BayesLinear(5, 3, init_std=0.5, dtype=torch.float64)
model = nn.parallel.DistributedDataParallel(layer)
torch.manual_seed(1)  # the same on both ranks: the rank is folded into the key
x = torch.arange(20, dtype=torch.float64).reshape(4, 5) / 10 + rank
y = model(x)
loss = y.square().sum() + fw.bayes.kl(model)
loss.backward()

torch.manual_seed(1)
seed = draw_seed(x.device)
parts = [p.detach().clone().requires_grad_() for p in layer.parameters()]
own, kl = ops.linear(x, *parts, seed, None, None, 1.0)
assert torch.equal(own.detach(), y.detach())
(own.square().sum() + kl).backward()
for parameter, part in zip(layer.parameters(), parts):
    total = part.grad.clone()
    dist.all_reduce(total)
    torch.testing.assert_close(parameter.grad, total / 2)
seeds = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
dist.all_gather(seeds, seed)
assert seeds[0] != seeds[1]
dist.barrier()
print("ok", flush=True)
os._exit(0)  # gloo's threads can outlive the interpreter and abort it
"""


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes: the averaged gradient is that of the two ranks' own noise, and their noise differs."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DDP_SCRIPT, str(tmp_path / "rendezvous")],
            env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert "ok" in output
