"""Streamed kernels: the same bits, resumed where a run stopped, and never harming what is there."""

from __future__ import annotations

import errno
import importlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import finite_width as fw
from ntk import stream_child

zarr = pytest.importorskip("zarr", reason="out= as a path needs zarr: pip install finite-width[scale]")

CHILD = Path(stream_child.__file__)
Problem = tuple[nn.Module, Tensor]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("finite_width.ntk.plan"), "BLOCK_ROWS", stream_child.TILE // 2)
    monkeypatch.setattr(importlib.import_module("finite_width.ntk.stream"), "TILE_ROWS", stream_child.TILE)


@pytest.fixture
def problem() -> Problem:
    return stream_child.problem()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("compute", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("columns", [None, 37, 90])
def test_same_bits_as_in_memory(problem: Problem, tmp_path: Path, compute: str, columns: int | None) -> None:
    model, x = problem
    other = None if columns is None else torch.randn(columns, 6)
    expected = fw.ntk.empirical_ntk(model, x, other, compute=compute).numpy()
    for budget in (100_000, 1_000_000):
        store = tmp_path / f"{budget}.zarr"
        found = fw.ntk.empirical_ntk(model, x, other, compute=compute, out=store, memory_budget=budget)
        assert isinstance(found, zarr.Array)
        assert found.chunks[0] <= stream_child.TILE
        np.testing.assert_array_equal(found[:], expected)
    plain = np.empty(expected.shape, np.float32)
    assert fw.ntk.empirical_ntk(model, x, other, compute=compute, out=plain) is plain
    np.testing.assert_array_equal(plain, expected)


def test_convolutions_and_loss_gram(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 40, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(21, 2, 7, 7), torch.randint(3, (21,))
    model(x)
    expected = fw.ntk.empirical_ntk(model, x)
    np.testing.assert_array_equal(fw.ntk.empirical_ntk(model, x, out=tmp_path / "conv.zarr")[:], expected.numpy())

    def loss(result: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(result, target, reduction="none")

    gram = fw.ntk.loss_gram(model, loss, x, y)
    np.testing.assert_array_equal(fw.ntk.loss_gram(model, loss, x, y, out=tmp_path / "loss.zarr")[:], gram.numpy())


def test_any_array_that_can_be_written(problem: Problem, tmp_path: Path) -> None:
    model, x = problem
    expected = fw.ntk.empirical_ntk(model, x, compute="trace")
    mapped = np.lib.format.open_memmap(tmp_path / "kernel.npy", "w+", np.float32, (83, 83))
    fw.ntk.empirical_ntk(model, x, compute="trace", out=mapped)
    np.testing.assert_array_equal(np.load(tmp_path / "kernel.npy"), expected.numpy())
    tensor = torch.empty(83, 83)
    assert fw.ntk.empirical_ntk(model, x, compute="trace", out=tensor) is tensor
    assert torch.equal(tensor, expected)
    own = zarr.create_array(store=str(tmp_path / "own.zarr"), shape=(83, 83), chunks=(10, 10), dtype="float32")
    fw.ntk.empirical_ntk(model, x, compute="trace", out=own)
    np.testing.assert_array_equal(own[:], expected.numpy())


def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The tiles that are computed from now on."""
    stream = importlib.import_module("finite_width.ntk.stream").Stream
    original, seen = stream._compute, []

    def noted(self: Any, job: Any, rows: Any) -> Any:
        seen.extend((row, job.column) for row in job.rows)
        return original(self, job, rows)

    monkeypatch.setattr(stream, "_compute", noted)
    return seen


def test_resume_computes_what_is_missing_or_damaged(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = problem
    store = tmp_path / "kernel.zarr"
    expected = fw.ntk.empirical_ntk(model, x, compute="trace", out=store)[:]
    before = snapshot(store)
    seen = computed(monkeypatch)
    fw.ntk.empirical_ntk(model, x, compute="trace", out=store)
    assert seen == []
    (store / "c" / "0" / "3").unlink()  # missing
    mirrored = store / "c" / "5" / "2"  # below the diagonal: tile (2, 5)
    mirrored.write_bytes(mirrored.read_bytes()[:100])  # cut short
    damaged = store / "c" / "4" / "4"
    content = bytearray(damaged.read_bytes())
    content[7] ^= 1
    damaged.write_bytes(bytes(content))
    (store / "c" / "6" / "6").write_bytes(b"")
    found = fw.ntk.empirical_ntk(model, x, compute="trace", out=store)
    assert sorted(seen) == [(0, 3), (2, 5), (4, 4), (6, 6)]
    np.testing.assert_array_equal(found[:], expected)
    assert snapshot(store) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [("weights", "weights"), ("x1", "x1"), ("compute", "compute"), ("dtype", "dtype"), ("model", "model")],
)
def test_a_store_of_another_kernel_is_refused(problem: Problem, tmp_path: Path, change: str, named: str) -> None:
    model, x = problem
    store = tmp_path / "kernel.zarr"
    fw.ntk.empirical_ntk(model, x, compute="trace", out=store)
    before, compute = snapshot(store), "trace"
    if change == "weights":
        with torch.no_grad():
            model[0].weight[0, 0] += 1
    elif change == "x1":
        x = x + 1
    elif change == "compute":
        compute = "full"
    elif change == "dtype":
        model, x = model.double(), x.double()
    else:
        model = nn.Sequential(model[0], nn.ReLU(), model[2])
    match = r"holds a kernel of shape" if change == "compute" else rf"holds a kernel that differs in: .*\b{named}\b"
    with pytest.raises(ValueError, match=match):
        fw.ntk.empirical_ntk(model, x, compute=compute, out=store)
    assert snapshot(store) == before


def test_bad_destinations_stay_as_they_are(problem: Problem, tmp_path: Path) -> None:
    model, x = problem

    def call(out: Any) -> None:
        fw.ntk.empirical_ntk(model, x, compute="trace", out=out)

    wrong = np.full((83, 82), 7.0, np.float32)
    with pytest.raises(ValueError, match=r"out must have shape \[83, 83\], got \[83, 82\]"):
        call(wrong)
    double = np.full((83, 83), 7.0)
    with pytest.raises(TypeError, match="out must have dtype float32, as the model's parameters, got float64"):
        call(double)
    locked = np.full((83, 83), 7.0, np.float32)
    locked.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        call(locked)
    for shape, dtype, error in (((83, 82), "float32", ValueError), ((83, 83), "float64", TypeError)):
        mine = zarr.create_array(str(tmp_path / f"mine-{dtype}.zarr"), shape=shape, dtype=dtype, fill_value=7)
        mine[:] = 7
        content = snapshot(tmp_path / f"mine-{dtype}.zarr")
        with pytest.raises(error, match="out must have"):
            call(mine)
        assert snapshot(tmp_path / f"mine-{dtype}.zarr") == content
    assert all((each == 7).all() for each in (wrong, double, locked))
    with pytest.raises(TypeError, match="out must be a path, a Zarr store or an array that can be written, got int"):
        call(5)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file, not a Zarr store; nothing was changed"):
        call(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="is a folder with other things in it; nothing was changed"):
        call(tmp_path / "folder")
    zarr.create_group(str(tmp_path / "group.zarr"))
    with pytest.raises(ValueError, match=r"is no Zarr array .*; nothing was changed"):
        call(tmp_path / "group.zarr")
    zarr.create_array(str(tmp_path / "own.zarr"), shape=(83, 83), dtype="float32")
    with pytest.raises(ValueError, match="is a Zarr array that empirical_ntk did not make; nothing was changed"):
        call(tmp_path / "own.zarr")
    with pytest.raises(ValueError, match="memory_budget must be at least"):
        fw.ntk.empirical_ntk(model, x, compute="trace", out=tmp_path / "new.zarr", memory_budget=1000)
    assert not (tmp_path / "new.zarr").exists()
    with pytest.raises(ValueError, match="method must be"):
        fw.ntk.empirical_ntk(model, x, compute="trace", out=tmp_path / "new.zarr", method="products")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "notes").read_text() == "mine"


def test_destinations_that_cannot_hold_a_kernel(problem: Problem, tmp_path: Path) -> None:
    model, x = problem
    with torch.inference_mode():
        inference = torch.empty(83, 83)
    for out, error, message in (
        (torch.empty(1, 83).expand(83, 83), ValueError, "out must have memory for every entry"),
        (torch.empty(83, 83, device="meta"), ValueError, "out must have memory, got a tensor on the device 'meta'"),
        (torch.zeros(83, 83).to_sparse(), TypeError, "out must be a dense tensor, got the layout torch.sparse_coo"),
        (inference, ValueError, "out was made in inference mode"),
        (
            zarr.storage.ZipStore(tmp_path / "kernel.zip", mode="w"),
            ValueError,
            "out '.*': a ZIP file is readable",
        ),
    ):
        with pytest.raises(error, match=message):
            fw.ntk.empirical_ntk(model, x, compute="trace", out=out)


def test_read_only_stores(problem: Problem, tmp_path: Path) -> None:
    model, x = problem
    fw.ntk.empirical_ntk(model, x[:20], compute="trace", out=tmp_path / "kernel.zarr")
    (tmp_path / "kernel.zarr" / "c" / "0" / "0").unlink()
    before = snapshot(tmp_path / "kernel.zarr")
    store = zarr.storage.LocalStore(tmp_path / "kernel.zarr", read_only=True)
    with pytest.raises(ValueError, match="is read-only; open it for writing"):
        fw.ntk.empirical_ntk(model, x[:20], compute="trace", out=store)
    with pytest.raises(ValueError, match="read-only"):
        fw.ntk.empirical_ntk(model, x[:20], compute="trace", out=zarr.open_array(store, mode="r"))
    assert snapshot(tmp_path / "kernel.zarr") == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_folder_without_permission(problem: Problem, tmp_path: Path) -> None:
    model, x = problem
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="cannot be written"):
            fw.ntk.empirical_ntk(model, x, compute="trace", out=tmp_path / "kernel.zarr")
    finally:
        tmp_path.chmod(0o700)


class SmallDisk(zarr.storage.LocalStore):
    """A store with room for so many pieces more."""

    room = 0

    async def set(self, key: str, value: Any) -> None:
        SmallDisk.room -= 1
        if SmallDisk.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        await super().set(key, value)


def test_full_disk_keeps_the_finished_tiles(problem: Problem, tmp_path: Path) -> None:
    model, x = problem
    store = tmp_path / "kernel.zarr"
    SmallDisk.room = 40
    with pytest.raises(OSError, match=r"No space left on device; finished tiles are kept \(\d+ of 66\)") as caught:
        fw.ntk.empirical_ntk(model, x, compute="trace", out=SmallDisk(store))
    assert caught.value.errno == errno.ENOSPC
    before = snapshot(store)
    assert len(before) > 30
    SmallDisk.room = 0
    with pytest.raises(OSError, match="No space left on device; finished tiles are kept"):
        fw.ntk.empirical_ntk(model, x, compute="trace", out=SmallDisk(store))
    assert snapshot(store) == before
    SmallDisk.room = 10**6
    found = fw.ntk.empirical_ntk(model, x, compute="trace", out=SmallDisk(store))
    np.testing.assert_array_equal(found[:], fw.ntk.empirical_ntk(model, x, compute="trace").numpy())
    assert {name: content for name, content in snapshot(store).items() if name in before} == before


def test_full_disk_from_the_start(problem: Problem, tmp_path: Path) -> None:
    model, x = problem
    SmallDisk.room = 0
    with pytest.raises(OSError, match=r"out '.*' cannot be made: No space left on device") as caught:
        fw.ntk.empirical_ntk(model, x, compute="trace", out=SmallDisk(tmp_path / "kernel.zarr"))
    assert caught.value.errno == errno.ENOSPC


def test_full_disk_under_a_plain_array(problem: Problem) -> None:
    model, x = problem

    class Full:
        shape, dtype = (83, 83), np.dtype(np.float32)

        def __setitem__(self, region: Any, values: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device; a part of it was written"):
        fw.ntk.empirical_ntk(model, x, compute="trace", out=Full())


def test_progress_counts_tiles(problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = problem
    fw.ntk.empirical_ntk(model, x, compute="trace", out=tmp_path / "kernel.zarr", progress=True)
    shown = capsys.readouterr().err
    assert "66/66" in shown
    assert "tile/s" in shown or "s/tile" in shown


def environment(**named: str) -> dict[str, str]:
    package = str(Path(fw.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", **named}


def tiles(logs: list[Path], word: str) -> Counter[str]:
    return Counter(line.split()[1] for log in logs for line in log.read_text().splitlines() if line.startswith(word))


def killed_and_resumed(problem: Problem, folder: Path, kills: int) -> None:
    """SIGKILL at random moments: in the end the same bits, and nothing computed twice but what was in flight."""
    store, log = folder / "kernel", folder / "log"
    model, x = problem
    generator, inflight = random.Random(1), 0
    for _ in range(kills):
        command = [sys.executable, str(CHILD), str(store), str(log)]
        with subprocess.Popen(command, env=environment(SLEEP="0.02"), stderr=subprocess.PIPE) as process:
            begun = tiles([Path(f"{log}.0")], "stored").total() if Path(f"{log}.0").exists() else 0
            wanted = begun + generator.randrange(1, 12)
            while process.poll() is None:
                if Path(f"{log}.0").exists() and tiles([Path(f"{log}.0")], "stored").total() >= wanted:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                time.sleep(0.01)
        inflight = tiles([Path(f"{log}.0")], "computing").total() - tiles([Path(f"{log}.0")], "stored").total()
    found = fw.ntk.empirical_ntk(model, x, compute="trace", out=f"{store}-trace.zarr", memory_budget=100_000)
    np.testing.assert_array_equal(found[:], fw.ntk.empirical_ntk(model, x, compute="trace").numpy())
    stored = tiles([Path(f"{log}.0")], "stored")
    # A tile may be written whole and the process end before the log says so, never the other way round.
    assert max(stored.values()) == 1
    held = max(Counter(tile.split(",")[1] for tile in stored).values())
    assert inflight <= kills * 2 * held  # one job being computed, one being written


def test_killed_and_resumed(problem: Problem, tmp_path: Path) -> None:
    killed_and_resumed(problem, tmp_path, 2)


@pytest.mark.slow
def test_killed_ten_times(problem: Problem, tmp_path: Path) -> None:
    killed_and_resumed(problem, tmp_path, 10)


def torchrun(ranks: int, *arguments: str, **named: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*command, str(CHILD), *arguments], env=environment(**named), capture_output=True, text=True, timeout=120
    )


def test_ranks_share_the_tiles(problem: Problem, tmp_path: Path) -> None:
    model, x = problem
    done = torchrun(3, str(tmp_path / "kernel"))
    assert done.returncode == 0, done.stderr
    for compute in ("trace", "full"):
        found = zarr.open_array(tmp_path / f"kernel-{compute}.zarr", mode="r")[:]
        np.testing.assert_array_equal(found, fw.ntk.empirical_ntk(model, x, compute=compute).numpy())


def test_a_rank_that_dies_ends_the_job(problem: Problem, tmp_path: Path) -> None:
    model, x = problem
    store, log = tmp_path / "kernel", tmp_path / "log"
    broken = torchrun(2, str(store), str(log), FAIL_RANK="1", SLEEP="0.01")
    assert broken.returncode != 0
    assert "exitcode  : 9" in broken.stderr
    before = tiles([Path(f"{log}.{rank}") for rank in range(2)], "stored")
    done = torchrun(2, str(store), str(log))
    assert done.returncode == 0, done.stderr
    logs = [Path(f"{log}.{rank}") for rank in range(2)]
    assert max(tiles(logs, "stored").values()) == 1
    assert 0 < before.total() < 66
    found = zarr.open_array(f"{store}-trace.zarr", mode="r")[:]
    np.testing.assert_array_equal(found, fw.ntk.empirical_ntk(model, x, compute="trace").numpy())


def test_shares_are_of_equal_cost() -> None:
    stream = importlib.import_module("finite_width.ntk.stream")
    model, x = nn.Linear(3, 2), torch.randn(400, 3)
    problem = importlib.import_module("finite_width.ntk.problem")
    given = problem.Problem(
        model,
        x,
        None,
        compute="trace",
        method="auto",
        params=None,
        output=None,
        memory_budget=None,
        progress=False,
        check=True,
    )
    grid = stream.Grid(given, given.plan())
    shares = stream.schedule(grid, grid.tiles(), 20, 4, 0.0)
    every = [(row, job.column) for share in shares for job in share for row in job.rows]
    assert sorted(every) == grid.tiles()
    costs = [sum(grid.pairs((row, job.column)) for job in share for row in job.rows) for share in shares]
    assert max(costs) < 1.15 * sum(costs) / 4
