"""DistributedDataParallel over two gloo processes gives the gradients of the whole batch."""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import finite_width as fw


def make():
    torch.manual_seed(3)
    return nn.Sequential(fw.tt.TTLinear(24, 18, rank=3), nn.Tanh(), fw.tt.TTLinear(18, 6, rank=2, layout="in_out"))


def batch():
    return torch.randn(8, 24, generator=torch.Generator().manual_seed(4))


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        model = DistributedDataParallel(make())
        model(batch()[4 * rank : 4 * rank + 4]).square().sum(1).mean().backward()
        torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=2)
    model = make()
    model(batch()).square().sum(1).mean().backward()
    for rank in range(2):
        for got, parameter in zip(torch.load(tmp_path / f"{rank}.pt"), model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad)
