"""The one driver of all benchmarks.

python benchmarks/run.py --wing ntk [--case NAME] [--refcheck] [--peers] [--json FILE]
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch

import harness

# Each is a file beside this one with CASES: the matrix product, the four wings, large kernels, and growth with size.
WINGS = ("gemm", "ntk", "tt", "pathsgd", "bayes", "scale", "sweeps")
# Cases that run only where --case asks for them: the grid of Tensor-Train shapes takes ten minutes.
ON_REQUEST = "grid"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wing", choices=WINGS, required=True)
    parser.add_argument("--case", help='the case of this name; or those that contain it, or match it ("grid * B=1")')
    parser.add_argument("--refcheck", action="store_true", help="compare every implementation with float64")
    parser.add_argument("--peers", action="store_true", help="run the peers, too")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory runs (a fresh process each)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="where the cases put their tensors")
    parser.add_argument("--json", type=Path, help="write the rows and the machine's facts here")
    parser.add_argument("--add", action="store_true", help="keep the cases of that file that this run does not measure")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # the fresh process: one implementation of one case
    return parser.parse_args()


def memory_in_fresh_process(options: argparse.Namespace, case: str, implementation: str) -> int | None:
    """Peak bytes of one implementation, from a process of its own; None where it failed."""
    command = [sys.executable, __file__, "--wing", options.wing, "--case", case, "--memory-of", implementation]
    command += ["--threads", str(options.threads), "--device", options.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"memory of {implementation} on {case} not measured:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return int(done.stdout.split()[-1])


def is_wanted(name: str, asked: str | None, cases: Container[str]) -> bool:
    """Whether a case runs, given what --case asked for."""
    if asked is None:
        return not name.startswith(ON_REQUEST)
    if asked in cases:
        return name == asked
    return asked in name or fnmatch.fnmatchcase(name, asked)


def show(rows: list[dict[str, Any]], facts: dict[str, Any], case: harness.Case) -> None:
    rate = facts["product_rate_bfloat16_tflops"] * 1e12 if case.half else facts["product_rate_gflops"] * 1e9
    floor = max(case.flops / rate, case.bytes / (facts["copy_bandwidth_gb_per_s"] * 1e9))
    print(f"\n{case.name}: {case.what}" + (f"   floor {floor * 1e3:.3g} ms" if floor else ""))
    print(f"  {'implementation':38} {'ms':>10} {'±%':>5} {'ratio':>8} {'MB':>8} {'error':>9} {'of floor':>8}  aims")
    for row in rows:
        if "missing" in row:
            print(f"  {row['implementation']:38} {row['missing']}")
            continue
        if floor:
            row["floor_seconds"] = floor
        memory = f"{row['peak_bytes'] / 1e6:8.1f}" if row.get("peak_bytes") is not None else " " * 8
        error = f"{row['relative_error']:9.1e}" if "relative_error" in row else " " * 9
        share = f"{100 * floor / row['seconds']:7.0f}%" if floor else " " * 8
        aims = ", ".join(
            f"{t['measured']:.2f}× {t['against']} (aim {t['aim']:g}×{'' if t['measured'] >= t['aim'] else ', not met'})"
            for t in row["targets"]
        )
        print(
            f"  {row['implementation']:38} {row['seconds'] * 1e3:10.3f} {100 * row['spread']:5.1f} {row['ratio']:8.3f} "
            f"{memory} {error} {share}  {aims}"
        )


def show_run(row: dict[str, Any]) -> None:
    print(f"\n{row['case']}: {row['what']}")
    for name, value in row["figures"].items():
        print(f"  {name:50} {value}")
    for aim in row["aims"]:
        print(f"  {aim['aim']:50} {'met' if aim['met'] else 'not met'}")


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    harness.DEVICE = options.device
    if options.device != "cpu":
        if not torch.cuda.is_available():
            sys.exit(f"--device {options.device}: torch sees no CUDA device here")
        torch.set_default_device(options.device)
    cases = importlib.import_module(options.wing).CASES
    if options.memory_of:
        case = cases[options.case]()
        peers = {name: peer for name, peer in case.peers.items() if not isinstance(peer, str)}
        print(harness.peak_memory({**case.implementations, **peers}[options.memory_of]))
        return
    facts = harness.machine_facts()
    print("  ".join(f"{key}: {value}" for key, value in facts.items()))
    everything = []
    for name, build in cases.items():
        if not is_wanted(name, options.case, cases):
            continue
        case = build()
        if isinstance(case, harness.Run):
            everything.append(case.row())
            show_run(everything[-1])
            record(options, facts, everything, list(cases))
            continue
        rows = harness.measure(case, peers=options.peers, refcheck=options.refcheck)
        if case.memory and not options.no_memory and options.device == "cpu":  # on a GPU, measured already
            for row in rows:
                if "missing" not in row:
                    row["peak_bytes"] = memory_in_fresh_process(options, name, row["implementation"])
        show(rows, facts, case)
        everything += [{"what": case.what, **row} for row in rows]
        record(options, facts, everything, list(cases))
    if not everything:
        sys.exit(f"no case of {options.wing} is named or matched by {options.case!r}; there are: {', '.join(cases)}")
    if options.json:
        print(f"\nwritten to {options.json}")


def record(options: argparse.Namespace, facts: dict[str, Any], rows: list[dict[str, Any]], order: list[str]) -> None:
    """Write what was measured so far, so that a run that is stopped keeps it.

    Args:
        order: all cases of the wing: with --add, rows of earlier runs stand among the new ones in this order.
    """
    if not options.json:
        return
    options.json.parent.mkdir(parents=True, exist_ok=True)
    found = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(["python", *sys.argv]), "machine": facts}
    if options.add and options.json.exists():
        new = {row["case"] for row in rows}
        kept = [row for row in json.loads(options.json.read_text())["rows"] if row["case"] not in new]
        rows = sorted([*kept, *rows], key=lambda row: order.index(row["case"]))
        found["note"] = "Put together from several runs on one machine; command and rates are those of the last."
    options.json.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
