"""`python -m finite_width`: the build info, and a small self-check of every op against its reference."""

from __future__ import annotations

import sys

from . import build_info
from ._selfcheck import self_check


def main() -> int:
    """Print the build info and the self-check; 1 if an op disagrees with its reference, else 0."""
    print("finite-width")
    for key, value in build_info().items():
        if isinstance(value, dict):
            print(f"  {key}:")
            for inner, entry in value.items():
                print(f"    {inner:22} {entry}")
        elif isinstance(value, list):
            print(f"  {key:24} {', '.join(map(str, value))}")
        else:
            print(f"  {key:24} {value}")
    print("self-check (largest relative difference between kernel and reference)")
    failed = False
    for op, difference, bound in self_check():
        failed |= not difference <= bound
        print(f"  {op:28} {difference:8.1e}   {'ok' if difference <= bound else f'WRONG: over {bound:g}'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
