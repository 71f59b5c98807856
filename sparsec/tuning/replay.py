"""A search without a device: timings come from records of an earlier one.

This file decides what a replay answers and what time would have passed. It is how the search is tested where timings
would be noise, and how settings of a search are compared on the same measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparsec.tuning.measure import Look, Measurement
from sparsec.tuning.search import Budget, Outcome, search
from sparsec.tuning.space import Choice, Space
from sparsec.tuning.studies import Settings, Study, open_storage


class ReplayMeasurer:
    """Answers as a device did.

    Args:
        recorded: What came of every choice; one that is not there fails as `constraint`.
    """

    def __init__(self, recorded: Mapping[Choice, Measurement]) -> None:
        self._recorded = recorded
        self.asked: list[Choice] = []

    def measure(self, choice: Choice, look: Look) -> Measurement:
        self.asked.append(choice)
        found = self._found(choice)
        if found.estimate_us is not None and found.estimate_us > look.estimate_limit_us:
            return replace(found, timings_us=(), is_passed_over=True, reason="far behind by the cost model")
        first = found.timings_us[:2]
        is_hopeless = bool(first) and min(first) > look.worst_us
        return replace(found, timings_us=first if is_hopeless else found.timings_us[: max(look.runs, 2)])

    def compare(self, choices: Sequence[Choice], rounds: int, seconds: float) -> list[Measurement]:
        return [self._found(choice) for choice in choices]

    def close(self) -> None:
        pass

    def _found(self, choice: Choice) -> Measurement:
        return self._recorded.get(choice, Measurement(failure="constraint", reason="it was never measured"))


@dataclass(frozen=True, slots=True)
class Replayed:
    """How a search fared against everything that was measured.

    Attributes:
        outcome: What it found.
        best_us: The exhaustive best.
        regret: How much slower the winner is, by all its timings: 0.05 is five per cent.
        trials_to_near: Choices measured before one came within 5 % of the best; None where none did.
    """

    outcome: Outcome
    best_us: float
    regret: float
    trials_to_near: int | None


# What counts as found.
_NEAR = 1.05


def replay(space: Space, recorded: Mapping[Choice, Measurement], trials: int, settings: Settings) -> Replayed:
    """A search of so many trials against recorded timings."""
    measurer = ReplayMeasurer(recorded)
    study = Study(space, open_storage(None), settings)
    outcome = search(space, measurer, study, Budget(trials=trials))
    best_us = min((found.us for found in recorded.values()), default=math.inf)
    timed = [recorded.get(choice, Measurement()).us for choice in measurer.asked]
    near = next((number for number, us in enumerate(timed, 1) if us <= _NEAR * best_us), None)
    won_us = recorded.get(outcome.winner, Measurement()).us
    return Replayed(outcome, best_us, won_us / best_us - 1.0, near)
