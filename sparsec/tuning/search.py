"""A search: proposals are measured until the budget is spent, then the best meet the default once more, interleaved.

This file decides how long a choice is looked at, when a search ends, who the finalists are and who wins. It must not
know how proposals are made (`studies.py`), how anything is measured (`measure.py`), nor where records are kept.

- The default is measured first, then the cost model's best of each kernel, then what the records of the nearest masks
  say, then what the sampler proposes.
- A proposal that the cost model puts far behind the best is not run; one whose first two runs are both well behind is
  not run on.
- The few best, the default, and the defaults of the finalists' templates are then run in turns. Only that contest
  decides, and what is nearer than noise goes to the default.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from sparsec.records import NEAR_TIE
from sparsec.template import template
from sparsec.tuning.measure import Look, Measurement, Measurer
from sparsec.tuning.space import Arm, Choice, Space
from sparsec.tuning.studies import Decided, Study

# A choice is looked at for so many runs and so long, unless its first two runs were this much behind the best.
_RUNS: Final = 5
_SECONDS: Final = 0.25
_HOPELESS: Final = 1.3
# Estimates this many times the best's own estimate are believed.
_TOO_FAR: Final = 3.0
# Finalists beside the defaults; rounds; and the share of a budget in seconds that is kept for them.
_FINALISTS: Final = 3
_ROUNDS: Final = 15
_FINAL_SHARE: Final = 0.2
_FINAL_SECONDS: Final = 4.0
# An arm whose every choice failed is given up after so many.
_MOST_FAILURES: Final = 3
# How often trials of other processes are looked after at the end.
_WAIT_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Budget:
    """When a search ends: by whichever comes first.

    Attributes:
        seconds: Of this process.
        trials: Measured choices, by all processes together.
        timeout_s: Of one choice.
    """

    seconds: float = math.inf
    trials: int = 1 << 30
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        winner: The choice to use.
        default: What runs without tuning.
        winner_us: In the final contest.
        default_us: Likewise.
        results: Everything that was tried, by this search or an earlier one of the same study.
        finals: What came of the contest, by choice; empty where there was none.
        seconds: Of this process.
        reason: Why the default stays, where it does.
    """

    winner: Choice
    default: Choice
    winner_us: float
    default_us: float
    results: dict[Choice, Measurement]
    finals: dict[Choice, Measurement] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""

    @property
    def speedup(self) -> float:
        """Of the winner over the default; 1 where the default stays."""
        return self.default_us / self.winner_us if self.winner != self.default else 1.0

    @property
    def n_measured(self) -> int:
        return sum(bool(found.timings_us) for found in self.results.values())

    @property
    def failures(self) -> dict[str, int]:
        """How many failed, by kind."""
        counts: dict[str, int] = {}
        for found in self.results.values():
            if found.failure is not None:
                counts[found.failure] = counts.get(found.failure, 0) + 1
        return counts


class Observer(Protocol):
    """Told what goes on: writes records, or shows it."""

    def tried(self, choice: Choice, found: Measurement) -> None:
        """A choice was measured, or failed."""
        ...

    def contested(self, contest: str, finals: dict[Choice, Measurement]) -> None:
        """Finalists were measured interleaved, in a contest of that name."""
        ...


def search(
    space: Space,
    measurer: Measurer,
    study: Study,
    budget: Budget,
    *,
    near: Sequence[Choice] = (),
    observers: Sequence[Observer] = (),
) -> Outcome:
    """The best choice of a space that a budget finds.

    Args:
        space: What may be chosen.
        measurer: Where timings come from.
        study: What is known already, and what to try next.
        budget: When to stop.
        near: What records of like masks chose.
        observers: Told of everything.
    """
    return _Search(space, measurer, study, budget, observers).run(near)


class _Search:
    def __init__(
        self, space: Space, measurer: Measurer, study: Study, budget: Budget, observers: Sequence[Observer]
    ) -> None:
        self._space, self._measurer, self._study = space, measurer, study
        self._budget, self._observers = budget, observers
        self._started = time.monotonic()
        self._final_seconds = min(_FINAL_SECONDS, _FINAL_SHARE * budget.seconds)

    def run(self, near: Sequence[Choice]) -> Outcome:
        self._study.seed([*self._space.seeds(), *(each for each in near if self._space.refusal(each) is None)])
        n_before = len(self._study.results())
        try:
            # What a process that died left behind is tried even when there were trials enough.
            while self._left_s() > 0 and (not self._is_enough() or self._study.hand_on()):
                trial = self._study.next()
                if trial is None:
                    if not self._others_left():
                        break
                    time.sleep(_WAIT_S)
                    continue
                found = self._looked_at(trial.choice)
                if found.failure == "timeout" and self._left_s() <= 0:
                    # The budget ended it, which says nothing of the choice: it is given back.
                    break
                self._study.tell(trial, found)
                if self._has_given_up(trial.choice.arm):
                    self._study.drop(trial.choice.arm)
                for each in self._observers:
                    each.tried(trial.choice, found)
        finally:
            self._study.close()
        earlier = self._study.decided()
        if earlier is not None and len(self._study.results()) == n_before:
            # All that there is to try was tried, and the best have met.
            return self._outcome(earlier, {}, "")
        return self._contested()

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def _left_s(self) -> float:
        return self._budget.seconds - self._elapsed_s() - self._final_seconds

    def _is_enough(self) -> bool:
        n_measured = sum(not found.is_passed_over for found in self._study.results().values())
        return n_measured >= self._budget.trials

    def _others_left(self) -> bool:
        """Whether other processes are at work here, whose last trials may yet be left to this one."""
        return self._study.n_running_elsewhere() > 0

    def _looked_at(self, choice: Choice) -> Measurement:
        results = self._study.results()
        best = min(results.values(), key=lambda found: found.us, default=Measurement())
        is_seed = choice == self._space.default
        limit_us = math.inf if is_seed or best.estimate_us is None else _TOO_FAR * best.estimate_us
        look = Look(
            _RUNS,
            _SECONDS,
            worst_us=_HOPELESS * best.us,
            estimate_limit_us=limit_us,
            timeout_s=min(self._budget.timeout_s, max(self._left_s(), 1.0)),
        )
        return self._measurer.measure(choice, look)

    def _has_given_up(self, arm: Arm) -> bool:
        """Whether several choices of a kernel failed, and none ever ran."""
        mine = [found for choice, found in self._study.results().items() if choice.arm == arm]
        failed = [found for found in mine if found.failure is not None]
        return len(failed) >= _MOST_FAILURES and not any(found.timings_us for found in mine)

    def _contested(self) -> Outcome:
        results, default = self._study.results(), self._space.default
        finalists = self._finalists(results)
        finals: dict[Choice, Measurement] = {}
        if len(finalists) > 1:
            found = self._measurer.compare(finalists, _ROUNDS, max(self._final_seconds, 0.1))
            finals = dict(zip(finalists, found, strict=True))
            contest = uuid.uuid4().hex[:12]
            for each in self._observers:
                each.contested(contest, finals)
        winner, reason = self._winner(finals, results)
        seen = finals or results
        nothing = Measurement()
        decided = Decided(winner, seen.get(winner, nothing).us, seen.get(default, nothing).us)
        if math.isfinite(decided.winner_us):
            self._study.decide(decided)
        return self._outcome(decided, finals, reason)

    def _outcome(self, decided: Decided, finals: dict[Choice, Measurement], reason: str) -> Outcome:
        return Outcome(
            decided.winner,
            self._space.default,
            decided.winner_us,
            decided.default_us,
            dict(self._study.results()),
            finals,
            self._elapsed_s(),
            reason,
        )

    def _finalists(self, results: dict[Choice, Measurement]) -> list[Choice]:
        """The best, the default, and what a record of the best is held against: its template's own default."""
        default = self._space.default
        timed = sorted((choice for choice in results if results[choice].timings_us), key=lambda c: results[c].us)
        best = timed[:_FINALISTS]
        if not best or results.get(default, Measurement()).failure is not None:
            # Without a default to beat there is no contest among the rest either, but the best still serves.
            return best if len(best) > 1 else []
        own = [
            Choice(each.arm, template(each.arm.template).default(each.arm.backend))
            for each in best
            if not each.arm.is_mixture
        ]
        known = [each for each in own if results.get(each, Measurement()).failure is None]
        return list(dict.fromkeys([default, *best, *known]))

    def _winner(self, finals: dict[Choice, Measurement], results: dict[Choice, Measurement]) -> tuple[Choice, str]:
        default = self._space.default
        # There is no contest of one: what ran alone, beside a default that failed, wins by what it took.
        timed = {choice: found.us for choice, found in (finals or results).items() if found.timings_us}
        if not timed:
            return default, "the finalists could not be run in turns" if finals else "nothing ran"
        best = min(timed, key=lambda choice: timed[choice])
        if default not in timed or timed[default] > timed[best] * NEAR_TIE:
            return best, ""
        if len(timed) == 1:
            return default, "nothing else ran"
        return default, "nothing was faster" if best == default else f"the best is within {NEAR_TIE - 1:.0%} of it"
