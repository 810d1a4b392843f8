"""The wheel, with and without a compiler: built, installed outside the checkout, and a kernel run from it."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import finite_width as fw

ROOT = Path(__file__).parent.parent

CHECK = """
import pathlib, torch, finite_width as fw
assert not pathlib.Path(fw.__file__).resolve().is_relative_to({checkout!r}), fw.__file__
from finite_width._gemm import gemm
a, b = torch.randn(40, 50, dtype=torch.float64), torch.randn(50, 60, dtype=torch.float64)
torch.testing.assert_close(gemm(a, b), a @ b)
print("kernels" if fw.has_kernels() else "reference")
"""


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """Run a command outside the checkout's import path; its output, or a failure that shows it."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("FINITE_WIDTH", "PYTHONPATH"))}
    plain["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{plain['PATH']}"  # for ninja, as the Makefile does
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**plain, **environment}, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the source distribution needs, without build products."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "python"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


def environment_beside(tmp_path: Path) -> Path:
    """A fresh environment that sees this one's packages (torch is large), but not this checkout."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    # addsitedir is not used on purpose: it would also read the .pth file of an editable install.
    (packages / "beside.pth").write_text("\n".join(p for p in site.getsitepackages()))
    return folder / "bin" / "python"


def build_and_install(source: Path, tmp_path: Path, *, isolation: bool, **environment: str) -> tuple[str, Path, str]:
    wheels = tmp_path / "wheels"
    flags = [] if isolation else ["--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", *flags, "-w", str(wheels), str(source)]
    log = run(command, tmp_path, **environment)
    (wheel,) = wheels.glob("finite_width-*.whl")
    python = environment_beside(tmp_path)
    target = next(python.parent.parent.glob("lib/python*/site-packages"))
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)], tmp_path)
    said = run([str(python), "-c", CHECK.format(checkout=str(ROOT))], tmp_path)
    return log, wheel, said


def test_wheel_with_the_compiled_module(tmp_path: Path) -> None:
    """From the checkout itself, where ninja has most objects already; --slow builds one from the sources alone."""
    cuda = "1" if fw.build_info().get("cuda_architectures") else "0"
    _, wheel, said = build_and_install(
        ROOT, tmp_path, isolation=False, FINITE_WIDTH_REQUIRE_EXT="1", FINITE_WIDTH_CUDA=cuda
    )
    assert "linux" in wheel.name or "macosx" in wheel.name
    assert said.strip() == "kernels"


def test_wheel_without_a_compiler(source: Path, tmp_path: Path) -> None:
    log, _, said = build_and_install(source, tmp_path, isolation=False, CXX="no-such-compiler")
    assert "the compiled module was not built" in log
    assert "same results, but slower" in log
    assert said.strip() == "reference"


def test_a_compiler_that_fails_is_an_error_where_the_module_is_required(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "wheels", str(source)]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("FINITE_WIDTH")}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**plain, "CXX": "no-such-compiler", "FINITE_WIDTH_REQUIRE_EXT": "1"},
        check=False,
    )
    assert done.returncode != 0
    assert "no C++ compiler found" in done.stdout + done.stderr


@pytest.mark.slow
def test_wheel_with_build_isolation(source: Path, tmp_path: Path) -> None:
    _, _, said = build_and_install(
        source, tmp_path, isolation=True, FINITE_WIDTH_REQUIRE_EXT="1", FINITE_WIDTH_CUDA="0"
    )
    assert said.strip() == "kernels"
