"""The CUDA kernels' logic without a GPU: g++ compiles them against tests/cuda_on_host, and they pass the op battery.

Here no GPU runs them: what only one shows (memory model, occupancy, speed) is not tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import finite_width as fw

ROOT = Path(__file__).parent.parent
ORDERS = ("forward", "backward", "shuffled")
pytestmark = pytest.mark.first


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
    """Kernel against reference and bad input, and what the wing's ops promise beyond the battery; the rest is slow."""
    chosen = "not opcheck and not compile and not grad and not vmap and not jvp and not many and not large"
    chosen += " and not (precisions and 1-cpu)"  # the other order of the halves: its gradients are in the battery
    run_tests(library, "-k", chosen, f"tests/{wing}/test_ops.py")


def test_path_sgd_s_steps(library: Path) -> None:
    """Whole steps, among them the check that they read nothing on the host; p = 2 and infinity and few layers here."""
    said = run_tests(
        library, "-k", "not resnet and not hundred and not 1.0 and not 3.0", "tests/pathsgd/test_device_step.py"
    )
    assert "reads its state" not in said


@pytest.mark.slow
def test_all_of_path_sgd_s_steps(library: Path) -> None:
    said = run_tests(library, "-k", "not resnet", "tests/pathsgd/test_device_step.py")
    assert "reads its state" not in said


@pytest.mark.slow
@pytest.mark.parametrize("wing", WINGS)
def test_whole_battery(library: Path, wing: str) -> None:
    for order in ORDERS:
        run_tests(library, f"tests/{wing}/test_ops.py", FINITE_WIDTH_HOST_ORDER=order)


Values = dict[str, object]


@pytest.fixture
def values(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Values]:
    """What tests/cuda_on_host/values.py computes in an order of the threads, or with the CPU's kernels ("cpu")."""
    # One folder for all processes of a run, so that none computes again what another has.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_on_host_values"
    folder.mkdir(exist_ok=True)

    def of(name: str) -> Values:
        target = folder / f"{name}.pt"
        with FileLock(folder / f"{name}.lock"):
            if not target.exists():
                partial = target.with_suffix(".partial")
                command = ["tests/cuda_on_host/values.py", str(partial)]
                run(None if name == "cpu" else library, command, FINITE_WIDTH_HOST_ORDER=name)
                partial.rename(target)
        found: Values = torch.load(target)
        return found

    return of


@pytest.mark.parametrize("order", ORDERS[1:])
def test_no_order_of_the_threads_changes_a_bit(values: Callable[[str], Values], order: str) -> None:
    """A missing barrier, or one block that reads what another writes in the same launch, shows here."""
    expected, found = values(ORDERS[0]), values(order)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, equal_nan=True, msg=key)


def test_same_noise_weights_and_gradients_as_on_the_cpu(values: Callable[[str], Values]) -> None:
    """Bit for bit in float32; the KL and the path vectors are summed in another order."""
    if not fw.has_kernels():
        pytest.skip("the promise is the kernels'; the reference's functions round otherwise")
    found = values("forward")
    for key, value in values("cpu").items():
        if key.startswith(("ntk", "tt", "order")):
            continue  # no such promise; the wings' test_ops.py compare with float64
        exact = key.startswith("bayes") and not key.endswith("kl")
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-30}
        torch.testing.assert_close(found[key], value, **tolerance, equal_nan=True, msg=key)
