"""Training: the defaults on the toy regression in many seeds, and gradients across processes (DDP)."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import finite_width as fw

NOISE_VARIANCE, PRIOR_VARIANCE = 0.01, 10.0


def toy_run(seed: int, steps: int) -> tuple[list[float], nn.Module, Tensor]:
    """The toy regression with its recipe: 50 points, tanh network of five units, Adam 1e-2, the whole batch."""
    torch.manual_seed(seed)
    x = 6 * torch.rand(50, 1) - 3
    y = 0.5 * torch.sin(2 * math.pi * x / 3) + math.sqrt(NOISE_VARIANCE) * torch.randn(50, 1)
    prior = fw.bayes.GaussianPrior(math.sqrt(PRIOR_VARIANCE))
    model = nn.Sequential(fw.bayes.BayesLinear(1, 5, prior=prior), nn.Tanh(), fw.bayes.BayesLinear(5, 1, prior=prior))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for _ in range(steps):
        nll = ((y - model(x)).square() / (2 * NOISE_VARIANCE)).sum()
        loss = fw.bayes.negative_elbo(nll, fw.bayes.kl(model), num_data=50, reduction="sum", batch_size=50)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history, model, x


def assert_finite(history: list[float], model: nn.Module) -> None:
    assert all(map(math.isfinite, history))
    for parameter in model.parameters():
        assert bool(torch.isfinite(parameter).all())
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())


def test_toy_regression_stays_finite_and_learns() -> None:
    for seed in range(256):
        history, model, _ = toy_run(seed, 10)
        assert_finite(history, model)
    history, model, x = toy_run(0, 2500)
    assert_finite(history, model)
    assert sum(history[-100:]) < 0.5 * sum(history[:100])
    with fw.bayes.mean_mode(model):
        error = model(x) - 0.5 * torch.sin(2 * math.pi * x / 3)
    assert float(error.detach().square().mean().sqrt()) < 0.2


@pytest.mark.slow
def test_toy_regression_in_256_seeds() -> None:
    for seed in range(256):
        history, model, _ = toy_run(seed, 500)
        assert_finite(history, model)


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
