"""Plots of results: bars over masks, or lines over a parameter; PNG and SVG.

This file decides how results are drawn: colours that colour-blind readers tell apart (Okabe and Ito's), and markers
beside them. matplotlib is imported here only, and the files it writes are the same for the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.names import family, title
from bench.results import CaseRow, PeerRow, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Source: Okabe & Ito, Color Universal Design, https://jfly.uni-koeln.de/color/.
_COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_MARKERS: Final = "osD^vPX*"


def plot(run: Run, folder: Path) -> list[Path]:
    """Draws a run and returns the files written; none where nothing was timed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sparsec"
    rows = [row for row in run.cases if row.case.measure == "attention" and any(each.us for each in row.peers)]
    if not rows:
        return []
    figure = _lines(run, rows) if run.plot == "lines" else _bars(rows)
    at = run.provenance
    figure.suptitle(f"{run.about or run.grid}\n{at.processor}, {run.threads} threads, {at.date[:10]}", fontsize=10)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix in ("png", "svg"):
        path = folder / f"{run.grid}-{at.device}.{suffix}"
        # Without a date, the same results give the same file; the digest tells which results they were.
        stamps: dict[str, Any] = {"Date": None} if suffix == "svg" else {"Software": None}
        stamps["Description"] = f"results {run.digest}"
        figure.savefig(path, dpi=150, metadata=stamps)
        written.append(path)
    import matplotlib.pyplot as plt

    plt.close(figure)
    return written


def _bars(rows: Sequence[CaseRow]) -> Figure:
    """Useful GFLOP/s by mask, a panel for each dtype."""
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(row.case.dtype for row in rows))
    families = list(dict.fromkeys(family(each.peer) for row in rows for each in row.peers))
    widest = max(sum(row.case.dtype == dtype for row in rows) for dtype in dtypes)
    figure, axes = plt.subplots(
        len(dtypes), 1, figsize=(max(6.0, 0.9 * widest + 2), 3.2 * len(dtypes)), squeeze=False, layout="constrained"
    )
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        shown = [row for row in rows if row.case.dtype == dtype]
        width = 0.8 / len(families)
        for index, wanted in enumerate(families):
            rates = [_rate(row, row.best(wanted)) for row in shown]
            places = [place - 0.4 + width * (index + 0.5) for place in range(len(shown))]
            axis.bar(places, rates, width, label=title(wanted), color=_COLOURS[index % len(_COLOURS)])
        labels = [_label(row, shown) for row in shown]
        axis.set_xticks(range(len(shown)), labels, rotation=30, ha="right", fontsize=8)
        axis.set_ylabel("useful GFLOP/s")
        axis.set_title(dtype, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8, frameon=False)
    return figure


def _rate(row: CaseRow, best: PeerRow | None) -> float:
    return (row.gflops(best) or 0.0) if best is not None else 0.0


def _label(row: CaseRow, shown: Sequence[CaseRow]) -> str:
    """The case's name, with the number of tokens where that tells two cases apart."""
    lengths = {other.q_len for other in shown if other.case.name == row.case.name}
    tokens = f"\n{row.q_len:,}" if len(lengths) > 1 else ""
    return row.case.name + tokens + "".join(f"\n{key} {value}" for key, value in row.case.varied.items())


def _lines(run: Run, rows: Sequence[CaseRow]) -> Figure:
    """Time and added memory over a parameter, a line for each case name, dtype and peer."""
    import matplotlib.pyplot as plt

    series: dict[tuple[str, str, str], list[tuple[float, PeerRow]]] = {}
    for row in rows:
        for each in row.peers:
            if each.us is not None:
                key = (row.case.name, row.case.dtype, each.peer)
                series.setdefault(key, []).append((_x(row, run.x), each))
    figure, (times, memory) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for index, ((name, dtype, peer), points) in enumerate(series.items()):
        points = sorted(points, key=lambda point: point[0])
        style: dict[str, Any] = {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": "-" if family(peer) == "ours" else "--",
            "label": f"{name} {dtype}, {title(peer)}",
            "markersize": 4,
        }
        times.plot([x for x, _ in points], [(row.us or 0.0) / 1e3 for _, row in points], **style)
        known = [(x, row.peak_bytes / 2**20) for x, row in points if row.peak_bytes]
        memory.plot([x for x, _ in known], [mib for _, mib in known], **style)
    for axis, label in ((times, "ms"), (memory, "memory added by set-up and first call, MiB")):
        if axis.lines and any(len(line.get_xdata()) for line in axis.lines):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
        axis.set_xlabel(run.x)
        axis.set_ylabel(label)
        axis.grid(True, which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    times.legend(fontsize=7, frameon=False)
    return figure


def _x(row: CaseRow, name: str) -> float:
    known = {"length": row.q_len, "density": row.density, "threads": row.threads, "edges": row.edges}
    return float(known[name] if name in known else row.case.varied[name])
