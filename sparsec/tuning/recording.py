"""What a search learnt becomes records, and records become where a search begins or what a replay answers.

This file decides which measurements are written and how a choice is told in them. It must not know how a search goes,
nor where records lie.
"""

from __future__ import annotations

from collections.abc import Iterable

from sparsec.backends.base import backend
from sparsec.planner.works import IDENTITY
from sparsec.records import RecordBase, RecordKey, TuningRecord, Workload
from sparsec.template import template
from sparsec.tuning.measure import Measurement
from sparsec.tuning.space import Arm, Choice, Space


def key_of(space: Space, arm: Arm) -> RecordKey:
    """Under which key measurements of an arm are kept."""
    task = space.task
    return RecordKey.of(template(arm.template), arm.backend, task.problem, task.device, task.direction)


def workload_of(space: Space, arm: Arm) -> Workload:
    """What the kernel of an arm walks."""
    task = space.task
    return Workload.of(
        space.profile_of(arm),
        heads=len(task.heads),
        batch=len(task.batch),
        ordering="" if arm.order == IDENTITY.name else arm.order,
    )


def record_of(space: Space, choice: Choice, found: Measurement, contest: str = "") -> TuningRecord | None:
    """The record of a measurement; None where there is none to keep.

    A mixture of launches is no template's: each of its parts is tuned, and recorded, by itself.
    """
    is_nothing = not found.timings_us and found.failure is None
    if choice.arm.is_mixture or is_nothing or not space.tunables(choice.arm):
        return None
    return TuningRecord(
        key_of(space, choice.arm),
        workload_of(space, choice.arm),
        choice.config,
        found.timings_us,
        found.failure,
        toolchain=backend(choice.arm.backend).toolchain(),
        device_label=space.task.device.label,
        contest=contest,
        estimate_us=found.estimate_us,
    )


class Recorder:
    """Writes what a search measures as it goes, so that a search that is ended loses nothing."""

    def __init__(self, space: Space, base: RecordBase) -> None:
        self._space, self._base = space, base

    def tried(self, choice: Choice, found: Measurement) -> None:
        self._keep([record_of(self._space, choice, found)])

    def contested(self, contest: str, finals: dict[Choice, Measurement]) -> None:
        # A finalist that failed in company was fine by itself: that says nothing of it.
        timed = [(choice, found) for choice, found in finals.items() if found.timings_us]
        self._keep(record_of(self._space, choice, found, contest) for choice, found in timed)

    def _keep(self, records: Iterable[TuningRecord | None]) -> None:
        self._base.extend(record for record in records if record is not None)


def nearest_choices(space: Space, base: RecordBase) -> list[Choice]:
    """What records of like masks would serve, for each kernel of the space."""
    found = []
    for arm in space.arms:
        if not space.tunables(arm):
            continue
        served = base.lookup(key_of(space, arm), workload_of(space, arm), toolchain=backend(arm.backend).toolchain())
        if served is not None:
            found.append(Choice(arm, served.config))
    return found


def recorded_results(space: Space, records: Iterable[TuningRecord]) -> dict[Choice, Measurement]:
    """What records say of exactly this task, all their timings together; for a replay.

    A choice that failed anywhere is a failure.
    """
    wanted = {(key_of(space, arm), workload_of(space, arm)): arm for arm in space.arms if space.tunables(arm)}
    results: dict[Choice, Measurement] = {}
    for record in records:
        arm = wanted.get((record.key, record.workload))
        if arm is None:
            continue
        choice = Choice(arm, record.config)
        known = results.get(choice, Measurement())
        failure = known.failure or record.failure
        timings = () if failure else known.timings_us + record.timings_us
        results[choice] = Measurement(timings, failure, estimate_us=record.estimate_us or known.estimate_us)
    return results
