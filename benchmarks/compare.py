"""Holds a benchmark's JSON against an earlier one: python benchmarks/compare.py OLD.json NEW.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def ratios(path: Path) -> dict[tuple[str, str], float]:
    """(case, implementation) -> time as a ratio to the case's baseline, so that two noisy machines compare."""
    rows = json.loads(path.read_text())["rows"]
    return {(row["case"], row["implementation"]): row["ratio"] for row in rows if "ratio" in row}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    old, new = (ratios(Path(name)) for name in sys.argv[1:])
    print(f"{'case':32} {'implementation':36} {'old':>8} {'new':>8} {'new/old':>8}   (ratios to the case's baseline)")
    for key in new:
        if key in old:
            print(f"{key[0]:32} {key[1]:36} {old[key]:8.3f} {new[key]:8.3f} {new[key] / old[key]:8.2f}")
        else:
            print(f"{key[0]:32} {key[1]:36} {'-':>8} {new[key]:8.3f}")
    for key in old.keys() - new.keys():
        print(f"{key[0]:32} {key[1]:36} {old[key]:8.3f} {'gone':>8}")


if __name__ == "__main__":
    main()
