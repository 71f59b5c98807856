"""Searches shared by any number of processes: one optuna study for each task, in one storage.

This file decides how a storage is named and opened, how a point of a space is written as an optuna trial, and how the
trial of a process that died is handed on. It is where optuna is used. It must not know how a choice is measured, nor
what a search does with what came of it.

A process that works on a trial counts up a number in it. Whoever shares the study gives the trial up for dead when that
number has stood still for long, by the watcher's own monotonic clock, so that no two clocks are compared; a process
that is known to be gone from the same machine needs no waiting. A dead trial becomes a failed one, and what it was
trying is queued again; a choice that took its process down twice is not tried a third time.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from sparsec.errors import SparsecError
from sparsec.template import Config
from sparsec.tuning.measure import Measurement
from sparsec.tuning.space import Arm, Choice, Space, Task

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

# How often a trial is counted up, and after how long it is given up for dead where its process cannot be looked for.
BEAT_S: Final = 5.0
DEAD_AFTER_S: Final = 45.0
# A choice is queued again so often after its process died.
_MOST_RETRIES: Final = 1
# Proposals in a row that were known already, before untried ones are drawn at random.
_PATIENCE: Final = 3

_TABLE_ATTEMPTS: Final = 5
_TABLE_PAUSE_S: Final = 0.3

Sampler = Literal["tpe", "random"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a search proposes.

    Attributes:
        sampler: `"tpe"` learns from what it saw; `"random"` does not, and is what it is compared with.
        startup: Choices beside the seeds that are drawn at random before it learns.
        seed: Of the sampler; None for another one each time.
    """

    sampler: Sampler = "tpe"
    startup: int = 6
    seed: int | None = None


def open_storage(name: str | None) -> optuna.storages.BaseStorage:
    """The storage of that name; None is this process's memory.

    Args:
        name: A file (optuna's journal), or a URL: `sqlite:///file`, `postgresql://user@host/database`, `mysql://…`.

    Raises:
        SparsecError: It cannot be reached; says why.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    _quiet()
    if name is None:
        return optuna.storages.InMemoryStorage()
    if "://" in name:
        return _open_database(name)
    path = Path(name).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    except OSError as error:
        raise SparsecError(
            f"the study file {path} cannot be written ({error.strerror}); name another with --storage"
        ) from None
    except ValueError as error:  # a line that is no JSON
        raise SparsecError(f"the study file {path} is damaged ({error}); move it away, or name another") from None


def _open_database(url: str) -> optuna.storages.BaseStorage:
    import optuna
    import sqlalchemy.exc

    # Not every driver that SQLAlchemy would take first is about; psycopg is the one that is tested.
    driven = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)
    try:
        # Two processes that find an empty database both make its tables, and one is refused: it finds them made.
        for _ in range(_TABLE_ATTEMPTS):
            with contextlib.suppress(sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
                return optuna.storages.RDBStorage(driven)
            time.sleep(_TABLE_PAUSE_S)
        return optuna.storages.RDBStorage(driven)
    except ImportError as error:
        raise SparsecError(
            f"the study in {_without_password(url)} needs a database driver that is not installed ({error}); "
            "install it (PostgreSQL: pip install 'psycopg[binary]'; MySQL: pip install pymysql, and mysql+pymysql://…)"
        ) from None
    except (sqlalchemy.exc.SQLAlchemyError, RuntimeError, ValueError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SparsecError(
            f"the study in {_without_password(url)} cannot be reached: {cause}; "
            "start the database, or leave --storage out for a file of this machine's"
        ) from None


def _without_password(url: str) -> str:
    return re.sub(r"://([^:/@]*):[^@/]*@", r"://\1:…@", url)


def _quiet() -> None:
    """Optuna says every trial, and that parts of it are new; what a user should hear is said by this package."""
    import optuna

    if optuna.logging.get_verbosity() < optuna.logging.WARNING:
        optuna.logging.set_verbosity(optuna.logging.WARNING)


@contextlib.contextmanager
def _experiments_allowed() -> Iterator[None]:
    """Optuna warns of its sampler's `multivariate` and `group`, which have been there for years."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
        yield


@dataclass(frozen=True, slots=True)
class Trial:
    """A choice that this process is to measure."""

    number: int
    choice: Choice


@dataclass(frozen=True, slots=True)
class Decided:
    """Who won a contest, and how long it and the default took there."""

    winner: Choice
    winner_us: float
    default_us: float


class Study:
    """What is known of one space, and what to try next; shared with every process that opened it.

    Args:
        space: What is searched.
        storage: Where.
        settings: How.
    """

    def __init__(self, space: Space, storage: optuna.storages.BaseStorage, settings: Settings | None = None) -> None:
        import optuna

        _quiet()
        self._space, self._storage, self._settings = space, storage, settings or Settings()
        self.name = f"{_title(space.task)} {space.digest}"
        self._study = optuna.create_study(
            study_name=self.name, storage=storage, sampler=self._sampler(), direction="minimize", load_if_exists=True
        )
        self._results: dict[Choice, Measurement] = {}
        self._read: set[int] = set()
        self._seen_alive: dict[int, tuple[int, float]] = {}
        self._dropped: set[Arm] = set()
        self._current: int | None = None
        self._heart = _Heart(self._beat)
        self._last_sweep = -float("inf")

    def seed(self, choices: Sequence[Choice]) -> None:
        """Queues choices to be tried first, unless they were, or are queued."""
        for choice in choices:
            self._study.enqueue_trial(self._params(choice), skip_if_exists=True)

    def results(self) -> dict[Choice, Measurement]:
        """What came of every choice that was tried, by anyone."""
        import optuna

        finished = optuna.trial.TrialState
        states = (finished.COMPLETE, finished.PRUNED, finished.FAIL)
        for trial in self._study.get_trials(deepcopy=False, states=states):
            if trial.number not in self._read and "outcome" in trial.user_attrs:
                self._read.add(trial.number)
                self._results[Choice.from_text(trial.user_attrs["choice"])] = _outcome(trial.user_attrs["outcome"])
        return self._results

    def drop(self, arm: Arm) -> None:
        """Proposes no more of a kernel."""
        self._dropped.add(arm)

    def next(self) -> Trial | None:
        """A choice that nobody tried yet; None when there is none left."""
        if time.monotonic() - self._last_sweep >= BEAT_S:
            self.hand_on()
        known, busy = self.results(), self._being_tried()
        for _ in range(_PATIENCE + self._n_waiting()):
            with _experiments_allowed():
                asked = self._study.ask()
                choice = self._suggested(asked)
            is_new = choice not in known and choice not in busy and choice.arm not in self._dropped
            if is_new and self._space.refusal(choice) is None:
                return self._taken(asked, choice)
            self._close_known(asked, known.get(choice))
        untried = next((choice for choice in self._shuffled() if choice not in known and choice not in busy), None)
        if untried is None:
            return None
        self._study.enqueue_trial(self._params(untried))
        # It is taken from the queue by the next call, by whoever calls first.
        return self.next()

    def tell(self, trial: Trial, found: Measurement) -> None:
        """Ends a trial with what came of it."""
        import optuna

        self._heart.stop()
        self._current = None
        identity = self._trial_id(trial.number)
        self._storage.set_trial_user_attr(identity, "outcome", _outcome_row(found))
        self._results[trial.choice] = found
        self._read.add(trial.number)
        state = optuna.trial.TrialState
        if found.timings_us:
            self._study.tell(trial.number, found.us, skip_if_finished=True)
        else:
            self._study.tell(trial.number, state=state.FAIL if found.failure else state.PRUNED, skip_if_finished=True)

    def close(self) -> None:
        """Gives back the trial in hand, for others or for later."""
        import optuna

        self._heart.stop()
        if self._current is not None:
            number, self._current = self._current, None
            self._storage.set_trial_user_attr(self._trial_id(number), "is_given_back", True)
            self._study.tell(number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
        remove = getattr(self._storage, "remove_session", None)
        if remove is not None:
            remove()

    def decide(self, found: Decided) -> None:
        """Notes who won, by all results up to now."""
        row = {"winner": found.winner.to_text(), "winner_us": found.winner_us}
        default_us = found.default_us if math.isfinite(found.default_us) else None
        self._study.set_user_attr("decided", row | {"default_us": default_us, "results": len(self.results())})

    def decided(self) -> Decided | None:
        """Who won, where nothing was tried since."""
        found = self._study.user_attrs.get("decided")
        if found is None or found["results"] != len(self.results()):
            return None
        default_us = math.inf if found["default_us"] is None else float(found["default_us"])
        return Decided(Choice.from_text(found["winner"]), float(found["winner_us"]), default_us)

    def n_running_elsewhere(self) -> int:
        import optuna

        running = self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        return sum(trial.number != self._current for trial in running)

    # Proposals.

    def _sampler(self) -> optuna.samplers.BaseSampler:
        import optuna

        seed = self._settings.seed
        if self._settings.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        with _experiments_allowed():
            return optuna.samplers.TPESampler(
                n_startup_trials=self._settings.startup, multivariate=True, group=True, constant_liar=True, seed=seed
            )

    def _suggested(self, trial: optuna.Trial) -> Choice:
        arms = {str(arm): arm for arm in self._space.arms}
        arm = arms[str(trial.suggest_categorical("arm", list(arms)))]
        items = []
        for tunable in self._space.tunables(arm):
            at = trial.suggest_int(_param(arm, tunable.name), 0, len(tunable.values) - 1)
            items.append((tunable.name, tunable.values[at]))
        return Choice(arm, Config(tuple(items)))

    def _params(self, choice: Choice) -> dict[str, Any]:  # optuna's parameters: text and numbers
        params: dict[str, Any] = {"arm": str(choice.arm)}
        for tunable in self._space.tunables(choice.arm):
            params[_param(choice.arm, tunable.name)] = tunable.values.index(choice.config[tunable.name])
        return params

    def _shuffled(self) -> list[Choice]:
        import random

        found = [choice for choice in self._space.choices() if choice.arm not in self._dropped]
        random.Random(self._settings.seed).shuffle(found)
        return found

    def _n_waiting(self) -> int:
        import optuna

        return len(self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))

    def _being_tried(self) -> set[Choice]:
        import optuna

        running = self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        return {Choice.from_text(each.user_attrs["choice"]) for each in running if "choice" in each.user_attrs}

    def _close_known(self, asked: optuna.Trial, found: Measurement | None) -> None:
        """Ends a trial that needs no measuring; the sampler learns from it all the same."""
        import optuna

        if found is not None and found.timings_us:
            self._study.tell(asked, found.us)
        else:
            self._study.tell(asked, state=optuna.trial.TrialState.PRUNED)

    def _taken(self, asked: optuna.Trial, choice: Choice) -> Trial:
        asked.set_user_attr("choice", choice.to_text())
        asked.set_user_attr("owner", _this_process())
        self._current = asked.number
        self._heart.start()
        return Trial(asked.number, choice)

    # Signs of life.

    def _beat(self, count: int) -> None:
        number = self._current
        if number is not None:
            self._storage.set_trial_user_attr(self._trial_id(number), "beat", count)

    def _trial_id(self, number: int) -> int:
        study_id = self._storage.get_study_id_from_name(self.name)
        return self._storage.get_trial_id_from_study_id_trial_number(study_id, number)

    def hand_on(self) -> bool:
        """Queues again what processes that are gone were trying; whether any of that waits to be tried."""
        import optuna

        self._last_sweep = time.monotonic()
        states = optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            if trial.number != self._current and self._is_dead(trial):
                logger.info("trial %d of %s was left by a process that is gone", trial.number, self.name)
                self._study.tell(trial.number, state=states.FAIL, skip_if_finished=True)
        trials = self._study.get_trials(deepcopy=False)
        handed_on = {trial.user_attrs.get("retry_of") for trial in trials}
        for trial in trials:
            if trial.state != states.FAIL or "outcome" in trial.user_attrs or trial.number in handed_on:
                continue
            # What was given back unfinished is held against nobody.
            retries = int(trial.user_attrs.get("retries", 0)) + (not trial.user_attrs.get("is_given_back", False))
            if "choice" not in trial.user_attrs:
                continue
            choice = Choice.from_text(trial.user_attrs["choice"])
            if retries > _MOST_RETRIES:
                given_up = Measurement(failure="launch", reason="it ended the process that tried it, twice")
                self._results.setdefault(choice, given_up)
                continue
            # A choice that is no longer in the space, of an older template, is nobody's to try.
            if self._space.refusal(choice) is None:
                attributes = {"retry_of": trial.number, "retries": retries}
                self._study.enqueue_trial(self._params(choice), user_attrs=attributes)
        waiting = self._study.get_trials(deepcopy=False, states=(states.WAITING,))
        return any("retry_of" in trial.user_attrs for trial in waiting)

    def _is_dead(self, trial: optuna.trial.FrozenTrial) -> bool:
        owner, count = trial.user_attrs.get("owner", ""), int(trial.user_attrs.get("beat", 0))
        place, _, process = owner.rpartition(" ")
        if owner and place == _this_place():
            return not _is_running(process)
        before = self._seen_alive.get(trial.number)
        if before is None or before[0] != count:
            self._seen_alive[trial.number] = (count, time.monotonic())
            return False
        return time.monotonic() - before[1] > DEAD_AFTER_S


def _title(task: Task) -> str:
    return f"sparsec {task.device.key} {task.digest}"


def n_tried(task: Task, storage: optuna.storages.BaseStorage) -> int:
    """How much was tried for a task, whatever its space was then: without planning it."""
    studies = [each for each in storage.get_all_studies() if each.study_name.startswith(_title(task))]
    return max((storage.get_n_trials(each._study_id) for each in studies), default=0)


def forget(task: Task, storage: optuna.storages.BaseStorage) -> None:
    """Removes what a storage knows of a task; records stay."""
    for each in storage.get_all_studies():
        if each.study_name.startswith(_title(task)):
            storage.delete_study(each._study_id)


class _Heart:
    """Counts up, in a thread of its own, from `start` to `stop`."""

    def __init__(self, beat: Callable[[int], None]) -> None:
        self._beat = beat
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._stop,), daemon=True, name="sparsec-beat")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, stop: threading.Event) -> None:
        count = 0
        while not stop.wait(BEAT_S):
            count += 1
            try:
                self._beat(count)
            # A storage that does not answer for a moment must not end the trial: the next beat tries again.
            except Exception as error:
                logger.debug("a sign of life was not written: %s", error)


def _param(arm: Arm, tunable: str) -> str:
    return f"{arm.template} {arm.backend} {tunable}"


def _outcome_row(found: Measurement) -> dict[str, Any]:
    return {
        "timings_us": list(found.timings_us),
        "failure": found.failure,
        "reason": found.reason,
        "estimate_us": found.estimate_us,
        "is_passed_over": found.is_passed_over,
    }


def _outcome(row: dict[str, Any]) -> Measurement:
    return Measurement(**{**row, "timings_us": tuple(row["timings_us"])})


# Processes.


def _this_place() -> str:
    """Where a process number means this machine's processes: the boot, and the name space of process numbers."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _this_process() -> str:
    return f"{_this_place()} {os.getpid()}:{_started_at(os.getpid())}"


def _is_running(process: str) -> bool:
    number, _, started = process.partition(":")
    return number.isdigit() and _started_at(int(number)) == started


def _started_at(pid: int) -> str:
    """When a process began, in the kernel's ticks; "" where there is none: numbers are given out again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
