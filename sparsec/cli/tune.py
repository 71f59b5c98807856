"""`sparsec tune`: measures a mask, or a fleet of them, and remembers what was fastest.

This file decides the options, which storage a job has by default, and how progress and results are shown. Several
workers are this same program, started again, telling what they do in lines of JSON. It must not know how anything is
searched or measured.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import click

from sparsec.cli.arguments import read_mask
from sparsec.cli.console import err, out, show, waiting
from sparsec.cli.planning import shape_options

if TYPE_CHECKING:
    from rich.table import Table

    from sparsec.device import Device
    from sparsec.tuning.fleet import Progress, Terms
    from sparsec.tuning.jobs import Fleet

_UNITS_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TRIALS: Final = 60
# Tasks that a live table shows.
_SHOWN: Final = 12
_REFRESH_S: Final = 0.25
_EXAMPLES: Final = """\b
Examples:
  sparsec tune 'window(255, 0) | global_tokens(16)' --seq-len 16384 --heads 8 --dtype bf16
  sparsec tune tools/jobs/cpu.yaml --budget 30m
  sparsec tune tools/jobs/h100.yaml --workers 8 --storage postgresql://tuner@host/tuning
  sparsec tune --calibrate
"""


# Titles of the table of progress, and those whose cells are numbers.
_TITLES: Final = ("task", "state", "tried", "failed", "default", "best", "gain", "best so far")
_NUMBERS: Final = _TITLES[2:7]


class _Duration(click.ParamType[float]):
    """Seconds, written as `90s`, `30m`, `2h`."""

    name = "duration"

    # Any: as click has it.
    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value).strip())
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is no time; write 90s, 30m or 2h", parameter, context)
        return float(match[1]) * _UNITS_S[match[2] or "s"]


@dataclass(frozen=True, slots=True)
class _Options:
    """The command's options, as they were given."""

    seq_len: int | None
    kv_len: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    v_dim: int | None
    batch: int | None
    dtype: str
    needs_grad: bool
    device: str | None
    budget: float
    trials: int
    timeout: float
    workers: int
    storage: str | None
    resume: bool
    is_dry: bool
    is_calibration: bool
    worker: str | None


def _time(name: str, default: str, text: str) -> Callable[[Any], Any]:  # Any: a command as click takes it
    return click.option(name, type=_Duration(), default=default, show_default=True, metavar="TIME", help=text)


@click.command(short_help="Measure what is fastest, and remember it.", epilog=_EXAMPLES)
@click.argument("what", metavar="[MASK|JOBS.yaml]", required=False)
@shape_options
@click.option("--needs-grad", is_flag=True, help="Tune the backward pass too.")
@click.option(
    "--device", metavar="NAME", help="One of `sparsec devices`, which must be here; the job file's by default."
)
@_time("--budget", "10m", "In all: 90s, 30m, 2h.")
@click.option("--trials", type=click.IntRange(1), default=_TRIALS, show_default=True, help="Of each task, at most.")
@_time("--timeout", "2m", "Of one trial, compiling included.")
@click.option(
    "--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes; one GPU each in turn."
)
@click.option(
    "--storage",
    metavar="FILE|URL",
    help="Where workers share what they know: a file, sqlite://, postgresql:// or mysql://; one in the cache if none.",
)
@click.option(
    "--resume/--no-resume", default=True, show_default=True, help="Go on where an earlier run of the job was."
)
@click.option(
    "--dry-run", "is_dry", is_flag=True, help="Say what would be searched; needs neither torch nor the device."
)
@click.option(
    "--calibrate", "is_calibration", is_flag=True, help="Measure the device's own ceilings for the cost model."
)
@click.option("--worker", hidden=True, help="Which of several workers this is: 2/8.")
def tune(what: str | None, **options: Any) -> None:  # Any: click's options
    """Measures what is fastest for MASK, or for every job of a file, and remembers it.

    Every configuration is checked against the reference before it is timed, in a process that may crash or hang
    without harm. The default is always a contestant, and what is nearer to it than noise loses to it.
    """
    told = _Options(**options)
    if told.is_calibration:
        from sparsec.cli.calibrate import calibrate

        target = _device(told) or _named_device("cpu")
        calibrate(target, _where(target, 0))
    if what is None:
        if not told.is_calibration:
            raise click.UsageError("say what to tune: a mask, or a job file such as tools/jobs/cpu.yaml")
        return
    fleet = _fleet(what, told)
    if told.is_dry:
        _show_plan(fleet)
    elif told.worker is not None:
        _work(fleet, told)
    else:
        _run(fleet, told)
    if fleet.problems:
        for problem in fleet.problems:
            click.echo(f"Error: {problem}", err=True)
        raise click.exceptions.Exit(1)


def _device(told: _Options) -> Device | None:
    """The device that was named."""
    from sparsec.errors import SparsecError

    try:
        return None if told.device is None else _named_device(told.device)
    except SparsecError as error:
        raise click.BadParameter(str(error), param_hint="'--device'") from error


def _named_device(name: str) -> Device:
    from sparsec.device import device

    return device(name)


def _fleet(what: str, told: _Options) -> Fleet:
    from sparsec.tuning.jobs import Fleet, one_job, read_jobs

    target = _device(told)
    if _is_job_file(what):
        return read_jobs(Path(what), target)
    shape = {
        "length": told.seq_len,
        **{name: getattr(told, name) for name in ("kv_len", "heads", "kv_heads", "head_dim", "v_dim", "batch")},
        "dtype": told.dtype,
        "needs_grad": told.needs_grad,
    }
    entries = one_job(what, read_mask(what), shape)
    return Fleet("", target or _named_device("cpu"), tuple(entries), ())


def _is_job_file(what: str) -> bool:
    """Whether a YAML file holds jobs; one that holds a mask is a mask."""
    path = Path(what)
    if path.suffix.lower() not in (".yaml", ".yml"):
        return False
    from sparsec import data

    document = data.read_yaml(path)
    return isinstance(document, dict) and "mask" not in document


def _terms(told: _Options, device: Device) -> Terms:
    from sparsec.tuning.fleet import Terms

    number, _, count = (told.worker or "0/1").partition("/")
    return Terms(
        seconds=told.budget,
        trials=told.trials,
        timeout_s=told.timeout,
        storage=told.storage or _own_storage(),
        where=_where(device, int(number)),
        offset=int(number) / int(count),
        is_fresh=not told.resume,
    )


def _own_storage() -> str:
    """One file for all jobs of this user's: a study is named by its task, whichever file asked for it."""
    from sparsec import data

    return str(data.cache_dir() / "studies.journal")


def _where(device: Device, number: int) -> str:
    """The torch device of a worker: the processor, or one GPU for each in turn."""
    if device.kind == "cpu":
        return "cpu"
    import torch

    return f"cuda:{number % max(torch.cuda.device_count(), 1)}"


# What would be done.


def _show_plan(fleet: Fleet) -> None:
    from sparsec.errors import SparsecError
    from sparsec.report import Column, table
    from sparsec.tuning.fleet import spaces_in

    rows: list[tuple[str, str, str, str]] = []
    with waiting("planning"):
        for entry in fleet.entries:
            try:
                for title, space in spaces_in(entry, fleet.device):
                    rows.append((title, str(len(space.arms)), str(space.size), str(space.default)))
            except SparsecError as error:
                rows.append((str(entry), "", "", str(error).splitlines()[0]))
    console = out()
    click.echo(f"{len(fleet.entries)} jobs for {fleet.device.name} ({fleet.device.key})\n")
    columns = [Column("task"), Column("kernels", "right"), Column("points", "right"), Column("default")]
    show(console, table(columns, rows, console))


# Running.


def _work(fleet: Fleet, told: _Options) -> None:
    """One of several workers: progress goes to stdout, a line each."""
    from sparsec.records import database
    from sparsec.tuning.fleet import run_fleet

    def tell(progress: Progress) -> None:
        finite = {name: value for name, value in asdict(progress).items() if value != math.inf}
        click.echo(json.dumps(finite))

    run_fleet(fleet.entries, fleet.device, _terms(told, fleet.device), database(), tell)


def _run(fleet: Fleet, told: _Options) -> None:
    from sparsec.records import database
    from sparsec.tuning.fleet import run_fleet

    terms = _terms(told, fleet.device)
    board = _Board([str(entry) for entry in fleet.entries], told.budget)
    try:
        with board.shown():
            if told.workers == 1:
                run_fleet(fleet.entries, fleet.device, terms, database(), board.take)
            else:
                _run_workers(fleet, terms, told.workers, board)
    finally:
        board.summary()
    if not board.has_done and fleet.entries:
        raise click.ClickException("nothing was tuned; see above")


def _run_workers(fleet: Fleet, terms: Terms, workers: int, board: _Board) -> None:
    """Starts workers and takes what they tell, until all have ended."""
    from sparsec.tuning.fleet import prepared_storage

    # What would stop every worker is said once, here.
    prepared_storage(fleet.entries, fleet.device, terms)
    command = [sys.executable, "-m", "sparsec.cli", *_without_workers(sys.argv[1:])]
    processes = [
        subprocess.Popen([*command, "--worker", f"{n}/{workers}"], stdout=subprocess.PIPE, text=True)
        for n in range(workers)
    ]
    threads = [threading.Thread(target=_listen, args=(each.stdout, board), daemon=True) for each in processes]
    try:
        for thread in threads:
            thread.start()
        for number, process in enumerate(processes):
            if process.wait() != 0:
                board.note(f"worker {number} ended with status {process.returncode}; others go on with what it had")
        for thread in threads:
            thread.join()
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.terminate()


def _without_workers(arguments: Sequence[str]) -> list[str]:
    """The command line of one worker: studies that were to be forgotten are forgotten already."""
    kept = [each for each in arguments if each != "--no-resume"]
    if "--workers" in kept:
        at = kept.index("--workers")
        del kept[at : at + 2]
    return [each for each in kept if not each.startswith("--workers=")]


def _listen(lines: IO[str] | None, board: _Board) -> None:
    from sparsec.tuning.fleet import Progress

    names = {each.name for each in fields(Progress)}
    for line in lines or ():
        with suppress(json.JSONDecodeError):
            told = json.loads(line)
            if isinstance(told, dict) and told.keys() <= names:
                board.take(Progress(**told))


@dataclass
class _Row:
    """What is known of a task."""

    state: str = "waiting"
    measured: int = 0
    failed: int = 0
    default_us: float = math.inf
    best_us: float = math.inf
    note: str = ""
    failures: list[str] = field(default_factory=list)


class _Board:
    """Progress as a live table on stderr, and as a summary on stdout when all is over."""

    def __init__(self, titles: Sequence[str], budget_s: float) -> None:
        self._rows = {title: _Row() for title in titles}
        self._notes: list[str] = []
        self._lock = threading.Lock()
        self._started, self._budget_s = time.monotonic(), budget_s
        self._latest: list[str] = []
        self._is_live = False

    def take(self, progress: Progress) -> None:
        with self._lock:
            row = self._rows.setdefault(progress.task, _Row())
            row.state = {"begun": "tuning", "tried": "tuning", "done": "done", "failed": "failed"}[progress.stage]
            if progress.stage != "begun":
                row.measured, row.failed = max(row.measured, progress.measured), max(row.failed, progress.failed)
                row.default_us, row.best_us = progress.default_us, progress.best_us
                row.note = progress.note if progress.stage in ("done", "failed") else progress.best
            if progress.stage == "tried" and progress.note:
                row.failures.append(progress.note)
            self._latest = [progress.task, *(each for each in self._latest if each != progress.task)]
            is_told = progress.stage in ("done", "failed") and not self._is_live
            line = f"{progress.task}: {_gain(row)}, {row.measured} measured" if is_told else ""
        if line:
            click.echo(line, err=True)

    def note(self, text: str) -> None:
        with self._lock:
            self._notes.append(text)
        click.echo(text, err=True)

    @property
    def has_done(self) -> bool:
        return any(row.state == "done" for row in self._rows.values())

    def shown(self) -> Any:  # Any: a context of rich's, or none
        from contextlib import nullcontext

        console = err()
        if not console.is_terminal:
            return nullcontext()
        from rich.live import Live

        self._is_live = True
        return Live(get_renderable=self._live, console=console, refresh_per_second=1 / _REFRESH_S, transient=True)

    def _live(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        with self._lock:
            done = sum(row.state in ("done", "failed") for row in self._rows.values())
            elapsed = time.monotonic() - self._started
            table = Table(box=None, pad_edge=False)
            for title in _TITLES:
                # Names are folded where the terminal is narrow, so that the figures stay.
                is_words = title in (_TITLES[0], _TITLES[-1])
                table.add_column(title, justify="right" if title in _NUMBERS else "left", no_wrap=not is_words)
            for title in self._latest[:_SHOWN]:
                table.add_row(*_cells(title, self._rows[title]))
            whole = Table.grid(padding=(0, 1))
            whole.add_row(
                f"{done} of {len(self._rows)} tasks",
                ProgressBar(total=self._budget_s, completed=min(elapsed, self._budget_s), width=30),
                f"{elapsed:.0f} of {self._budget_s:.0f} s",
            )
        frame = Table.grid()
        frame.add_row(whole)
        frame.add_row(table)
        return frame

    def summary(self) -> None:
        from sparsec.report import Column, table

        columns = [Column(title, "right" if title in _NUMBERS else "left") for title in _TITLES]
        done = {title: row for title, row in self._rows.items() if row.state != "waiting"}
        console = out()
        show(console, table(columns, [_cells(title, row) for title, row in done.items()], console))
        gains = [row.default_us / row.best_us for row in done.values() if row.state == "done" and _is_known(row)]
        parts = []
        if gains:
            mean = math.exp(sum(math.log(gain) for gain in gains) / len(gains))
            better = sum(gain > 1.0 for gain in gains)
            parts.append(f"{better} of {len(gains)} tasks are faster than the default, {mean:.2f}× in the mean")
        unfinished = sum(row.state in ("waiting", "tuning") for row in self._rows.values())
        if unfinished:
            parts.append(f"{unfinished} not finished: the same command goes on from here")
        failed = sum(row.failed for row in done.values())
        if failed:
            parts.append(f"{failed} trials failed")
        click.echo("; ".join(parts) or "nothing was measured")
        for row in done.values():
            for failure in row.failures[:3]:
                click.echo(f"  {failure}", err=True)


def _is_known(row: _Row) -> bool:
    return math.isfinite(row.default_us) and math.isfinite(row.best_us)


def _gain(row: _Row) -> str:
    if row.state == "failed":
        return row.note
    if not _is_known(row):
        return "the default was not measured"
    gain = row.default_us / row.best_us
    return f"{gain:.2f}× the default" if gain > 1.0 else "the default stays"


def _cells(title: str, row: _Row) -> tuple[str, ...]:
    from sparsec.planner.words import duration

    gain = f"{row.default_us / row.best_us:.2f}×" if _is_known(row) else ""
    times = (duration(us) if math.isfinite(us) else "" for us in (row.default_us, row.best_us))
    return title, row.state, str(row.measured), str(row.failed), *times, gain, row.note
