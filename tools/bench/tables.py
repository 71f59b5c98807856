"""Markdown tables of results, for a README.

This file decides what a reader sees first and in what words. Every figure comes from a result file; none is typed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from bench.goals import Crossing, Outcome, crossings, outcomes
from bench.grid import Goal, GridError, find_grid, load_grid
from bench.names import family, title
from bench.results import CaseRow, Ceiling, PeerRow, Provenance, Run
from bench.sheet import Sheet, checked, compared, measured
from sparsec.errors import SparsecError
from sparsec.planner.words import duration, size

BEGIN: Final = "<!-- benchmarks:begin -->"
END: Final = "<!-- benchmarks:end -->"

_NO_TIME: Final = {"skipped": "–", "wrong": "wrong", "failed": "failed", "timed out": "timed out", "crashed": "crashed"}


def markdown(run: Run, plots: str = "", *, is_part: bool = False) -> str:
    """All tables of one run, and its plot where a folder of plots is given.

    What of its grid was not measured is told, unless the run is meant to be a part.
    """
    attention = [row for row in run.cases if row.case.measure == "attention"]
    parts = [f"### {'Measured again since: ' if is_part else ''}{run.about or run.grid}", caption(run)]
    if plots and any(each.us for row in attention for each in row.peers):
        parts.append(f"![{run.grid}]({plots}/{run.grid}-{run.provenance.device}.svg)")
    if attention:
        parts += [attention_table(attention, run.ceilings), *notes_of(attention)]
    if run.plot == "lines" and (crossed := crossings(run)):
        parts.append(crossing_table(crossed, run.x))
    figures = [row for row in run.cases if row.case.measure != "attention"]
    if figures:
        parts.append(figure_table(figures))
    reached = outcomes(run)
    if reached:
        parts.append(goal_table(reached))
    if missing := [] if is_part else unmeasured(run):
        parts.append(f"Of the grid, not measured: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def overview(runs: Sequence[Run], sheets: Sequence[Sheet]) -> str:
    """Which results were measured where, when and by which code: whether two tables may be compared."""
    lines = []
    for name, at, n_threads, ceilings, order in (
        *((run.grid, run.provenance, run.threads, run.ceilings, _order(run)) for run in runs),
        *((sheet.sheet, sheet.provenance, sheet.threads, (), "") for sheet in sheets),
    ):
        peaks = ", ".join(f"{each.all_threads / 1e9:,.0f} {each.dtype}" for each in ceilings)
        commit = f"{at.commit[:10] or '–'}{' with changes' if at.is_dirty else ''}"
        lines.append([name, at.processor, at.isa, str(n_threads), peaks, at.date[:10], commit, order])
    header = ["results", "processor", "instructions", "threads", "measured peak, GFLOP/s", "date", "commit", "calls"]
    return table(header, lines, text_columns=len(header))


def _order(run: Run) -> str:
    """How the calls of a round follow each other."""
    return run.protocol.order.rpartition("once, ")[2]


def sheet_markdown(sheet: Sheet) -> str:
    """The table of figures that belong to no grid."""
    lines = []
    for each in sheet.figures:
        remark = "; ".join(filter(None, [compared(each, sheet), each.note]))
        lines.append([each.what, each.said, measured(each), remark, checked(each)])
    parts = [f"### {sheet.about}", f"{_where(sheet.provenance, sheet.threads)} {_sentence(sheet.protocol)}"]
    parts.append(table(["what", "of", "measured", "", "exactness"], lines, text_columns=2))
    return "\n\n".join(parts) + "\n"


def unmeasured(run: Run) -> list[str]:
    """Ids of cases that the run's grid has and the run has not; none where the grid is another by now."""
    try:
        grid = load_grid(find_grid(run.grid))
    except GridError:
        return []
    known = {row.case.id for row in run.cases}
    # More threads than there were cannot be measured.
    wanted = [case.id for case in grid.cases if case.threads <= run.provenance.cores]
    return [each for each in wanted if each not in known] if grid.digest == run.grid_digest else []


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _where(at: Provenance, n_threads: int) -> str:
    commit = f"commit {at.commit[:10]}{' with changes' if at.is_dirty else ''}" if at.commit else "no commit"
    threads = f"{n_threads} thread{'s' if n_threads != 1 else ''}"
    return (
        f"{at.processor}, {at.isa}, {threads}; torch {at.versions.get('torch', '?')}, "
        f"{at.versions.get('compiler', '?')}; {at.date[:10]}, {commit}."
    )


def caption(run: Run) -> str:
    """Where, when and how, in three sentences."""
    peaks = ", ".join(f"{each.all_threads / 1e9:,.0f} GFLOP/s ({each.unit})" for each in run.ceilings)
    return (
        _where(run.provenance, run.threads)
        + (f" Measured peak: {peaks}." if peaks else "")
        + " Median of interleaved calls, every result checked; GFLOP/s count useful work (4 · edges · head_dim"
        f"{_backward_work(run)}); × is how many times faster sparsec is."
    )


def _backward_work(run: Run) -> str:
    has_gradients = any(row.case.direction == "forward_backward" for row in run.cases)
    return " forward, 10 · edges · head_dim backward" if has_gradients else ""


def attention_table(rows: Sequence[CaseRow], ceilings: Sequence[Ceiling] = ()) -> str:
    rivals = list(dict.fromkeys(rival for row in rows for rival in row.rivals))
    forced = list(dict.fromkeys(each.peer for row in rows for each in row.peers if each.peer.startswith("ours:")))
    shown = _shape_columns(rows)
    has_gradients = any(row.case.direction == "forward_backward" for row in rows)
    has_warm = any(each.warm is not None for row in rows for each in row.peers)
    header = [
        "mask",
        *(name for name, _ in shown),
        "sparsec",
        "GFLOP/s",
        "of peak",
        "tile fill",
        *(["backward / forward"] if has_gradients else []),
        *(["warm L2"] if has_warm else []),
        *(f"× {title(rival)}" for rival in rivals),
        *(f"× {peer.partition(':')[2]}" for peer in forced),
    ]
    lines = []
    for index, row in enumerate(rows):
        own = row.row("ours")
        lines.append(
            [
                _name(row),
                *(values[index] for _, values in shown),
                *_own_cells(row, own, ceilings),
                *([_backward_cell(own)] if has_gradients else []),
                *([_warm_cell(own)] if has_warm else []),
                *(_ratio_cell(row, rival) for rival in rivals),
                *(_forced_cell(row, own, peer) for peer in forced),
            ]
        )
    lines += _mean_lines(rows, rivals, header, [name for name, _ in shown])
    return table(header, lines, text_columns=1 + len(shown))


def _name(row: CaseRow) -> str:
    return row.case.name + "".join(f", {key} {value}" for key, value in row.case.varied.items())


def _shape_columns(rows: Sequence[CaseRow]) -> list[tuple[str, list[str]]]:
    """dtype always, and whatever else differs between the rows."""
    columns: list[tuple[str, list[str]]] = [
        ("tokens", [f"{row.q_len:,}" for row in rows]),
        ("batch", [str(row.case.batch) for row in rows]),
        ("heads", [f"{row.case.heads}:{row.case.kv_heads or row.case.heads}" for row in rows]),
        ("head_dim", [str(row.case.head_dim) for row in rows]),
        ("threads", [str(row.threads) for row in rows]),
        ("direction", [row.case.direction.replace("_", " + ") for row in rows]),
        ("dtype", [str(row.case.dtype) for row in rows]),
    ]
    return [(name, values) for name, values in columns if name == "dtype" or len(set(values)) > 1]


def _own_cells(row: CaseRow, own: PeerRow | None, ceilings: Sequence[Ceiling]) -> list[str]:
    if own is None or own.us is None or own.timing is None:
        status = "–" if own is None else _NO_TIME[own.status]
        return [status, "–", "–", _percent(row.tile_fill)]
    rate, share = row.gflops(own), row.share_of_peak(own, ceilings)
    spread = f"{duration(own.us)} ± {own.timing.spread / 2:.0%}"
    return [
        spread,
        "–" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}",
        _percent(share),
        _percent(row.tile_fill),
    ]


def _backward_cell(own: PeerRow | None) -> str:
    ratio = own.backward_over_forward if own is not None else None
    return "–" if ratio is None else f"{ratio:.2f}"


def _warm_cell(own: PeerRow | None) -> str:
    return "–" if own is None or own.us is None or own.warm is None else duration(own.warm.median_us)


def _ratio_cell(row: CaseRow, rival: str) -> str:
    ratio = row.ratio(rival)
    if ratio is not None:
        return f"{ratio:.2f}"
    theirs = [each for each in row.peers if family(each.peer) == rival]
    if not theirs:
        return "–"
    best = row.best(rival)
    return duration(best.us) if best is not None and best.us is not None else _NO_TIME[theirs[0].status]


def _forced_cell(row: CaseRow, own: PeerRow | None, peer: str) -> str:
    forced = row.row(peer)
    if forced is None:
        return "–"
    if forced.us is None or own is None or own.us is None:
        return _NO_TIME.get(forced.status, "–")
    return f"{forced.us / own.us:.2f}"


def _mean_lines(rows: Sequence[CaseRow], rivals: list[str], header: list[str], shown: list[str]) -> list[list[str]]:
    """Geometric means by dtype, over the rows where both sides are exact."""
    lines = []
    for dtype in dict.fromkeys(row.case.dtype for row in rows):
        ratios = {rival: [r for row in rows if row.case.dtype == dtype and (r := row.ratio(rival))] for rival in rivals}
        if not any(len(found) > 1 for found in ratios.values()):
            continue
        cells = [f"{geometric_mean(found):.2f}" if len(found) > 1 else "" for found in ratios.values()]
        shape = [dtype if name == "dtype" else "" for name in shown]
        line = ["**geometric mean**", *shape]
        line += [""] * (header.index(f"× {title(rivals[0])}") - len(line)) + cells
        lines.append(line + [""] * (len(header) - len(line)))
    return lines


def notes_of(rows: Sequence[CaseRow]) -> list[str]:
    """Why there is no figure, once for each peer and reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for each in row.peers:
            said = each.reason if each.status != "ok" else each.note
            if said:
                label = f"{title(each.peer)} {each.status}" if each.status != "ok" else title(each.peer)
                reasons.setdefault((label, said.splitlines()[0]), []).append(row.case.name)
    lines = []
    for (label, said), names in reasons.items():
        where = list(dict.fromkeys(names))
        listed = ", ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
        lines.append(f"- {label} ({listed}): {said}")
    return ["\n".join(lines)] if lines else []


_WHAT: Final = {
    "planning": "plan",
    "first_call": "compile + first call",
    "metadata": "index arrays",
    "upload": "plan and upload",
    "update": "update",
    "longest": "longest context",
}


def figure_table(rows: Sequence[CaseRow]) -> str:
    lines = []
    for row in rows:
        what = f"{_WHAT[row.case.measure]}: {row.case.name}, {row.q_len:,} tokens"
        for each in row.peers:
            shown = what + (f", {title(each.peer)}" if each.peer != "ours" else "")
            if each.us is None or each.timing is None:
                lines.append([shown, _NO_TIME.get(each.status, "–"), ""])
            elif row.case.measure == "metadata" and each.plan is not None:
                share = each.plan.layout_bytes / row.tensor_bytes
                lines.append([shown, size(each.plan.layout_bytes), f"{share:.2%} of q, k, v and out"])
            else:
                lines.append([shown, duration(each.us), f"± {each.timing.spread / 2:.0%}, {each.timing.repeats} times"])
    return table(["what", "measured", ""], lines)


def goal_table(reached: Iterable[Outcome]) -> str:
    lines = []
    for each in reached:
        goal = each.goal
        measured = "not measured" if each.value is None else f"{each.value:.3g}"
        verdict = "" if each.value is None else "met" if each.is_met else f"missed by {each.missed_by:.0%}"
        lines.append([goal.what, limits_text(goal), measured, verdict])
    return table(["aim", "figure", "measured", ""], lines)


def limits_text(goal: Goal) -> str:
    """What is aimed at."""
    limits = (("≥", goal.at_least), ("≤", goal.at_most))
    return ", ".join(f"{sign} {limit:,.0f}" if limit >= 1e5 else f"{sign} {limit:g}" for sign, limit in limits if limit)


def crossing_table(crossed: Sequence[Crossing], x: str) -> str:
    """Where one peer overtakes another along the lines of a plot."""
    lines = []
    for each in crossed:
        where = f"{each.at:.2%}" if x == "density" else f"{each.at:,.3g}"
        lines.append([each.name, each.dtype, f"{each.length:,}" if each.length else "", where])
        lines[-1] += [title(each.faster), title(each.slower)]
    return table(["lines cross", "dtype", "tokens", f"at {x}", "faster from there on", "than"], lines, text_columns=2)


def table(header: Sequence[str], lines: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    rule = ["---" if index < text_columns else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def replaced_block(path: Path, content: str) -> str:
    """The text of a file with what is between the markers replaced.

    Raises:
        SparsecError: The markers are not there, once each and in order.
    """
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise SparsecError(f"{path} must hold {BEGIN} and, after it, {END}, once each: the tables go between them")
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    return f"{head}\n\n{content.strip()}\n\n{tail}"


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
