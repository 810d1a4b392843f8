"""Builds csrc's CUDA kernels and their bindings with g++ for the processor: one library that torch.ops can load.

The kernels are registered for the CPU's tensors then, so that a process without the compiled module
(FINITE_WIDTH_DISABLE_EXT=1) runs the op battery on them: tests/test_cuda_on_host.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
TORCH_TARGET = "0x020b000000000000"


def build(folder: Path, sanitize: str = "") -> Path:
    """The library, in `folder`; compiled anew where a source is younger.

    Args:
        folder: for objects and the library.
        sanitize: for -fsanitize=, such as "address".
    """
    import torch
    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    kernels, bindings = sorted(ROOT.glob("csrc/**/*_cuda.cu")), sorted(ROOT.glob("csrc/**/bind_cuda.cpp"))
    include = [HERE, ROOT / "csrc", *cpp_extension.include_paths()]
    flags = ["-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-sign-compare"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    flags += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"] if sanitize else []
    own = [flag for path in include[:2] for flag in ("-I", str(path))]
    others = [flag for path in include[2:] for flag in ("-isystem", str(path))]
    newest_header = max(path.stat().st_mtime for path in (*ROOT.glob("csrc/**/*.*h"), *HERE.glob("*.h")))
    objects = []
    compiler = os.environ.get("CXX", "g++")
    for source in (*kernels, *bindings):
        target = folder / ("_".join(source.relative_to(ROOT).parts) + ".o")
        objects.append(str(target))
        if target.exists() and target.stat().st_mtime > max(source.stat().st_mtime, newest_header):
            continue
        _run([compiler, *flags, *own, *others, "-x", "c++", "-c", str(source), "-o", str(target)])
    library = folder / "cuda_on_host.so"
    lib = Path(torch.__file__).parent / "lib"
    link = ["-shared", f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}", "-o", str(library)]
    _run([compiler, *([f"-fsanitize={sanitize}"] if sanitize else []), *objects, *link])
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-5000:]}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), *sys.argv[2:]))
