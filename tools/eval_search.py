"""How well a search searches: every configuration is measured once, and those timings are searched again and again.

    python tools/eval_search.py exhaust tools/jobs/cpu.yaml --into tables --match nat   # measure every configuration
    python tools/eval_search.py replay tables                                          # search settings against that

`exhaust` enumerates the space of each matching job on the device that is here, and keeps every timing as records in a
folder of its own. `replay` searches those timings again with each of several settings and seeds, without a device: the
regret after 40 trials against the exhaustive best, and the trials until one came within 5 % of it. What `sparsec tune`
uses is held against the aim, on the spaces that have more configurations than trials: the others are searched whole.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import click
from bench.script import Aim, finish, json_option

from sparsec.cli.console import out, show
from sparsec.device import detect_cpu
from sparsec.errors import SparsecError
from sparsec.records import RecordBase
from sparsec.report import Column, table
from sparsec.tuning.fleet import spaces_in
from sparsec.tuning.jobs import Entry, Fleet, read_jobs
from sparsec.tuning.measure import Look
from sparsec.tuning.recording import Recorder, recorded_results
from sparsec.tuning.replay import Replayed, replay
from sparsec.tuning.space import Space
from sparsec.tuning.studies import Settings
from sparsec.tuning.worker import WorkerMeasurer, default_limits

MOST_REGRET = 0.05
# What is compared. The first is what `sparsec tune` uses.
SETTINGS = {
    "tpe, 6 random first": Settings("tpe", 6),
    "tpe, none": Settings("tpe", 0),
    "tpe, 12 random first": Settings("tpe", 12),
    "random": Settings("random"),
}


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("jobs", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder for records.")
@click.option("--match", multiple=True, help="Only jobs whose title has this in it; may be repeated.")
@click.option("--seconds", default=0.3, show_default=True, help="Of timed runs of each configuration.")
@click.option("--most", default=200, show_default=True, help="Spaces with more points are left out.")
@click.option("--budget", default=math.inf, help="Begins no other space after so many seconds.")
def exhaust(jobs: Path, into: Path, match: tuple[str, ...], seconds: float, most: int, budget: float) -> None:
    """Measures every configuration of each matching job."""
    base, begun = RecordBase([], into), time.monotonic()
    for title, space in _spaces(read_jobs(jobs), match):
        if time.monotonic() - begun > budget:
            click.echo(f"{title}: no time left", err=True)
            continue
        choices = list(itertools.islice(space.choices(), most + 1))
        if len(choices) > most:
            click.echo(f"{title}: more than {most} configurations; left out", err=True)
            continue
        started = time.monotonic()
        measurer = WorkerMeasurer(space, "cpu", default_limits(space.task))
        recorder = Recorder(space, base)
        try:
            for choice in choices:
                found = measurer.measure(choice, Look(runs=5, seconds=seconds))
                recorder.tried(choice, found)
        finally:
            measurer.close()
        click.echo(f"{title}: {len(choices)} configurations in {time.monotonic() - started:.0f} s", err=True)


@main.command("replay")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--jobs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=Path("tools/jobs/cpu.yaml"),
    show_default=True,
)
@click.option("--match", multiple=True, help="Only jobs whose title has this in it; may be repeated.")
@click.option("--trials", default=40, show_default=True)
@click.option("--seeds", default=5, show_default=True)
@json_option
def replay_command(
    folder: Path, jobs: Path, match: tuple[str, ...], trials: int, seeds: int, path: Path | None
) -> None:
    """Searches recorded timings with each setting."""
    records = list(RecordBase([], folder).records())
    rows: dict[str, list[Replayed]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for title, space in _spaces(read_jobs(jobs), match):
        recorded = recorded_results(space, records)
        known = {choice.arm for choice in recorded}
        whole = space.only(tuple(arm for arm in space.arms if arm in known))
        if not recorded or space.default not in recorded:
            continue
        sizes[title] = len(recorded)
        for (name, settings), seed in itertools.product(SETTINGS.items(), range(seeds)):
            rows[name].append(replay(whole, recorded, trials, replace(settings, seed=seed)))
    if not sizes:
        raise click.ClickException(f"{folder} has no records of the jobs in {jobs}; run `exhaust` first")
    click.echo(
        f"{len(sizes)} spaces of {min(sizes.values())} to {max(sizes.values())} configurations, {seeds} seeds each"
    )
    told = [_Setting.of(name, each) for name, each in rows.items()]
    console = out()
    titles = ("setting", "median regret", "worst", "trials to within 5 %", "never")
    columns = [Column(title, "right" if number else "left") for number, title in enumerate(titles)]
    show(console, table(columns, [each.cells for each in told], console))
    is_large = [n > trials for n in sizes.values() for _ in range(seeds)]
    regrets = [one.regret for one, large in zip(rows[next(iter(SETTINGS))], is_large, strict=True) if large]
    what = f"median regret after {trials} trials, on {sum(n > trials for n in sizes.values())} spaces of more:"
    aims = [Aim(what, median(regrets) if regrets else None, at_most=MOST_REGRET)]
    finish(aims, {"trials": trials, "seeds": seeds, "spaces": sizes, "settings": [asdict(each) for each in told]}, path)


@dataclass(frozen=True)
class _Setting:
    """How a setting did on all spaces and seeds; a regret of 0.05 is five per cent."""

    setting: str
    median_regret: float
    worst_regret: float
    trials_to_near: float | None
    never_near: int

    @classmethod
    def of(cls, name: str, each: Sequence[Replayed]) -> _Setting:
        regrets = [one.regret for one in each]
        reached = [one.trials_to_near for one in each if one.trials_to_near is not None]
        never = len(each) - len(reached)
        return cls(name, median(regrets), max(regrets), median(reached) if reached else None, never)

    @property
    def cells(self) -> tuple[str, ...]:
        near = "" if self.trials_to_near is None else f"{self.trials_to_near:.0f}"
        return self.setting, f"{self.median_regret:.1%}", f"{self.worst_regret:.1%}", near, str(self.never_near)


def _spaces(fleet: Fleet, match: tuple[str, ...]) -> Iterator[tuple[str, Space]]:
    entries: list[Entry] = [entry for entry in fleet.entries if not match or any(each in str(entry) for each in match)]
    for entry in entries:
        try:
            yield from spaces_in(entry, detect_cpu())
        except SparsecError as error:
            click.echo(f"{entry}: {str(error).splitlines()[0]}", err=True)


if __name__ == "__main__":
    main()
