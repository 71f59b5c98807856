"""What was aimed at beside what was measured.

This file decides how several cases count towards one goal: by their geometric mean, and only where all were measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bench.grid import Goal
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
        if self.goal.at_least is not None:
            return 1 - self.value / self.goal.at_least
        assert self.goal.at_most is not None
        return self.value / self.goal.at_most - 1


def outcomes(run: Run) -> list[Outcome]:
    """The goals that some case of the run bears on."""
    found = []
    for goal in run.goals:
        rows = [row for row in run.cases if any(fnmatchcase(row.case.id, pattern) for pattern in goal.cases)]
        if rows:
            values = [_value(goal, row) for row in rows]
            known = [value for value in values if value]
            mean = math.exp(sum(map(math.log, known)) / len(known)) if len(known) == len(values) else None
            found.append(Outcome(goal, mean))
    return found


def _value(goal: Goal, row: CaseRow) -> float | None:
    kind, _, rival = goal.value.partition(":")
    own = row.row(goal.peer)
    if kind == "ratio":
        return row.ratio(rival)
    if own is None or own.us is None:
        return None
    if kind == "share_of_peak":
        return row.share_of_peak(own)
    if kind == "backward_over_forward":
        return own.backward_over_forward
    if kind == "metadata_share":
        return own.plan.layout_bytes / row.tensor_bytes if own.plan is not None else None
    return own.us / 1e3
