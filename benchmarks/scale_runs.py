"""The long measurements of scale.py, on MNIST and 784-1024-1024-10: each returns a record of figures and aims.

    python benchmarks/scale_runs.py STORE ROWS MEBIBYTES    one streamed kernel, a line in STORE.log for every tile

That is also what `kills` and `ranks` start, as processes of their own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
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

LAYERS = [(784, 1024), (1024, 1024), (1024, 10)]
OUTPUTS = 10


def network() -> nn.Module:
    """784-1024-1024-10, ReLU, torch's default initialisation."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


@functools.cache
def images(rows: int, test: bool = False) -> tuple[Tensor, Tensor]:
    """The first rows of MNIST (its order is random), normalised, and their labels."""
    mnist = data.mnist().scaled(0.1307, 0.3081).flat()
    return (mnist.x_test[:rows], mnist.y_test[:rows]) if test else (mnist.x_train[:rows].clone(), mnist.y_train[:rows])


def one_hot(labels: Tensor) -> Tensor:
    return nn.functional.one_hot(labels, OUTPUTS).double() - 0.1


def minimal_flops(rows: int) -> float:
    """Of the symmetric trace kernel: each pair once, and one forward and ten backward passes over each row once."""
    *hidden, (width, _) = LAYERS
    per_pair = sum(2 * (inputs + OUTPUTS * outputs) for inputs, outputs in hidden) + 2 * width
    forward = sum(2 * inputs * outputs for inputs, outputs in LAYERS)
    backward = OUTPUTS * 2 * 1024 * 1024  # the cotangents of the second layer pulled to the first
    return rows * (rows + 1) / 2 * per_pair + rows * (forward + backward)


def kernel(store: Path, rows: int, mebibytes: int) -> Any:
    model, (x, _) = network(), images(rows)
    return fw.ntk.empirical_ntk(model, x, compute="trace", out=store, memory_budget=mebibytes << 20, progress=True)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        yield Path(name)


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def stream(rows: int, mebibytes: int) -> harness.Record:
    """One uninterrupted run: its rate against the best matrix product before and after, and its memory."""
    rate = harness.product_rate()
    images(rows)  # kept: reading them is not the kernel's work
    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    with folder() as place:
        started, used = time.perf_counter(), time.process_time()
        kernel(place / "kernel.zarr", rows, mebibytes)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    memory = resident("VmHWM:") - before
    rate = max(rate, harness.product_rate())
    achieved = minimal_flops(rows) / seconds
    return harness.Record(
        {
            "seconds": round(seconds, 1),
            "processor seconds": round(cpu_seconds, 1),
            "least operations (TFLOP)": round(minimal_flops(rows) / 1e12, 3),
            "rate (GFLOP/s)": round(achieved / 1e9, 1),
            "best measured sgemm (GFLOP/s)": round(rate / 1e9, 1),
            "rate ÷ best sgemm": round(achieved / rate, 3),
            "memory_budget (MiB)": mebibytes,
            "working memory (MiB)": round(memory / 2**20),
        },
        {"at least half of the best sgemm": achieved >= rate / 2, "working memory at most 1 GiB": memory <= 2**30},
    )


def child(store: Path, rows: int, mebibytes: int) -> None:
    """The kernel, with a line in a log before a tile is computed and after it is stored."""
    stream_class = importlib.import_module("finite_width.ntk.stream").Stream
    compute, write = stream_class._compute, stream_class._write
    with open(f"{store}.log", "a", buffering=1) as log:

        def logged_compute(self: Any, job: Any, held: Any) -> Any:
            log.write("".join(f"computing {row},{job.column}\n" for row in job.rows))
            return compute(self, job, held)

        def logged_write(self: Any, tiles: Any, advance: Any) -> None:
            for each in tiles:
                write(self, [each], advance)
                log.write(f"stored {each[0][0]},{each[0][1]}\n")

        stream_class._compute, stream_class._write = logged_compute, logged_write
        kernel(store, rows, mebibytes)


def start(store: Path, rows: int, mebibytes: int, ranks: int = 1) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, __file__, str(store), str(rows), str(mebibytes)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def finished(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise RuntimeError(f"a run ended with code {process.returncode}")


def counted(log: Path, word: str) -> Counter[str]:
    """How often each tile stands in the log behind this word; a line that a kill cut short does not count."""
    whole = [line.split() for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return Counter(tile for first, tile in whole if first == word)


def same_values(one: Path, other: Path) -> bool:
    """Whether two stored kernels agree bit by bit, panel by panel."""
    import zarr

    first, second = (zarr.open_array(str(each), mode="r") for each in (one, other))
    step = 4 * first.chunks[0]
    cuts = range(0, first.shape[0], step)
    return all(np.array_equal(first[cut : cut + step], second[cut : cut + step]) for cut in cuts)


def kills(rows: int, mebibytes: int, count: int) -> harness.Record:
    """SIGKILL at `count` random moments of one run, against a run that nobody stopped.

    The moments are a random number of finished tiles and a random part of a second more, so that a busy machine
    cannot end the run before the last of them.
    """
    generator = random.Random(0)
    with folder() as place:
        whole, store = place / "whole.zarr", place / "killed.zarr"
        finished(start(whole, rows, mebibytes))
        once = counted(Path(f"{whole}.log"), "computing")
        log, in_flight = Path(f"{store}.log"), []
        log.touch()
        moments = sorted(generator.sample(range(len(once) - len(once) // 20), count))
        for moment in moments:
            before = {word: counted(log, word).total() for word in ("computing", "stored")}
            process = start(store, rows, mebibytes)
            while process.poll() is None and (
                counted(log, "stored").total() < moment or counted(log, "computing").total() == before["computing"]
            ):
                time.sleep(0.02)
            time.sleep(generator.random())
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                raise RuntimeError("a run ended before it was killed")
            begun, stored = (counted(log, word).total() - before[word] for word in before)
            in_flight.append(begun - stored)
        finished(start(store, rows, mebibytes))
        computed, stored_tiles = counted(log, "computing"), counted(log, "stored")
        again = computed.total() - len(once)
        same = same_values(whole, store)
    return harness.Record(
        {
            "tiles": len(once),
            "killed up to a second after so many finished tiles": ", ".join(map(str, moments)),
            "in flight at each kill": ", ".join(map(str, in_flight)),
            "tiles computed a second time": again,
            "tiles stored a second time": sum(number > 1 for number in stored_tiles.values()),
        },
        {
            f"killed {count} times": len(in_flight) == count,
            "bit-identical to the uninterrupted run": same,
            "every tile computed": set(computed) == set(once),
            "nothing computed twice but what was in flight": again <= sum(in_flight)
            and max(stored_tiles.values()) == 1,
        },
    )


def ranks(rows: int, mebibytes: int) -> harness.Record:
    """The same call in 1, 2 and 4 gloo processes of one thread each."""
    figures: dict[str, Any] = {}
    aims = {}
    with folder() as place:
        for number in (1, 2, 4):
            store = place / f"{number}.zarr"
            started = time.perf_counter()
            finished(start(store, rows, mebibytes, number))
            figures[f"{number} rank{'s' * (number > 1)}, with the start of the processes (s)"] = round(
                time.perf_counter() - started, 1
            )
            if number > 1:
                aims[f"{number} ranks: the bits of one"] = same_values(store, place / "1.zarr")
                tiles = counted(Path(f"{store}.log"), "stored")
                aims[f"{number} ranks: every tile once"] = set(tiles.values()) == {1}
    return harness.Record(figures, aims)


def solve(rows: int) -> harness.Record:
    """Predictions by conjugate gradients over the stored tiles against those by Cholesky."""
    (x, y), (x_test, _), model = images(rows), images(1000, test=True), network()
    figures: dict[str, Any] = {}
    worst = 0.0
    with folder() as place:
        stored = kernel(place / "kernel.zarr", rows, 700)
        K, targets = torch.from_numpy(stored[:]), one_hot(y)
        cross = fw.ntk.empirical_ntk(model, x_test, x, compute="trace").double()
        for relative in (1e-2, 1e-3, 1e-4):
            ridge = relative * float(K.diagonal().mean())
            started = time.perf_counter()
            exact = fw.ntk.solve(K, targets, ridge=ridge, method="cholesky")
            middle = time.perf_counter()
            found = fw.ntk.solve(stored, targets, ridge=ridge, method="cg", tol=1e-8)
            ended = time.perf_counter()
            difference = float((cross @ (exact.coefficients - found.coefficients)).abs().max())
            worst = max(worst, difference)
            figures[f"ridge {relative:g} of the mean diagonal"] = (
                f"predictions differ by {difference:.1e} at most; {found.iterations} products in "
                f"{ended - middle:.1f} s, Cholesky {middle - started:.1f} s"
            )
    return harness.Record(figures, {"predictions within 1e-5": worst < 1e-5})


def digits(rows: int) -> harness.Record:
    """Ridge regression of the ten one-hot targets with the trace kernel; the ridge chosen on a tenth held out."""
    (x, y), (x_test, y_test), model = images(rows), images(10000, test=True), network()
    with folder() as place:
        K = torch.from_numpy(kernel(place / "kernel.zarr", rows, 700)[:]) / OUTPUTS
    targets, part = one_hot(y), rows * 9 // 10
    scale, held_out = float(K.diagonal().mean()), {}
    for relative in (1e-5, 1e-4, 1e-3, 1e-2):
        solved = fw.ntk.solve(K[:part, :part], targets[:part], ridge=relative * scale, method="cholesky")
        guess = (K[part:, :part].double() @ solved.coefficients).argmax(1)
        held_out[relative] = 100 * float((guess == y[part:]).double().mean())
    best = max(held_out, key=lambda relative: held_out[relative])
    solved = fw.ntk.solve(K, targets, ridge=best * scale, method="cholesky")
    right = 0
    for begin in range(0, len(x_test), 2000):
        cross = fw.ntk.empirical_ntk(model, x_test[begin : begin + 2000], x, compute="trace").double() / OUTPUTS
        right += int(((cross @ solved.coefficients).argmax(1) == y_test[begin : begin + 2000]).sum())
    return harness.Record(
        {
            "training images": rows,
            "held out accuracy by ridge ÷ mean diagonal": ", ".join(f"{r:g}: {a:.1f} %" for r, a in held_out.items()),
            "ridge ÷ mean diagonal": best,
            "accuracy on the 10,000 test images (%)": round(100 * right / len(x_test), 2),
            "residual": solved.residual,
        },
        {},
    )


def sketch_error(kind: str, rows: int, seeds: int) -> harness.Record:
    """The error of the sketches' inner products against the exact kernel, over dim; the mean square over seeds."""
    (x, _), model = images(rows), network()
    exact = fw.ntk.empirical_ntk(model, x)
    dims, errors = [256, 512, 1024, 2048, 4096, 8192, 16384], []
    for dim in dims:
        squares = []
        for seed in range(seeds):
            features = fw.ntk.sketch(model, x, dim, kind=kind, seed=seed).flatten(0, 1)
            found = (features @ features.T).reshape(rows, OUTPUTS, rows, OUTPUTS).transpose(1, 2)
            squares.append(float((found - exact).norm() / exact.norm()) ** 2)
        errors.append((sum(squares) / seeds) ** 0.5)
    slope = float(np.polyfit(np.log(dims), np.log(errors), 1)[0])
    figures: dict[str, Any] = {
        f"relative error, dim {dim}": f"{each:.3g}" for dim, each in zip(dims, errors, strict=True)
    }
    figures |= {"seeds": seeds, "slope of log error over log dim": round(slope, 3)}
    return harness.Record(figures, {"falls as 1/√dim (slope within 0.1 of -0.5)": abs(slope + 0.5) < 0.1})


def sketch_cost(kind: str, rows: int, dim: int) -> harness.Record:
    """Time over N, 2 N, 4 N and 8 N rows; the median of three, in turn."""
    model, counts = network(), [rows, 2 * rows, 4 * rows, 8 * rows]
    calls = {str(count): functools.partial(fw.ntk.sketch, model, images(count)[0], dim, kind=kind) for count in counts}
    times = {int(name): sorted(each)[len(each) // 2] for name, each in harness.interleave(calls, 3, 0.0, 60.0).items()}
    slope = float(np.polyfit(np.log(counts), np.log([times[count] for count in counts]), 1)[0])
    figures: dict[str, Any] = {f"N = {count} (s)": round(seconds, 3) for count, seconds in times.items()}
    figures |= {"slope of log time over log N": round(slope, 3)}
    return harness.Record(figures, {"linear in N (slope at most 1.1)": slope <= 1.1})


if __name__ == "__main__":
    child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
