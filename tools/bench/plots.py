"""Plots of results: bars over masks, or lines over a parameter; PNG and SVG.

This file decides how results are drawn: colours that colour-blind readers tell apart (Okabe and Ito's), and markers
beside them. matplotlib is imported here only, and the files it writes are the same for the same results.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    threads = "" if run.x == "threads" and run.plot == "lines" else f" {run.threads} threads,"
    figure.suptitle(f"{run.about or run.grid}\n{at.processor},{threads} {at.date[:10]}", fontsize=10)
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
    """Useful GFLOP/s by mask, a panel for each dtype; a case has bars of those alone who were timed on it."""
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(row.case.dtype for row in rows))
    families = list(dict.fromkeys(family(each.peer) for row in rows for each in row.peers if each.us is not None))
    widest = max(sum(row.case.dtype == dtype for row in rows) for dtype in dtypes)
    figure, axes = plt.subplots(
        len(dtypes), 1, figsize=(max(6.0, 0.95 * widest + 2), 3.2 * len(dtypes)), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        shown = [row for row in rows if row.case.dtype == dtype]
        most = max(len(_timed(row, families)) for row in shown)
        width = 0.8 / most
        for place, row in enumerate(shown):
            timed = _timed(row, families)
            for index, (wanted, best) in enumerate(timed.items()):
                at = place + width * (index + 0.5 - len(timed) / 2)
                colour = _COLOURS[families.index(wanted) % len(_COLOURS)]
                handles.setdefault(title(wanted), axis.bar(at, row.gflops(best) or 0.0, width, color=colour))
        axis.set_xticks(range(len(shown)), [_label(row, shown) for row in shown], fontsize=7)
        axis.set_ylabel("useful GFLOP/s")
        axis.set_title(dtype, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(handles.values(), handles.keys(), fontsize=8, frameon=False, loc="outside right upper")
    return figure


def _timed(row: CaseRow, families: Sequence[str]) -> dict[str, PeerRow]:
    """The best of each family that has a time."""
    best = {wanted: row.best(wanted) for wanted in families}
    return {wanted: each for wanted, each in best.items() if each is not None}


def _label(row: CaseRow, shown: Sequence[CaseRow]) -> str:
    """The case's name, with the number of tokens where that tells two cases apart."""
    lengths = {other.q_len for other in shown if other.case.name == row.case.name}
    tokens = f"\n{row.q_len:,}" if len(lengths) > 1 else ""
    name = "\n".join(textwrap.wrap(row.case.name, 14))
    return name + tokens + "".join(f"\n{key} {value}" for key, value in row.case.varied.items())


@dataclass(frozen=True, slots=True)
class _Panel:
    """One pair of axes: which cases, and what of each is drawn."""

    title: str
    unit: str
    rows: tuple[CaseRow, ...]
    value: Callable[[PeerRow], float | None]


def _lines(run: Run, rows: Sequence[CaseRow]) -> Figure:
    """A line for each case name (colour) and peer (marker): time and memory over length, or time over a parameter."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels = _panels(run, rows)
    n_rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(n_rows, 2, figsize=(12, 3.8 * n_rows), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(row.case.name for row in rows))
    peers = list(dict.fromkeys(each.peer for row in rows for each in row.peers if each.us is not None))
    handles: dict[str, Any] = {}
    places = [row.at(run.x) for row in rows]
    for axis, panel in itertools.zip_longest(axes.flat, panels):
        if panel is None:
            axis.set_visible(False)
            continue
        for name, peer in itertools.product(names, peers):
            round_number, colour = divmod(names.index(name), len(_COLOURS))
            style: dict[str, Any] = {
                "color": _COLOURS[colour],
                # Where there are more names than colours, the others' markers are hollow.
                "fillstyle": "none" if round_number else "full",
                "marker": _MARKERS[peers.index(peer) % len(_MARKERS)],
                "linestyle": "-" if peer == "ours" else ":",
                "markersize": 5,
            }
            line = _points(panel, name, peer, run.x)
            if line:
                (drawn,) = axis.plot(*zip(*line, strict=True), **style)
                handles.setdefault(f"{name}, {title(peer)}", drawn)
        if axis.lines:
            axis.set_xscale("log", base=10 if run.x == "density" else 2)
            axis.set_yscale("log")
            axis.margins(y=0.1)
            # The same for all, so that panels can be compared, and one point has a place.
            axis.set_xlim(min(places) / 1.5, max(places) * 1.5)
            low, high = axis.get_ylim()
            if high / low < 100:
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            if run.x == "threads":
                axis.set_xticks(sorted(set(places)), [f"{place:g}" for place in sorted(set(places))])
        axis.set_xlabel("tokens" if run.x == "length" else run.x)
        axis.set_ylabel(panel.unit)
        axis.set_title(panel.title, fontsize=9)
        axis.grid(True, which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(handles.values(), handles.keys(), fontsize=7, frameon=False, loc="outside right upper")
    return figure


def _panels(run: Run, rows: Sequence[CaseRow]) -> list[_Panel]:
    panels = []
    dtypes = list(dict.fromkeys(row.case.dtype for row in rows))
    lengths = [None] if run.x == "length" else list(dict.fromkeys(row.q_len for row in rows))
    for dtype, length in itertools.product(dtypes, lengths):
        chosen = tuple(row for row in rows if row.case.dtype == dtype and length in (None, row.q_len))
        name = dtype if length is None else f"{dtype}, {length:,} tokens"
        if chosen:
            panels.append(_Panel(name, "ms", chosen, lambda each: each.us / 1e3 if each.us else None))
        if chosen and run.x == "length":
            memory = f"{name}, memory: {run.protocol.memory.partition(',')[0]}"
            panels.append(
                _Panel(memory, "MiB", chosen, lambda each: each.peak_bytes / 2**20 if each.peak_bytes else None)
            )
    return panels


def _points(panel: _Panel, name: str, peer: str, x: str) -> list[tuple[float, float]]:
    points = []
    for row in panel.rows:
        each = row.row(peer) if row.case.name == name else None
        value = panel.value(each) if each is not None and each.us is not None else None
        if value is not None:
            points.append((row.at(x), value))
    return sorted(points)
