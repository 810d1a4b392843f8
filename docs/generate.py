"""Writes the parts of the documentation that are made from recorded measurements.

    python docs/generate.py           everything below
    python docs/generate.py --check   says which committed page is not current, and fails; draws nothing

From benchmarks/results: docs/benchmarks.md, the tables of ratios in README.md, docs/ntk.md, docs/tt.md, docs/pathsgd.md
and docs/bayes.md; and, for the site alone, docs/benchmark_figures.md with docs/figures/. From docs/results: the tables
in docs/results.md, and the MNIST tables of docs/pathsgd.md and docs/bayes.md. In these pages the lines between
`<!-- name: ... -->` and `<!-- /name -->` are written here; all other text, and what it quotes from records, is typed.

Needs no torch, and matplotlib only for the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import known_results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, FIGURE_PAGE, FIGURES = (ROOT / "docs" / name for name in ("benchmarks.md", "benchmark_figures.md", "figures"))
OURS, BASE, PEER, FLOOR = "#e64a19", "#3949ab", "#9fa8da", "#222222"
TITLES = {
    "sweeps": "How time grows",
    "ntk": "NTK",
    "tt": "Tensor-Train layers",
    "pathsgd": "Path-SGD",
    "bayes": "Variational layers",
    "scale": "Large kernels, loss gradients",
    "gemm": "The shared matrix product",
}
# Where a record has more cases than this, its cases become rows of one table.
MANY_CASES = 20
# Cases that were made for their errors: they stand in no table of times.
ACCURACY_CASES = {"one step", "accuracy 1024"}
# Which of this library's implementations does the same as another's, where it is not the case's first one.
LIKE_WITH_LIKE = {"local, plain torch": "finite-width local", "bayesian-torch Flipout": "finite-width flipout"}
# Implementations whose names do not fit behind "as fast as".
OTHER_WORDS = {"as usually written": "the usual form"}
INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2", "generic": "plain x86-64"}
# No alternative to a step, but what comes before it: the step takes a share of its time.
SHARE_OF = {"forward + backward"}

# How the benchmark page begins.
PREAMBLE = """\
This page is made by `python docs/generate.py` from `benchmarks/results/*.json`, which `benchmarks/run.py` writes. Times
are medians of interleaved runs, in which every implementation runs once a round in random order; ± is half the distance
between the quartiles. Memory is the peak beyond what the process held before, measured in a fresh process for each
implementation. The error is relative (Frobenius), against float64.

In records from 2026-11-30 on, a call shorter than 0.1 s runs twice in a row, and the second run counts, as in a
training loop. The first pays for its neighbour in the round: it loads code and data again, unless the neighbour shares
them, and gives back to the system what the neighbour freed. For a call of a few milliseconds that was up to half of
the time.

The floor is an estimate of the least time: the larger of the least operations over the machine's best measured
matrix-product rate, and the least bytes over its measured copy bandwidth. An implementation can be faster than its
floor in two cases. A convolution in Winograd's form needs fewer operations than are counted. And a copy also reads the
memory that it overwrites, which the measured bandwidth does not count; an update in place, such as an optimizer's step,
has read that memory anyway.

An aim is a ratio that was set before the code was written, from measurements on a machine with AVX-512. All aims are
shown, met or not. Tables of figures without implementations are runs that are too long to repeat, made once.

Read ratios rather than times: every time depends on the machine, and every machine was used with two cores. All of it
is CPU; no GPU has run the CUDA kernels yet. The site that `make docs` builds also has figures of these tables."""

Row = dict[str, Any]


def records(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """File name without suffix -> what benchmarks/run.py wrote, the wings in the order of TITLES."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    rank = list(TITLES)
    wing = {name: next((w for w in rank if name.startswith(w)), "") for name in found}
    order = sorted(found, key=lambda name: (rank.index(wing[name]) if wing[name] else len(rank), name))
    return {name: found[name] for name in order}


def title(name: str, part: bool = True) -> str:
    """The wing of a record and, where it has several records, which part of them this is."""
    wing = next((wing for wing in TITLES if name.startswith(wing)), None)
    if wing and not part:
        return TITLES[wing]
    rest = name.removeprefix(wing or "").strip("_- ").replace("_", " ")
    return (TITLES[wing] + (f" ({rest})" if rest else "")) if wing else name


def is_ours(implementation: str) -> bool:
    return implementation.startswith("finite-width")


def cases(record: dict[str, Any]) -> dict[str, list[Row]]:
    """Case name -> its rows, in the order in which they were measured."""
    by_case: dict[str, list[Row]] = defaultdict(list)
    for row in record["rows"]:
        by_case[row["case"]].append(row)
    for rows in by_case.values():
        # A record that does not name its baseline: the row whose time all ratios are to.
        base = next((row["implementation"] for row in rows if row.get("ratio") == 1), "")
        for row in rows:
            row.setdefault("baseline", base)
    return by_case


def duration(seconds: float) -> str:
    """1.23 s, 45.6 ms or 7.89 µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e6:.2g} µs"


def aims(row: Row) -> str:
    """The outcome of each figure that was aimed at: measured, met or not."""
    found = []
    for aim in row.get("targets", []):
        met = "met" if aim["measured"] >= aim["aim"] else "**not met**"
        if aim["against"] in SHARE_OF:
            found.append(f"{share(aim['measured'])} of {aim['against']} (aimed at: at most {share(aim['aim'])}; {met})")
            continue
        other = "" if is_counterpart(row["implementation"], aim["against"]) else "another estimator, "
        found.append(f"{aim['measured']:.2f}× {aim['against']} ({other}aimed at {aim['aim']:g}×: {met})")
    return "; ".join(found)


def share(ratio: float) -> str:
    """The part that 1 is of a ratio, such as 5.8 % for 17.3."""
    return f"{100 / ratio:.1f} %"


def is_counterpart(ours: str, other: str) -> bool:
    """Whether two implementations do the same: like with like."""
    return LIKE_WITH_LIKE.get(other, ours) == ours


def run_table(row: Row) -> list[str]:
    """A run that was made once: its figures, and what was aimed at."""
    lines = ["| figure | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in row["figures"].items())]
    return lines + [f"| {aim['aim']} | {'met' if aim['met'] else '**not met**'} |" for aim in row["aims"]]


def case_table(rows: list[Row]) -> list[str]:
    """One case as a Markdown table."""
    if "figures" in rows[0]:
        return run_table(rows[0])
    if rows[0]["case"] in ACCURACY_CASES and any("relative_error" in row for row in rows):
        errors = [
            f"| {row['implementation']} | {row['relative_error']:.1e} |" for row in rows if "relative_error" in row
        ]
        return ["| implementation | relative error |", "| --- | ---: |", *errors]
    measured = [row for row in rows if "missing" not in row]
    memory = any(row.get("peak_bytes") is not None for row in measured)
    error = any("relative_error" in row for row in measured)
    floor = any("floor_seconds" in row for row in measured)
    head = ["implementation", "time", "± %", "time ÷ baseline"]
    head += ["peak MB"] * memory + ["relative error"] * error + ["floor ÷ time"] * floor + ["aims"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 2) + " --- |"]
    for row in sorted(measured, key=lambda row: row["seconds"]):
        name = f"**{row['implementation']}**" if is_ours(row["implementation"]) else row["implementation"]
        cells = [name + (" (baseline)" if row["implementation"] == row["baseline"] else "")]
        cells += [duration(row["seconds"]), f"{100 * row['spread']:.1f}", f"{row['ratio']:.3g}"]
        if memory:
            cells.append(f"{row['peak_bytes'] / 1e6:.1f}" if row.get("peak_bytes") is not None else "–")
        if error:
            cells.append(f"{row['relative_error']:.1e}" if "relative_error" in row else "–")
        if floor:
            cells.append(f"{100 * row['floor_seconds'] / row['seconds']:.0f} %" if "floor_seconds" in row else "–")
        lines.append("| " + " | ".join([*cells, aims(row)]) + " |")
    for row in rows:
        if "missing" in row:
            lines.append(f"| {row['implementation']} | not measured: {row['missing']} |" + " |" * (len(head) - 2))
    return lines


def plot_case_bars(name: str, record: dict[str, Any], quantity: str) -> str | None:
    """Bars of time or memory, a panel for each case; the file's name, or None where there is nothing to show."""
    import matplotlib.pyplot as plt

    shown = {
        case: [row for row in rows if row.get(quantity)]
        for case, rows in cases(record).items()
        if case not in ACCURACY_CASES and sum(bool(row.get(quantity)) for row in rows) > 1
    }
    if not shown:
        return None
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    tallest = max(len(rows) for rows in shown.values())
    size = (4.6 * columns, lines * (0.9 + 0.27 * tallest))
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    scale, unit = (1e3, "ms") if quantity == "seconds" else (1e-6, "MB")
    for axis, (case, rows) in zip(axes.flat, shown.items(), strict=False):
        rows = sorted(rows, key=lambda row: row[quantity], reverse=True)
        names = [row["implementation"] for row in rows]
        values = [row[quantity] * scale for row in rows]
        baseline = rows[0]["baseline"]
        colors = [OURS if is_ours(each) else BASE if each == baseline else PEER for each in names]
        axis.barh(range(len(rows)), values, color=colors, height=0.72)
        low = min(values)
        if quantity == "seconds" and "floor_seconds" in rows[0]:
            floor = rows[0]["floor_seconds"] * scale
            axis.axvline(floor, color=FLOOR, lw=1, ls="--")
            low = min(low, floor)
        axis.set_xscale("log")
        axis.set_xlim(low / 1.8, max(values) * 2.6)
        for place, value in enumerate(values):
            axis.text(value * 1.06, place, f"{value:.3g}", va="center", fontsize=7)
        axis.set_yticks(range(len(rows)), [short(each) for each in names], fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.xaxis.set_minor_formatter("")
        axis.set_title(f"{case} ({unit})", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    file = f"{name}-{'time' if quantity == 'seconds' else 'memory'}.svg"
    figure.savefig(FIGURES / file)
    plt.close(figure)
    return file


def ours_of(rows: list[Row]) -> Row | None:
    """This library's row of a case: the plain one, or the first of several variants."""
    mine = [row for row in rows if "seconds" in row and is_ours(row["implementation"])]
    return next((row for row in mine if row["implementation"] == "finite-width"), mine[0] if mine else None)


def many_cases_table(record: dict[str, Any]) -> list[str]:
    """A line for each case, a column for each implementation: times, and this library's against the best other.

    Where a case has aims, the best other is the fastest of those that were aimed at.
    """
    by_case = cases(record)
    names = list(dict.fromkeys(row["implementation"] for rows in by_case.values() for row in rows))
    lines = ["| case | " + " | ".join(names) + " | best other ÷ ours |", "| --- |" + " ---: |" * (len(names) + 1)]
    for case, rows in by_case.items():
        if case in ACCURACY_CASES:
            continue
        seconds = {row["implementation"]: row["seconds"] for row in rows if "seconds" in row}
        ours = ours_of(rows)
        aimed = {aim["against"] for aim in ours.get("targets", [])} if ours else set()
        others = [value for name, value in seconds.items() if (name in aimed if aimed else not is_ours(name))]
        if SHARE_OF & seconds.keys():
            others = []
        ratio = f"{min(others) / ours['seconds']:.2f}" if ours and others else "–"
        cells = [duration(seconds[name]) if name in seconds else "–" for name in names]
        lines.append("| " + " | ".join([case, *cells, ratio]) + " |")
    return lines


def aims_met(record: dict[str, Any]) -> str:
    """In how many of many cases every aim was met, and the cases that miss one most."""
    worst = {}
    for case, rows in cases(record).items():
        aims = [aim for row in rows for aim in row.get("targets", [])]
        if aims:
            worst[case] = min(aim["measured"] / aim["aim"] for aim in aims)
    missed = sorted((share, case) for case, share in worst.items() if share < 1)
    text = f"All aims were met in {len(worst) - len(missed)} of {len(worst)} cases"
    return text + "".join(f"; {case} reached {share:.2f} of its aim" for share, case in missed) + "."


def plot_many_ratios(name: str, record: dict[str, Any]) -> str | None:
    """A dot for each case and other implementation: its time over this library's, against this library's time."""
    import matplotlib.pyplot as plt

    dots: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for rows in cases(record).values():
        ours = ours_of(rows)
        for row in rows:
            if ours and "seconds" in row and not is_ours(row["implementation"]):
                dots[row["implementation"]].append((ours["seconds"] * 1e3, row["seconds"] / ours["seconds"]))
    if not dots:
        return None
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for each, points in dots.items():
        axis.plot(*zip(*points, strict=True), "o", ms=4, alpha=0.7, label=short(each))
    axis.axhline(1, color=FLOOR, lw=1, ls="--")
    axis.set(xscale="log", yscale="log", xlabel="this library's time, ms", ylabel="other's time ÷ this library's")
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURES / f"{name}-ratios.svg")
    plt.close(figure)
    return f"{name}-ratios.svg"


def short(text: str, length: int = 34) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


SERIES = re.compile(r"^(?P<head>.*?)\b(?P<variable>[A-Za-z]\w*)\s?=\s?(?P<value>\d+)(?P<tail>.*)$")


def plot_series(name: str, record: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Time against a size, for cases whose names differ in one "B=64" alone; (title, file) for each."""
    import matplotlib.pyplot as plt

    groups: dict[tuple[str, str, str], dict[int, list[Row]]] = defaultdict(dict)
    for case, rows in cases(record).items():
        if match := SERIES.match(case):
            key = (match["head"].strip(" ,"), match["variable"], match["tail"].strip(" ,"))
            groups[key][int(match["value"])] = rows
    files: list[tuple[str, str | None]] = []
    for (head, variable, tail), by_size in groups.items():
        if len(by_size) < 3:
            continue
        figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
        curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for size in sorted(by_size):
            for row in by_size[size]:
                if "seconds" in row:
                    curves[row["implementation"]].append((size, row["seconds"] * 1e3))
            floor = next((row["floor_seconds"] for row in by_size[size] if "floor_seconds" in row), None)
            if floor:
                curves["floor"].append((size, floor * 1e3))
        for each, points in curves.items():
            style = {"color": FLOOR, "ls": "--", "lw": 1} if each == "floor" else {"marker": "o", "ms": 3.5}
            if is_ours(each):
                style |= {"color": OURS, "lw": 2.4, "zorder": 5}
            axis.plot(*zip(*points, strict=True), label=short(each), **style)
        axis.set(xscale="log", yscale="log", xlabel=variable, ylabel="ms", title=" ".join(filter(None, (head, tail))))
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        slug = re.sub(r"\W+", "-", f"{name}-{head}-{variable}-{tail}").strip("-").lower()
        figure.savefig(FIGURES / f"{slug}.svg")
        plt.close(figure)
        files.append((f"{title(name)}, {' '.join(filter(None, (head, tail)))}: time against {variable}", f"{slug}.svg"))
    return files


def draw_figures() -> None:
    """docs/figures/*.svg, and the page of the site that shows them."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "finite-width", "svg.fonttype": "none", "font.family": "sans-serif"}
    FIGURES.mkdir(exist_ok=True)
    for old in FIGURES.glob("*.svg"):
        old.unlink()
    lines = [
        "# Benchmarks in figures",
        "",
        "Drawn from the records of the [benchmark page](benchmarks.md), which says how they were measured. Orange:",
        "this library; blue: the baseline; pale: the others; dashed: the floor. Axes are logarithmic.",
    ]
    for name, record in records().items():
        drawn = plot_series(name, record)
        if len(cases(record)) > MANY_CASES:
            drawn.append(("Speed of every case against its baseline", plot_many_ratios(name, record)))
        else:
            drawn.append(("Time of every case", plot_case_bars(name, record, "seconds")))
            drawn.append(("Peak memory of every case", plot_case_bars(name, record, "peak_bytes")))
        images = [f"![{caption}](figures/{file})" for caption, file in drawn if file]
        if images:
            lines += ["", f"## {title(name)}"]
            lines += [line for image in images for line in ("", image)]
    FIGURE_PAGE.write_text("\n".join(lines) + "\n")


def benchmark_page() -> str:
    """docs/benchmarks.md."""
    lines = ["# Benchmarks", "", PREAMBLE]
    found = records()
    if not found:
        lines += ["", "No results are recorded yet: `make bench` writes them."]
    for name, record in found.items():
        facts = record["machine"]
        lines += ["", f"## {title(name)}", "", f"`{record['command']}`, {record['date']}.", ""]
        lines.append(", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in facts.items()) + ".")
        if "note" in record:
            lines += ["", str(record["note"])]
        if len(cases(record)) > MANY_CASES:
            if any(row.get("targets") for row in record["rows"]):
                lines += ["", aims_met(record)]
            lines += folded("Every case", many_cases_table(record))
            continue
        for case, rows in cases(record).items():
            lines += ["", f"### {title(name)}: {case}", "", rows[0].get("what", ""), "", *case_table(rows)]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        lines += other_machine(folder)
    return "\n".join(lines) + "\n"


def folded(summary: str, lines: list[str]) -> list[str]:
    """Lines that a reader opens by a click."""
    return ["", '<details markdown="1">', f"<summary>{summary}</summary>", "", *lines, "", "</details>"]


def other_machine(folder: Path) -> list[str]:
    """The records of another machine, made with the library as it was then: a table for each."""
    lines = ["", f"## On another machine: {folder.name}", ""]
    lines.append("Records of the library as it was on their day, from a processor of another generation.")
    for name, record in records(folder).items():
        facts = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in record["machine"].items())
        note = ["", str(record["note"])] if "note" in record else []
        table = [f"{facts}.", *note, "", *many_cases_table(record)]
        lines += folded(f"{title(name)}, {record['date']}", table)
    return lines


def ratio_table(wing: str | None = None) -> list[str]:
    """What each case was compared with, and the best other: of one wing, or of all; then where each was measured.

    Records of many cases (the shared matrix product, growth with size) are on the benchmark page alone.
    """
    lines = [
        "| case | this library is | best other: its time ÷ ours | peak MB, ours / baseline | floor ÷ time |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    where, over = [], False
    for name, record in records().items():
        if len(cases(record)) > MANY_CASES or (wing is not None and not name.startswith(wing)):
            continue
        before = len(lines)
        for case, rows in cases(record).items():
            ours = ours_of(rows)
            others = [row for row in rows if "seconds" in row and not is_ours(row["implementation"])]
            if not ours or not others or case in ACCURACY_CASES:
                continue
            alternatives = [row for row in others if row["implementation"] not in SHARE_OF]
            best = min(alternatives, key=lambda row: row["seconds"], default=None)
            base = next((row for row in others if row["implementation"] == ours["baseline"]), None)
            memory = base and base.get("peak_bytes") and ours.get("peak_bytes")
            what = f"**{case}**: {rows[0].get('what', '')}".replace("|", "\\|")
            cells = [what if wing else f"{title(name, part=False)} {what}", "; ".join(comparisons(rows, ours))]
            cells.append(f"{best['seconds'] / ours['seconds']:.2f} ({best['implementation']})" if best else "–")
            cells.append(f"{ours['peak_bytes'] / 1e6:.0f} / {base['peak_bytes'] / 1e6:.0f}" if base and memory else "–")
            floor = ours.get("floor_seconds")
            over = over or bool(floor and floor > ours["seconds"])
            cells.append(f"{100 * floor / ours['seconds']:.0f} %" if floor else "–")
            lines.append("| " + " | ".join(cells) + " |")
        if len(lines) > before:
            where.append(circumstances(name, record))
    if not where:
        return ["No results are recorded yet: `make bench` writes them under `benchmarks/results/`."]
    if over:
        lines += [
            "",
            "Floor ÷ time can pass 100 %: the copy bandwidth does not count that a copy reads what it overwrites.",
        ]
    return [*lines, "", "Measured on:", "", *where]


def circumstances(name: str, record: dict[str, Any]) -> str:
    """When and on what a record was made, and what its note says, as an item of a list."""
    machine = record["machine"]
    facts = [
        record["date"],
        f"{machine['processor']} ({INSTRUCTION_SETS[machine['isa']]}), {machine['threads']} threads",
        f"matrix products at {machine['product_rate_gflops']:.0f} GFLOP/s",
        f"copies at {machine['copy_bandwidth_gb_per_s']:.0f} GB/s",
    ]
    note = f" {record['note']}" if "note" in record else ""
    return f"- {title(name)}: {', '.join(facts)}.{note}"


def comparisons(rows: list[Row], ours: Row) -> list[str]:
    """Each implementation that was aimed at (else the baseline) against the one of ours that does the same.

    Aims that were missed come first, those missed most before the others.
    """
    named = {aim["against"] for aim in ours.get("targets", [])} or {ours["baseline"]}
    mine = {row["implementation"]: row for row in rows if "seconds" in row and is_ours(row["implementation"])}
    found = []
    for row in rows:
        name = row["implementation"]
        if name not in named or "seconds" not in row:
            continue
        like = mine.get(LIKE_WITH_LIKE.get(name, ours["implementation"]), ours)
        aim = next((aim["aim"] for aim in like.get("targets", []) if aim["against"] == name), None)
        ratio = row["seconds"] / like["seconds"]
        found.append((ratio / aim if aim else 1.0, row["seconds"], against(row, like, aim, like is not ours)))
    return [text for *_, text in sorted(found, key=lambda entry: (entry[0] >= 1, min(entry[0], 1), entry[1]))]


def against(other: Row, ours: Row, aim: float | None, named: bool) -> str:
    """ "3.2× as fast as X", below 1 where this library is slower; with the aim, and whether it was met."""
    ratio, name = other["seconds"] / ours["seconds"], other["implementation"]
    missed = ", not met" if aim is not None and ratio < aim else ""
    if name in SHARE_OF:
        goal = f" (aim: at most {share(aim)}{missed})" if aim is not None else ""
        return f"a step takes {share(ratio)} of {name}{goal}"
    goal = f" (aim {aim:.3g}×{missed})" if aim is not None else ""
    who = f"{ours['implementation']}: " if named else ""
    return f"{who}{ratio:.3g}× as fast as {OTHER_WORDS.get(name, name)}{goal}"


def between_markers(file: Path, text: str, name: str, lines: list[str]) -> str:
    """The file's text with the lines between `<!-- name: ... -->` and `<!-- /name -->` replaced."""
    pattern = re.compile(rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{file} must have one <!-- {name}: ... --> and one <!-- /{name} -->")
    return pattern.sub(lambda match: match[1] + "\n" + "\n".join(lines) + "\n\n" + match[2], text)


def generated_tables() -> dict[Path, str]:
    """File -> its text, made anew: the benchmark page, and the pages with generated tables."""
    docs = ROOT / "docs"
    tables = [
        (ROOT / "README.md", "ratios", ratio_table()),
        (docs / "results.md", "known results", known_results.tables()),
        *((docs / f"{wing}.md", "ratios", ratio_table(wing)) for wing in ("ntk", "tt", "pathsgd", "bayes")),
        (docs / "bayes.md", "mnist", known_results.variational_mnist()),
        (docs / "pathsgd.md", "mnist", known_results.path_sgd_mnist()),
    ]
    texts: dict[Path, str] = {PAGE: benchmark_page()}
    for file, name, lines in tables:
        texts[file] = between_markers(file, texts.get(file) or file.read_text(), name, lines)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is not current")
    options = parser.parse_args()
    tables = generated_tables()
    stale = [
        str(file.relative_to(ROOT)) for file, text in tables.items() if not file.exists() or file.read_text() != text
    ]
    if options.check:
        if stale:
            sys.exit(f"not current, run python docs/generate.py: {', '.join(stale)}")
        return
    for file, text in tables.items():
        file.write_text(text)
    draw_figures()
    print(f"written: {', '.join(str(file.relative_to(ROOT)) for file in (*tables, FIGURE_PAGE))}")


if __name__ == "__main__":
    main()
