"""The CUDA kernels' logic without a GPU: g++ compiles them against tests/cuda_on_host, and they pass the op battery.

Here no GPU runs them: what only one shows (memory model, occupancy, speed) is not tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finite_width as fw

ROOT = Path(__file__).parent.parent
ORDERS = ("forward", "backward", "shuffled")


@pytest.fixture(scope="session")
def library() -> Path:
    from cuda_on_host.build import build

    return build(ROOT / "build" / "cuda_on_host")


def run(library: Path | None, command: list[str], **environment: str) -> str:
    """A process of its own, with the emulated CUDA kernels (and nothing else compiled) where there is a library."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FINITE_WIDTH_")}
    if library is not None:
        kept |= {"FINITE_WIDTH_DISABLE_EXT": "1", "FINITE_WIDTH_UNTRIED_CUDA": "1"}
        kept["FINITE_WIDTH_CUDA_ON_HOST"] = str(library)
    done = subprocess.run(
        [sys.executable, *command], env={**kept, **environment}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


def run_tests(library: Path, *arguments: str, **environment: str) -> str:
    said = run(library, ["-m", "pytest", "-x", "-rs", "-p", "no:cacheprovider", *arguments], **environment)
    assert " passed" in said
    return said


# The wings that have CUDA kernels.
WINGS = sorted(path.parent.name for path in ROOT.glob("csrc/*/bind_cuda.cpp"))


@pytest.mark.parametrize("wing", WINGS)
def test_battery(library: Path, wing: str) -> None:
    """Kernel against reference and bad input, and what the wing's ops promise beyond the battery."""
    chosen = "not opcheck and not compile and not grad and not vmap and not jvp and not many"
    run_tests(library, "-k", chosen, f"tests/{wing}/test_ops.py")


def test_path_sgd_s_steps(library: Path) -> None:
    """Whole steps, among them the check that they read nothing on the host."""
    said = run_tests(library, "-k", "not resnet", "tests/pathsgd/test_device_step.py")
    assert "reads its state" not in said


@pytest.mark.slow
@pytest.mark.parametrize("wing", WINGS)
def test_whole_battery(library: Path, wing: str) -> None:
    for order in ORDERS:
        run_tests(library, f"tests/{wing}/test_ops.py", FINITE_WIDTH_HOST_ORDER=order)


@pytest.fixture(scope="session")
def values(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What tests/cuda_on_host/values.py computes: in each order of the threads, and with the CPU's kernels."""
    folder, found = tmp_path_factory.mktemp("values"), {}
    for name in (*ORDERS, "cpu"):
        target = folder / f"{name}.pt"
        command = ["tests/cuda_on_host/values.py", str(target)]
        run(None if name == "cpu" else library, command, FINITE_WIDTH_HOST_ORDER=name)
        found[name] = torch.load(target)
    return found


def test_no_order_of_the_threads_changes_a_bit(values: dict[str, dict[str, object]]) -> None:
    """A missing barrier, or one block that reads what another writes in the same launch, shows here."""
    for order in ORDERS[1:]:
        assert values[order].keys() == values["forward"].keys()
        for key, value in values["forward"].items():
            torch.testing.assert_close(values[order][key], value, rtol=0, atol=0, equal_nan=True, msg=f"{order}: {key}")


def test_same_noise_weights_and_gradients_as_on_the_cpu(values: dict[str, dict[str, object]]) -> None:
    """Bit for bit in float32; the KL and the path vectors are summed in another order."""
    if not fw.has_kernels():
        pytest.skip("the promise is the kernels'; the reference's functions round otherwise")
    for key, value in values["cpu"].items():
        if key.startswith(("ntk", "tt", "order")):
            continue  # no such promise; the wings' test_ops.py compare with float64
        exact = key.startswith("bayes") and not key.endswith("kl")
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-30}
        torch.testing.assert_close(values["forward"][key], value, **tolerance, equal_nan=True, msg=key)
