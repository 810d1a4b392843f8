"""Long measurements of streamed kernels on MNIST, each written to docs/results/scale_*.json.

    FINITE_WIDTH_DATA=/path/to/data python benchmarks/scale_record.py stream --rows 20000 --store /path/on/disk.zarr
    ... resume | ranks | digits | solve | sketch

stream: rate and working memory of one long run.   resume: the same stopped by SIGKILL ten times.
ranks: 1, 2 and 4 processes under torchrun.   digits: accuracy of ridge regression on all ten digits.
solve: conjugate gradients on the stored kernel against Cholesky.   sketch: error against dim, cost against N.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "examples"), str(ROOT / "benchmarks")]

import data  # noqa: E402
import finite_width as fw  # noqa: E402
import harness  # noqa: E402


def network() -> nn.Module:
    """784-1024-1024-10, ReLU, torch's default initialisation."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


@functools.cache
def images(rows: int, test: bool = False) -> tuple[Tensor, Tensor]:
    """The first rows of MNIST (its order is random), normalised, and their labels."""
    mnist = data.mnist().scaled(0.1307, 0.3081).flat()
    return (mnist.x_test[:rows], mnist.y_test[:rows]) if test else (mnist.x_train[:rows].clone(), mnist.y_train[:rows])


def minimal_flops(rows: int, columns: int | None = None) -> float:
    """Of the trace kernel: each pair once, and one forward and ten backward passes over each row once."""
    pairs = rows * (rows + 1) / 2 if columns is None else rows * columns
    layers = [(784, 1024), (1024, 1024)]
    per_pair = sum(2 * (inputs + 10 * outputs) for inputs, outputs in layers) + 2 * 1024
    forward = 2 * (784 * 1024 + 1024 * 1024 + 1024 * 10)
    backward = 10 * 2 * 1024 * 1024  # the cotangents of the second layer pulled to the first
    return pairs * per_pair + (rows + (columns or 0)) * (forward + backward)


def kernel(arguments: argparse.Namespace, store: Path, **named: Any) -> Any:
    return fw.ntk.empirical_ntk(
        network(),
        images(arguments.rows)[0],
        compute="trace",
        out=store,
        memory_budget=arguments.budget << 20,
        progress=True,
        **named,
    )


def stream(arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    """One uninterrupted run."""
    rate, rate_of_cpu = harness.product_rate() / 1e9, product_rate_of_cpu() / 1e9
    images(arguments.rows)  # kept: reading them is not the kernel's work
    taken: list[float] = []

    def call() -> None:
        started, used = time.perf_counter(), time.process_time()
        kernel(arguments, store)
        taken.extend((time.perf_counter() - started, time.process_time() - used))

    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    call()
    memory = resident("VmHWM:") - before
    achieved, achieved_of_cpu = (minimal_flops(arguments.rows) / each / 1e9 for each in taken)
    return {
        "rows": arguments.rows,
        "seconds": round(taken[0], 1),
        "memory_budget_mib": arguments.budget,
        "working_memory_mib": round(memory / 2**20),
        "minimal_tflop": round(minimal_flops(arguments.rows) / 1e12, 3),
        "gflop_per_s": round(achieved, 1),
        "best_measured_sgemm_gflop_per_s": round(rate, 1),
        "share_of_sgemm": round(achieved / rate, 3),
        # The same by processor time: what a busy machine leaves to this process does not count.
        "cpu_seconds": round(taken[1], 2),
        "gflop_per_cpu_s": round(achieved_of_cpu, 1),
        "best_measured_sgemm_gflop_per_cpu_s": round(rate_of_cpu, 1),
        "share_of_sgemm_by_cpu_time": round(achieved_of_cpu / rate_of_cpu, 3),
        "targets": {
            "working memory at most 1024 MiB": memory <= 2**30,
            "at least half of sgemm": achieved >= rate / 2,
            "at least half of sgemm by processor time": achieved_of_cpu >= rate_of_cpu / 2,
        },
    }


def product_rate_of_cpu(size: int = 1536) -> float:
    """The best sgemm's operations per second of processor time: torch's, oneDNN's and ours."""
    from finite_width._gemm import gemm

    a, b = torch.randn(size, size), torch.randn(size, size)
    calls = {"torch": lambda: a @ b, "finite-width": lambda: gemm(a, b)}
    if torch.backends.mkldnn.is_available():
        calls["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    least = []
    for call in calls.values():
        for _ in range(4):
            started = time.process_time()
            call()
            least.append(time.process_time() - started)
    return 2 * size**3 / min(least)


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def child(arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    """What `resume` and `ranks` start: the kernel, with a line in a log for every tile."""
    import importlib

    module = importlib.import_module("finite_width.ntk.stream")
    log = open(f"{store}.log", "a", buffering=1)  # noqa: SIM115
    compute, write = module.Stream._compute, module.Stream._write

    def logged_compute(self: Any, job: Any, rows: Any) -> Any:
        log.writelines(f"computing {row},{job.column}\n" for row in job.rows)
        return compute(self, job, rows)

    def logged_write(self: Any, tiles: Any, advance: Any) -> None:
        for each in tiles:
            write(self, [each], advance)
            log.write(f"stored {each[0][0]},{each[0][1]}\n")

    module.Stream._compute, module.Stream._write = logged_compute, logged_write
    kernel(arguments, store)
    return {}


def start(arguments: argparse.Namespace, store: Path, ranks: int = 1) -> subprocess.Popen[bytes]:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [__file__, "child", "--rows", str(arguments.rows), "--budget", str(arguments.budget)]
    return subprocess.Popen([*command, "--store", str(store)], stderr=subprocess.DEVNULL)


def finished(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise RuntimeError(f"a run ended with code {process.returncode}")


def resume(arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    """Ten SIGKILLs at random moments, then to the end; against one uninterrupted run."""
    generator = random.Random(0)
    started = time.perf_counter()
    whole = store.with_name("whole.zarr")
    finished(start(arguments, whole))
    seconds = time.perf_counter() - started
    kills, moments, deadline = 0, [], seconds / 4
    while kills < arguments.kills:
        process = start(arguments, store)
        moment = generator.uniform(0, deadline)
        try:
            process.wait(timeout=moment)
            break  # it came to its end first
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            moments.append(round(moment, 2))
    finished(start(arguments, store))
    computed, stored = counts(Path(f"{store}.log"))
    once, _ = counts(Path(f"{whole}.log"))
    same = np.array_equal(fw_open(whole)[:], fw_open(store)[:])
    again = [tile for tile, count in stored.items() if count > 1]
    return {
        "rows": arguments.rows,
        "kills": kills,
        "moments_s": moments,
        "uninterrupted_s": round(seconds, 1),
        "tiles": len(once),
        "computed_with_kills": sum(computed.values()),
        "in_flight_at_kills": sum(computed.values()) - len(once),
        "stored_twice": len(again),
        "bit_identical": same,
    }


def counts(log: Path) -> tuple[dict[str, int], dict[str, int]]:
    """How often each tile was begun and stored."""
    tables: dict[str, dict[str, int]] = {"computing": {}, "stored": {}}
    for line in log.read_text().splitlines():
        word, _, tile = line.partition(" ")
        if word in tables:
            tables[word][tile] = tables[word].get(tile, 0) + 1
    return tables["computing"], tables["stored"]


def fw_open(store: Path) -> Any:
    import zarr

    return zarr.open_array(str(store), mode="r")


def ranks(arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    """The same call under 1, 2 and 4 processes."""
    result: dict[str, Any] = {"rows": arguments.rows}
    reference = None
    for count in (1, 2, 4):
        place = store.with_name(f"ranks{count}.zarr")
        started = time.perf_counter()
        finished(start(arguments, place, count))
        found = fw_open(place)[:]
        reference = found if reference is None else reference
        result[f"{count} ranks"] = {
            "seconds_with_start": round(time.perf_counter() - started, 1),
            "bit_identical_to_one": bool(np.array_equal(found, reference)),
        }
    return result


def digits(arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    """Ridge regression of the ten one-hot targets with the trace kernel; the ridge chosen on a tenth held out."""
    x, y = images(arguments.rows)
    x_test, y_test = images(10000, test=True)
    budget = arguments.budget << 20
    model = network()
    started = time.perf_counter()
    own = fw.ntk.empirical_ntk(model, x, compute="trace", out=store, memory_budget=budget, progress=True)
    K = torch.from_numpy(own[:]) / 10
    seconds = time.perf_counter() - started
    targets = torch.nn.functional.one_hot(y, 10).double() - 0.1
    scale, part = float(K.diagonal().mean()), arguments.rows * 9 // 10
    table = {}
    for relative in (1e-5, 1e-4, 1e-3, 1e-2):
        solved = fw.ntk.solve(K[:part, :part], targets[:part], ridge=relative * scale, method="cholesky")
        guess = (K[part:, :part].double() @ solved.coefficients).argmax(1)
        table[relative] = 100 * float((guess == y[part:]).double().mean())
    best = max(table, key=lambda each: table[each])
    solved = fw.ntk.solve(K, targets, ridge=best * scale, method="cholesky")
    right = 0
    for begin in range(0, len(x_test), 2000):
        cross = fw.ntk.empirical_ntk(model, x_test[begin : begin + 2000], x, compute="trace", memory_budget=2 * budget)
        guess = (cross.double() / 10 @ solved.coefficients).argmax(1)
        right += int((guess == y_test[begin : begin + 2000]).sum())
    return {
        "training_images": arguments.rows,
        "test_images": len(x_test),
        "network": "784-1024-1024-10 ReLU at its random initialisation, trace kernel / 10",
        "kernel_s": round(seconds, 1),
        "held_out_accuracy_by_relative_ridge": {str(key): round(value, 2) for key, value in table.items()},
        "ridge_over_mean_diagonal": best,
        "test_accuracy_percent": round(100 * right / len(x_test), 2),
        "residual": solved.residual,
    }


def solve(arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    """Predictions by conjugate gradients over the stored tiles against Cholesky."""
    x, y = images(arguments.rows)
    x_test, _ = images(1000, test=True)
    stored = kernel(arguments, store)
    model = network()
    targets = torch.nn.functional.one_hot(y, 10).double() - 0.1
    cross = fw.ntk.empirical_ntk(model, x_test, x, compute="trace").double()
    K = torch.from_numpy(stored[:])
    result: dict[str, Any] = {"rows": arguments.rows, "ridges": {}}
    for relative in (1e-2, 1e-3, 1e-4):
        ridge = relative * float(K.diagonal().mean())
        started = time.perf_counter()
        exact = fw.ntk.solve(K, targets, ridge=ridge, method="cholesky")
        middle = time.perf_counter()
        found = fw.ntk.solve(stored, targets, ridge=ridge, method="cg", tol=1e-8)
        taken = time.perf_counter() - middle
        predictions = [cross @ each.coefficients for each in (exact, found)]
        difference = float((predictions[0] - predictions[1]).abs().max())
        result["ridges"][str(relative)] = {
            "largest_difference_of_predictions": difference,
            "iterations": found.iterations,
            "residual": found.residual,
            "cholesky_s": round(middle - started, 2),
            "cg_s": round(taken, 2),
            "within_1e-5": difference < 1e-5,
        }
    return result


def sketch(arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    """The sketch's error over dim 256 to 16,384, and its time over N."""
    model = network()
    x, _ = images(64)
    exact = fw.ntk.empirical_ntk(model, x)
    result: dict[str, Any] = {"rows": 64, "kinds": {}}
    for kind in ("countsketch", "gaussian", "srht"):
        errors = {}
        for dim in (256, 1024, 4096, 16384):
            squares = []
            for seed in range(4):
                features = fw.ntk.sketch(model, x, dim, kind=kind, seed=seed).reshape(640, -1)
                found = (features @ features.T).reshape(64, 10, 64, 10).transpose(1, 2)
                squares.append(float((found - exact).norm() / exact.norm()) ** 2)
            errors[dim] = (sum(squares) / len(squares)) ** 0.5
        slope = np.polyfit(np.log(list(errors)), np.log(list(errors.values())), 1)[0]
        result["kinds"][kind] = {"error": {str(k): round(v, 5) for k, v in errors.items()}, "slope": round(slope, 3)}
    times = {}
    for rows in (512, 1024, 2048, 4096):
        x, _ = images(rows)
        started = time.perf_counter()
        fw.ntk.sketch(model, x, 1024)
        times[rows] = time.perf_counter() - started
    result["countsketch_dim_1024_ms_per_row"] = {str(k): round(1e3 * v / k, 3) for k, v in times.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measurements = {each.__name__: each for each in (stream, resume, ranks, digits, solve, sketch, child)}
    parser.add_argument("what", choices=list(measurements))
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--budget", type=int, default=700, help="memory_budget in MiB")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--store", type=Path, help="where the kernel goes; default: a folder that is deleted")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    try:
        figures = measurements[arguments.what](arguments, arguments.store or folder / "kernel.zarr")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.what != "child":
        figures["machine"] = harness.machine_facts()
        text = json.dumps(figures, indent=2)
        (ROOT / "docs" / "results" / f"scale_{arguments.what}.json").write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
