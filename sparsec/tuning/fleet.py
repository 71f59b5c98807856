"""A fleet of jobs is tuned one task after the other, for as long as there is time; started again, it goes on.

This file decides the order of tasks, how a budget is shared among them, and what is told of each. It must not know how
a search goes, nor how progress is shown.

Tasks that were never tried come first; each is given its share of the time that is left, or a quarter of a minute where
that is more: a process has to start, and kernels have to compile. What there was no time for is first in the next run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from sparsec.device import Device
from sparsec.errors import SparsecError
from sparsec.records import RecordBase
from sparsec.tuning import studies
from sparsec.tuning.jobs import Entry
from sparsec.tuning.measure import Measurement
from sparsec.tuning.search import Budget
from sparsec.tuning.space import Choice, Space, Task
from sparsec.tuning.tuner import Job, check_is_here, search_space, spaces_of, whole_task
from sparsec.tuning.worker import Host

if TYPE_CHECKING:
    import optuna

# A task is given at least this.
_LEAST_SECONDS: Final = 15.0

Stage = Literal["begun", "tried", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Something that happened to a task.

    Attributes:
        task: Its title.
        stage: What happened.
        measured: Choices measured up to now, by anyone.
        failed: Choices that failed.
        default_us: Of the default; infinite where it was not measured.
        best_us: Of the best; likewise.
        best: What the best is.
        note: For a person: what failed and why, or why the default stays.
    """

    task: str
    stage: Stage
    measured: int = 0
    failed: int = 0
    default_us: float = math.inf
    best_us: float = math.inf
    best: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """How a fleet is tuned.

    Attributes:
        seconds: In all.
        trials: Of each task, by all workers together.
        timeout_s: Of each trial.
        storage: Of the studies.
        where: The torch device.
        offset: With which share of the tasks this worker begins, 0 to 1: several workers begin at different ones.
        is_fresh: Whether earlier studies of the tasks are thrown away.
    """

    seconds: float
    trials: int
    timeout_s: float
    storage: str
    where: str
    offset: float = 0.0
    is_fresh: bool = False


Watch = Callable[[Progress], None]


def spaces_in(entry: Entry, device: Device, where: str = "cpu") -> list[tuple[str, Space]]:
    """Every search of a job with its title.

    Raises:
        SparsecError: Nothing can run it.
    """
    found: dict[str, Space] = {}
    for space in spaces_of(Job(entry.mask, entry.problem, device, where)):
        direction = "" if space.task.direction == "forward" else ", backward"
        title = f"{entry}{direction}"
        part = sum(each.startswith(title) and each.endswith(direction) for each in found)
        found[title if not part else f"{entry}, part {part}{direction}"] = space
    return list(found.items())


def run_fleet(entries: Sequence[Entry], device: Device, terms: Terms, base: RecordBase, watch: Watch) -> None:
    """Tunes what there is time for; what comes of it is told to `watch`, and in the records.

    Raises:
        BackendMissingError: The device is not here.
        SparsecError: The storage cannot be reached.
    """
    deadline = time.monotonic() + terms.seconds
    storage = prepared_storage(entries, device, terms)
    first = int(len(entries) * terms.offset)
    rotated = [*entries[first:], *entries[:first]]
    # Stable: among those that were tried, or were not, in the order of the file.
    rotated.sort(key=lambda entry: studies.n_tried(_task(entry, device), storage) > 0)
    host = Host()
    try:
        for number, entry in enumerate(rotated):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            share = min(left, max(left / (len(rotated) - number), _LEAST_SECONDS))
            _tune_entry(entry, device, replace(terms, seconds=share), _To(base, watch, host))
    finally:
        host.close()


def prepared_storage(entries: Sequence[Entry], device: Device, terms: Terms) -> optuna.storages.BaseStorage:
    """The storage, open; what is to be forgotten in it is forgotten, and the device is here.

    Raises:
        BackendMissingError: The device is not here.
        SparsecError: The storage cannot be reached.
    """
    check_is_here(device, terms.where)
    storage = studies.open_storage(terms.storage)
    for entry in entries if terms.is_fresh else ():
        whole = _task(entry, device)
        for task in (whole, replace(whole, direction="backward")):
            studies.forget(task, storage)
    return storage


def _task(entry: Entry, device: Device) -> Task:
    return whole_task(Job(entry.mask, entry.problem, device))


@dataclass(frozen=True, slots=True)
class _To:
    """Where what is learnt goes, and who measures."""

    base: RecordBase
    watch: Watch
    host: Host


def _tune_entry(entry: Entry, device: Device, terms: Terms, to: _To) -> None:
    watch = to.watch
    deadline = time.monotonic() + terms.seconds
    watch(Progress(str(entry), "begun"))
    try:
        spaces = spaces_in(entry, device, terms.where)
    except SparsecError as error:
        watch(Progress(str(entry), "failed", note=str(error).splitlines()[0]))
        return
    for number, (title, space) in enumerate(spaces):
        left = deadline - time.monotonic()
        if number and left <= 0:
            return
        budget = Budget(max(left / (len(spaces) - number), _LEAST_SECONDS / 2), terms.trials, terms.timeout_s)
        _tuned(title, space, budget, terms, to)


def _tuned(title: str, space: Space, budget: Budget, terms: Terms, to: _To) -> None:
    watch = to.watch
    watch(Progress(title, "begun"))
    try:
        observer = _Teller(title, space.default, watch)
        outcome = search_space(space, terms.where, budget, to.base, terms.storage, [observer], to.host)
    except SparsecError as error:
        watch(Progress(title, "failed", note=str(error).splitlines()[0]))
        return
    failed = sum(outcome.failures.values())
    note = outcome.reason or str(outcome.winner)
    best = str(outcome.winner)
    watch(Progress(title, "done", outcome.n_measured, failed, outcome.default_us, outcome.winner_us, best, note))


class _Teller:
    """Makes progress of what a search tells."""

    def __init__(self, title: str, default: Choice, watch: Watch) -> None:
        self._title, self._default, self._watch = title, default, watch
        self._seen: dict[Choice, Measurement] = {}

    def tried(self, choice: Choice, found: Measurement) -> None:
        self._seen[choice] = found
        timed = {each: seen.us for each, seen in self._seen.items() if seen.timings_us}
        best = min(timed, key=lambda each: timed[each], default=None)
        self._watch(
            Progress(
                self._title,
                "tried",
                len(timed),
                sum(seen.failure is not None for seen in self._seen.values()),
                timed.get(self._default, math.inf),
                math.inf if best is None else timed[best],
                "" if best is None else str(best),
                "" if found.failure is None else f"{choice}: {found.failure}: {found.reason}",
            )
        )

    def contested(self, contest: str, finals: dict[Choice, Measurement]) -> None:
        pass
