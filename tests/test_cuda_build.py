"""Every CUDA kernel compiles without spilling registers, where nvcc is; no GPU is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import finite_width as fw

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("csrc/**/*_cuda.cu"))
ARCHITECTURE = "90a"  # the build itself compiles for the others, and warns of their spills


def compile_verbosely(source: Path, target: Path) -> str:
    """What ptxas says of a source's kernels."""
    flags = ["-O3", "-std=c++20", "--fmad=false", "-Xptxas=-v", "-Xcompiler=-fPIC"]
    architecture = f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}"
    command = ["nvcc", *flags, architecture, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr


def test_no_kernel_spills_registers(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda source: compile_verbosely(source, tmp_path / f"{source.stem}.o"), SOURCES))
    for source, text in zip(SOURCES, said, strict=True):
        kernels = re.findall(r"Compiling entry function '(\w+)'", text)
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        assert kernels, source
        assert len(spills) >= len(kernels), source
        spilling = [pair for pair in spills if pair != ("0", "0")]
        assert not spilling, f"{source.name}: {len(spilling)} functions spill {spilling} bytes\n{text}"


def test_kernels_include_no_torch_and_no_other_cuda_headers() -> None:
    """A .cu file compiles in seconds only as long as it stays with these."""
    allowed = {
        "cuda_runtime.h",
        "cuda_bf16.h",
        "mma.h",
        "algorithm",
        "cmath",
        "cstdint",
        "cstring",
        "stdexcept",
        "string",
    }
    for source in (*SOURCES, ROOT / "csrc/common/launch.cuh"):
        assert set(re.findall(r"#include <([^>]+)>", source.read_text())) <= allowed, source


REGISTERED = """
import torch, finite_width as fw
has = torch._C._dispatch_has_kernel_for_dispatch_key
ops = ("bayes_sample", "path_sweep", "ntk_gram_accumulate", "tt_linear")
found = [has(f"finite_width::{name}", "CUDA") for name in ops]
print(found, fw.build_info()["cuda_kernels"])
"""


def test_untried_kernels_are_registered_only_where_asked_for() -> None:
    if not fw.has_kernels() or not fw.build_info()["cuda_architectures"]:
        pytest.skip("the compiled module was built without CUDA (FINITE_WIDTH_CUDA=1 builds it)")
    for asked in (False, True):
        environment = {key: value for key, value in os.environ.items() if key != "FINITE_WIDTH_UNTRIED_CUDA"}
        environment |= {"FINITE_WIDTH_UNTRIED_CUDA": "1"} if asked else {}
        said = subprocess.run([sys.executable, "-c", REGISTERED], env=environment, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        assert said.stdout.startswith(str([asked] * 4)), said.stdout
        assert ("registered by" in said.stdout) is asked
