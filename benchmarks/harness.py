"""Measures cases: interleaved times, peak memory in a fresh process, error against float64, the machine's ceilings.

A wing's file (benchmarks/ntk.py, ...) has `CASES`, a dict of functions that build a `Case`, or a `Run` where the
measurement is too long to repeat; run.py drives them.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

import finite_width as fw

# Where the cases put their tensors; run.py sets it before it builds them.
DEVICE = "cpu"
# In seconds: calls shorter than this are timed warm.
SHORT = 0.1


@dataclass
class Case:
    """One thing to compute, and who computes it.

    name, what: the case and, in one line, its shapes and dtype.
    implementations: name -> a call without arguments that returns a tensor, several, or None.
    baseline: the implementation that the others' times are ratios to.
    peers: further implementations, run with --peers; a str says why one is missing.
    exact: the result in float64, for --refcheck.
    flops, bytes: the least work that the case needs; its floor is the larger of flops over the machine's measured
        matrix-product rate and bytes over its measured copy bandwidth.
    half: that rate is bfloat16's (on a GPU).
    targets: (implementation, against) -> the least ratio time(against) / time(implementation) that is aimed at.
    not_compared: implementations that compute something else (such as a dense layer of its own weights), whose error
        is therefore left out.
    min_runs, seconds: at least so many interleaved rounds, and so long, whichever is more; but never over `limit` s.
    patience: an implementation whose first run takes longer than so many seconds, and over five times the fastest, is
        not run again; its row then counts one run.
    """

    name: str
    what: str
    implementations: dict[str, Callable[[], Any]]
    baseline: str
    peers: dict[str, Callable[[], Any] | str] = field(default_factory=dict)
    exact: Callable[[], Any] | None = None
    flops: float = 0.0
    bytes: float = 0.0
    half: bool = False
    targets: dict[tuple[str, str], float] = field(default_factory=dict)
    min_runs: int = 20
    seconds: float = 2.0
    limit: float = 60.0
    patience: float = inf
    memory: bool = True
    not_compared: Sequence[str] = ()


@dataclass
class Record:
    """What a long run gives: figures by name, and for each aim whether it was met."""

    figures: dict[str, Any]
    aims: dict[str, bool] = field(default_factory=dict)


@dataclass
class Run:
    """A measurement that is too long to interleave: made once, alone.

    name, what: as for a `Case`.
    make: the measurement.
    """

    name: str
    what: str
    make: Callable[[], Record]

    def row(self) -> dict[str, Any]:
        """The row that is recorded."""
        record = self.make()
        aims = [{"aim": aim, "met": bool(met)} for aim, met in record.aims.items()]
        return {"what": self.what, "case": self.name, "figures": record.figures, "aims": aims}


def time_of(call: Callable[[], Any]) -> float:
    """The time of one call: by the clock on the CPU, between two events of the stream on a GPU."""
    if DEVICE == "cpu":
        before = time.perf_counter()
        call()
        return time.perf_counter() - before
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def first_run(call: Callable[[], Any]) -> tuple[float, int | None]:
    """The time of a call's first run, and on a GPU the bytes of its memory that it needed beyond what was held."""
    if DEVICE == "cpu":
        return time_of(call), None
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    return time_of(call), torch.cuda.max_memory_allocated() - held


def replayed(call: Callable[[], Any], times: int) -> Callable[[], Any]:
    """A call that runs `call` so many times: on a GPU the replay of one graph, after runs that warm up."""

    def run() -> None:
        for _ in range(times):
            call()

    if DEVICE == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_of(size: float) -> Callable[[], Any]:
    """A copy that reads and writes so many bytes altogether: what memory-bound work is held against."""
    source = torch.ones(max(1, round(size / 8)), device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def interleave(
    calls: dict[str, Callable[[], Any]],
    min_runs: int,
    seconds: float,
    limit: float,
    patience: float = inf,
    peaks: dict[str, int | None] | None = None,
) -> dict[str, list[float]]:
    """Times of each call in seconds, over rounds that run every call once in a new random order.

    A first run warms up (allocations, thread pools, caches of plans) and counts only where it is the last: see
    `Case.patience`. On the CPU a call shorter than SHORT runs twice in a row, and the second run counts. The first pays
    for the neighbour in the round: it loads code and data again, unless the neighbour shares them, and gives back to
    the system what the neighbour freed.

    Args:
        peaks: is filled with the bytes that each first run needed on a GPU.
    """
    runs = {name: first_run(call) for name, call in calls.items()}
    first = {name: once for name, (once, _) in runs.items()}
    if peaks is not None:
        peaks |= {name: peak for name, (_, peak) in runs.items()}
    slow = {name for name, once in first.items() if once > patience and once > 5 * min(first.values())}
    order = [name for name in calls if name not in slow]
    times: dict[str, list[float]] = {name: [first[name]] if name in slow else [] for name in calls}
    shuffle = random.Random(0)
    started = time.perf_counter()
    enabled = gc.isenabled()
    gc.disable()
    try:
        while True:
            shuffle.shuffle(order)
            for name in order:
                if DEVICE == "cpu" and times[name] and times[name][-1] < SHORT:
                    calls[name]()
                times[name].append(time_of(calls[name]))
            spent, rounds = time.perf_counter() - started, len(times[order[0]])
            if spent > limit or (rounds >= min_runs and spent > seconds):
                return times
    finally:
        if enabled:
            gc.enable()


def relative_error(result: Any, exact: Any) -> float:
    """‖result − exact‖ / ‖exact‖ over all tensors of both, in float64."""
    results = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
    rights = [leaf for leaf in tree_flatten(exact)[0] if isinstance(leaf, Tensor)]
    if len(results) != len(rights):
        raise ValueError(f"{len(results)} tensors to compare with {len(rights)}")
    difference = sum(
        float((a.detach().double() - b.double()).square().sum()) for a, b in zip(results, rights, strict=True)
    )
    norm = sum(float(b.double().square().sum()) for b in rights)
    return (difference / norm) ** 0.5


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes that a call needs beyond what the process held before it, measured on its second run.

    The first run loads code and fills caches; what it leaves allocated (workspaces kept for reuse) counts as well.
    On a GPU, bytes of its memory as torch's allocator counts them. Linux only. Meant for a fresh process: run.py starts
    one for each implementation.
    """

    if DEVICE != "cpu":
        call()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held

    def status(field_name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field_name):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {field_name}")

    a = torch.randn(64, 64)
    (a @ a).sum()  # starts the threads
    torch.autograd.grad(a.requires_grad_() * 2, a, a)  # torch loads sympy with the first cotangent: 35 MB
    anonymous_before = status("RssAnon:")
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    kept = max(0, status("RssAnon:") - anonymous_before)
    before = status("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    result = call()
    peak = status("VmHWM:") - before
    del result
    return peak + kept


def product_rate(dtype: torch.dtype = torch.float32, size: int = 2048) -> float:
    """The machine's best measured matrix-product rate in FLOP/s: torch's, oneDNN's and ours."""
    from finite_width._gemm import gemm

    if DEVICE != "cpu":
        size *= 4  # fills the chip
    a, b = (torch.randn(size, size, dtype=dtype, device=DEVICE) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {"torch": lambda: a @ b}
    if DEVICE == "cpu":
        calls["finite-width"] = lambda: gemm(a, b)
    if DEVICE == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        calls["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    times = interleave(calls, min_runs=5, seconds=0.5, limit=10)
    return 2 * size**3 / min(statistics.median(values) for values in times.values())


def copy_bandwidth(megabytes: int = 256) -> float:
    """The machine's copy bandwidth in bytes/s, bytes read plus bytes written."""
    if DEVICE != "cpu":
        megabytes *= 8  # many times any cache
    source = torch.ones(megabytes * 2**18, device=DEVICE)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, min_runs=5, seconds=0.5, limit=10)["copy"]
    return 2 * source.numel() * 4 / statistics.median(times)


def machine_facts() -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions, measured ceilings."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (s.split(":")[1].strip() for s in cpuinfo.read_text().splitlines() if s.startswith("model name")), model
        )
    facts = {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "product_rate_gflops": round(product_rate() / 1e9, 1),
        "copy_bandwidth_gb_per_s": round(copy_bandwidth() / 1e9, 1),
    }
    if DEVICE != "cpu":
        facts |= device_facts()
    info = fw.build_info()
    facts |= {key: info[key] for key in ("version", "torch", "kernels", "threads", "isa", "compiler") if key in info}
    return facts


def device_facts() -> dict[str, Any]:
    """The GPU, its driver, and the versions of CUDA; rates of torch's products in TFLOP/s, by dtype."""

    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            return f"not found ({error})"

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch_cuda": torch.version.cuda,
        "nvcc": said("nvcc", "--version").split("release ")[-1].split(",")[0],
        "cuda_kernels": fw.build_info().get("cuda_kernels", ""),
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "product_rate_bfloat16_tflops": round(product_rate(torch.bfloat16) / 1e12, 1),
    }


def measure(case: Case, *, peers: bool, refcheck: bool) -> list[dict[str, Any]]:
    """One row per implementation: median seconds, spread, ratio to the baseline, error, targets."""
    calls = dict(case.implementations)
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    if peers:
        for name, peer in case.peers.items():
            if isinstance(peer, str):
                missing[name] = peer
            else:
                calls[name] = peer
    peaks: dict[str, int | None] = {}
    times = interleave(calls, case.min_runs, case.seconds, case.limit, case.patience, peaks)
    medians = {name: statistics.median(values) for name, values in times.items()}
    exact = case.exact() if refcheck and case.exact else None
    for name, values in times.items():
        row: dict[str, Any] = {
            "case": case.name,
            "implementation": name,
            "seconds": medians[name],
            "spread": spread(values),
            "runs": len(values),
            "ratio": medians[name] / medians[case.baseline],
            "baseline": case.baseline,
        }
        if peaks[name] is not None:
            row["peak_bytes"] = peaks[name]
        if exact is not None and name not in case.not_compared:
            row["relative_error"] = relative_error(calls[name](), exact)
        row["targets"] = [
            {"against": against, "aim": aim, "measured": medians[against] / medians[name]}
            for (implementation, against), aim in case.targets.items()
            if implementation == name and against in medians
        ]
        rows.append(row)
    rows += [{"case": case.name, "implementation": name, "missing": reason} for name, reason in missing.items()]
    return rows


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, over the median."""
    if len(values) < 4:
        return (max(values) - min(values)) / 2 / statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / statistics.median(values)
