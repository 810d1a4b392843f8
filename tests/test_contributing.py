"""The guide "add an op in six steps", followed to the letter in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from op_battery import OF_AN_INSTRUCTION_SET

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r'```\w+ title="(?P<file>[^ "]+)(?: \(after \'(?P<after>[^\n]+)\'\))?"\n(?P<text>.*?)```\n', re.DOTALL
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository without build products; of the kernels only what every op needs, so that it builds in seconds."""
    folder = tmp_path / "repository"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("python", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("csrc/common", "csrc/gemm"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("csrc/module.cpp", "setup.py", "pyproject.toml", "README.md", "LICENSE", ".clang-format"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def apply(page: str, folder: Path) -> list[str]:
    """Write the page's blocks into the folder; returns the files written anew."""
    created = []
    for block in BLOCK.finditer(page):
        file = folder / block["file"]
        if block["after"]:
            text = file.read_text()
            assert text.count(block["after"] + "\n") == 1, f"{block['file']} must have one line {block['after']!r}"
            file.write_text(text.replace(block["after"] + "\n", block["after"] + "\n" + block["text"]))
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block["text"])
            created.append(block["file"])
    return created


def run(folder: Path, *command: str, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FINITE_WIDTH_")}
    kept |= {"PYTHONPATH": str(folder / "python"), "FINITE_WIDTH_CUDA": "0", "FINITE_WIDTH_REQUIRE_EXT": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=kept | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_guide_makes_an_op_that_passes_its_battery(copy: Path) -> None:
    created = apply((ROOT / "docs" / "contributing.md").read_text(), copy)
    assert len(created) == 9
    run(copy, "setup.py", "build_ext", "--inplace")
    out = run(copy, "-m", "pytest", "tests/squareplus")
    assert re.search(r"10 passed", out), out
    out = run(copy, "-m", "pytest", "tests/squareplus", FINITE_WIDTH_ISA="generic")
    assert re.search(rf"{len(OF_AN_INSTRUCTION_SET)} passed", out), out
    run(copy, "-m", "pytest", "tests/squareplus", FINITE_WIDTH_DISABLE_EXT="1")
    assert "squareplus" in run(copy, "-m", "finite_width")
    run(copy, "-m", "pytest", "--doctest-modules", "python/finite_width/_squareplus")
    run(copy, "-m", "mypy")
    python = [file for file in created if file.endswith(".py")]
    run(copy, "-m", "ruff", "check", *python)
    run(copy, "-m", "ruff", "format", "--check", *python)
    formatter = Path(sys.executable).parent / "clang-format"
    if formatter.exists():
        sources = [file for file in created if file.endswith((".h", ".cpp"))]
        subprocess.run([formatter, "--dry-run", "-Werror", *sources], cwd=copy, check=True)
