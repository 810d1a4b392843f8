"""One small call of every op that has a CUDA kernel, for compute-sanitizer: tests/test_cuda_sanitizer.py."""

from __future__ import annotations

import torch

from finite_width import _library
from finite_width._selfcheck import EXAMPLES
from op_battery import moved


def main() -> None:
    torch.manual_seed(0)
    names = []
    for name, example in EXAMPLES.items():
        if _library.has_kernel(name, torch.device("cuda")):
            getattr(torch.ops.finite_width, name).default(*moved(example(), "cuda"))
            names.append(name)
    torch.cuda.synchronize()
    print("ran", *names)


if __name__ == "__main__":
    main()
