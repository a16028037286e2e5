"""How the benchmarks show what harness.py has measured: as a table, as JSON, as a picture."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness import Result, Row

SCHEMA = 1


def seconds_text(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def bytes_text(count: int) -> str:
    for scale, unit in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} bytes"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _ratio_text(row: Row) -> str:
    return f"{_number(row.ratio.median)} [{_number(row.ratio.low)}, {_number(row.ratio.high)}]"


def _target_cells(row: Row) -> tuple[str, str]:
    said = {True: "yes", False: "NO", None: "-"}
    targets, met = [], []
    for verdict in row.verdicts:
        targets.append(f"{verdict.text} ({_number(verdict.measured)})")
        met.append(said[verdict.met])
    return "\n".join(targets), "\n".join(met)


def _heading(result: Result) -> str:
    group = result.group
    data = bytes_text(group.data_bytes) if group.data_bytes else ""
    if group.entries > 1:
        data += f" x {group.entries} in turn"
    facts = [
        f"{key} {value if isinstance(value, (str, int)) else f'{value:.2g}'}"
        for key, value in result.facts.items()
    ]
    disturbed = ""
    if result.disturbed:
        disturbed = f"DISTURBED by other programs (they used {result.others:.1f} CPUs)"
    return "; ".join(x for x in (group.name, data, *facts, group.note, disturbed) if x)


def print_table(results: Sequence[Result], file: Any = None) -> None:
    """With rich where it is installed, else plain text of the same columns."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _print_plain(results, file)
        return
    console = Console(file=file)
    if not console.is_terminal:
        console = Console(file=file, width=140)  # a pipe has no width to keep to
    for result in results:
        console.print(Text(_heading(result), style="bold"))
        table = Table(box=None, padding=(0, 3, 0, 0))
        table.add_column("what", min_width=40)
        for name in ("time", f"{result.group.unit_label} [quartiles]"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("target (measured)")
        table.add_column("met", no_wrap=True)
        for row in result.rows:
            target, met = _target_cells(row)
            style = "bold" if row.ours else ""
            verdict = Text(met, style="red" if "NO" in met else "green")
            cells = (row.what, seconds_text(row.time.median), _ratio_text(row), target)
            table.add_row(*(Text(cell, style=style) for cell in cells), verdict)
        console.print(table)
        console.print()


def _print_plain(results: Sequence[Result], file: Any = None) -> None:
    for result in results:
        print(_heading(result), file=file)
        header = ("what", "time", result.group.unit_label, "target (measured)", "met")
        lines = [header]
        for row in result.rows:
            target, met = (cell.replace("\n", ", ") for cell in _target_cells(row))
            lines.append((row.what, seconds_text(row.time.median), _ratio_text(row), target, met))
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        for line in lines:
            cells = zip(line, widths, strict=True)
            print("  " + "  ".join(cell.ljust(width) for cell, width in cells).rstrip(), file=file)
        print(file=file)


def to_json(
    name: str, results: Sequence[Result], options: argparse.Namespace, machine: dict[str, Any]
) -> dict[str, Any]:
    """Everything that the table shows, in seconds and ratios, and what is needed to judge it."""
    return {
        "schema": SCHEMA,
        "bench": name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "quick": options.quick,
        "rounds": options.rounds,
        "groups": [
            {
                "name": result.group.name,
                "unit": result.group.unit,
                "unit_label": result.group.unit_label,
                "data_bytes": result.group.data_bytes,
                "entries": result.group.entries,
                "note": result.group.note,
                "facts": result.facts,
                "cpus_used_by_others": result.others,
                "disturbed": result.disturbed,
                "rows": [
                    {
                        "what": row.what,
                        "ours": row.ours,
                        "seconds": row.time.as_dict(),
                        "ratio": row.ratio.as_dict(),
                        "samples": row.samples,
                        "calls_per_sample": row.calls_per_sample,
                        "targets": [vars(verdict) for verdict in row.verdicts],
                    }
                    for row in result.rows
                ],
            }
            for result in results
        ],
    }


def plot(name: str, results: Sequence[Result], path: Path, subtitle: str) -> None:
    """Ratios as bars on one logarithmic axis a group, quartiles as whiskers, targets in units as black marks."""
    from matplotlib.figure import Figure

    heights = [len(result.rows) + 1.6 for result in results]
    figure = Figure(figsize=(10, 0.9 + 0.27 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, result in zip(axes, results, strict=True):
        rows = result.rows
        values = [row.ratio.median for row in rows]
        whiskers = [
            [row.ratio.median - row.ratio.low for row in rows],
            [row.ratio.high - row.ratio.median for row in rows],
        ]
        colours = ["#0072B2" if row.ours else "#B4BCC4" for row in rows]
        floor = min(0.5, min(values) / 2)
        axis.barh(
            range(len(rows)),
            [value - floor for value in values],
            left=floor,
            xerr=whiskers,
            color=colours,
            height=0.68,
            error_kw={"elinewidth": 0.8, "ecolor": "#555555"},
        )
        for i, row in enumerate(rows):
            targets = result.group.variants[i].targets
            limits = [t.limit for t in targets if not t.than and not t.faster]
            for limit in limits:
                axis.plot([limit] * 2, [i - 0.45, i + 0.45], color="black", lw=1.6)
            text = f"{_number(row.ratio.median)}   {seconds_text(row.time.median)}"
            axis.annotate(
                text,
                (max(row.ratio.high, *limits, 0), i),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
        axis.set_xscale("log")
        axis.set_xlim(floor, max(row.ratio.high for row in rows) * 6)
        axis.axvline(1, color="#888888", lw=0.7, zorder=0)
        axis.set_yticks(range(len(rows)), [row.what for row in rows], fontsize=8)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.tick_params(axis="x", labelsize=7.5)
        axis.set_title(result.group.name, loc="left", fontsize=9, weight="bold")
        axis.set_xlabel(result.group.unit_label, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{name}: {subtitle}", x=0.01, ha="left", fontsize=9)
    figure.savefig(path, dpi=130, facecolor="white")
