"""What was aimed at beside what was measured.

This file decides how several cases count towards one goal: by their geometric mean, or as points of one slope, and only
where all were measured; and where two lines over a parameter cross.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

from bench.grid import SLOPES, Goal
from bench.names import family
from bench.results import CaseRow, Run


@dataclass(frozen=True, slots=True)
class Outcome:
    """A goal and what was reached; None where some of its cases have no figure."""

    goal: Goal
    value: float | None

    @property
    def is_met(self) -> bool:
        return self.value is not None and self.missed_by <= 0

    @property
    def missed_by(self) -> float:
        """As a share of the goal; negative where it is passed."""
        assert self.value is not None
        below = [] if self.goal.at_least is None else [1 - self.value / self.goal.at_least]
        above = [] if self.goal.at_most is None else [self.value / self.goal.at_most - 1]
        return max(below + above)


def outcomes(run: Run) -> list[Outcome]:
    """The goals that some case of the run bears on."""
    found = []
    for goal in run.goals:
        rows = [row for row in run.cases if any(fnmatchcase(row.case.id, pattern) for pattern in goal.cases)]
        if rows and goal.value in SLOPES:
            found.append(Outcome(goal, _slope(goal, rows)))
        elif rows:
            values = [_value(goal, row, run) for row in rows]
            known = [value for value in values if value]
            mean = math.exp(sum(map(math.log, known)) / len(known)) if len(known) == len(values) else None
            found.append(Outcome(goal, mean))
    return found


def _slope(goal: Goal, rows: list[CaseRow]) -> float | None:
    """Of the straight line of least squares through the logarithms; None where a point is missing."""
    points = []
    for row in rows:
        own = row.row(goal.peer)
        what = None if own is None else own.us if goal.value == "slope:time" else own.peak_bytes
        if not what:
            return None
        points.append((math.log(row.q_len), math.log(what)))
    x_mean, y_mean = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    across = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / across if across else None


def _value(goal: Goal, row: CaseRow, run: Run) -> float | None:
    kind, _, rival = goal.value.partition(":")
    own = row.row(goal.peer)
    if kind == "ratio":
        return row.ratio(rival, goal.peer)
    if own is None or own.us is None:
        return None
    if kind == "tokens":
        return float(row.q_len)
    if kind == "tflops":
        rate = row.gflops(own)
        return rate / 1e3 if rate else None
    if kind in ("edge_tb_s", "gather_share"):
        rate = row.edge_bytes / own.us * 1e6
        unit = 1e12 if kind == "edge_tb_s" else row.gather_bytes_per_s
        return rate / unit if unit else None
    if kind == "share_of_peak":
        return row.share_of_peak(own, run.ceilings)
    if kind == "backward_over_forward":
        return own.backward_over_forward
    if kind == "metadata_share":
        return own.plan.layout_bytes / row.tensor_bytes if own.plan is not None else None
    return own.us / 1e3


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where one peer overtakes another.

    Attributes:
        name: Of the cases.
        dtype: Of the tensors.
        length: Tokens, where the lines are not over length.
        faster: Who is faster beyond it.
        slower: Who is faster before it.
        at: The value of the parameter, between two that were measured, on a straight line between the logarithms.
    """

    name: str
    dtype: str
    length: int | None
    faster: str
    slower: str
    at: float


def crossings(run: Run) -> list[Crossing]:
    """Every change of the lead between two peers along the lines of a run, our plan and its own templates apart."""
    groups: dict[tuple[str, str, int | None], list[CaseRow]] = {}
    for row in run.cases:
        if row.case.measure == "attention":
            length = None if run.x == "length" else row.q_len
            groups.setdefault((row.case.name, row.case.dtype, length), []).append(row)
    found = []
    for (name, dtype, length), rows in groups.items():
        rows = sorted(rows, key=lambda row: row.at(run.x))
        peers = list(dict.fromkeys(each.peer for row in rows for each in row.peers))
        for index, first in enumerate(peers):
            for second in peers[index + 1 :]:
                if "ours" in (first, second) and family(first) == family(second):
                    continue
                for at, second_leads in _changes_of_lead(rows, first, second, run.x):
                    faster, slower = (second, first) if second_leads else (first, second)
                    found.append(Crossing(name, dtype, length, faster, slower, at))
    return found


def _changes_of_lead(rows: list[CaseRow], first: str, second: str, x: str) -> list[tuple[float, bool]]:
    """Where, and whether the second leads from there on."""
    points = []
    for row in rows:
        a, b = row.row(first), row.row(second)
        if a is not None and b is not None and a.us and b.us:
            points.append((math.log(row.at(x)), math.log(a.us / b.us)))
    changes = []
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 * y1 < 0:
            changes.append((math.exp(x0 + (x1 - x0) * y0 / (y0 - y1)), y1 > 0))
    return changes
