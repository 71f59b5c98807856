"""Whether searching pays, and how well it searches: three figures, from three commands.

    python tools/eval_search.py exhaust tools/jobs/cpu.yaml --into tables --match window   # measure every configuration
    python tools/eval_search.py replay tables                                             # search settings against that
    python tools/eval_search.py default tools/jobs/cpu.yaml                               # tuned against the default

`exhaust` enumerates the space of each matching job on the device that is here, and keeps every timing as records in a
folder of its own. `replay` searches those timings again with each of several settings and seeds, without a device: the
regret after 40 trials against the exhaustive best, and the trials until one came within 5 % of it. `default` takes what
the user's records say of each job and runs it in turns with the default: tuned over default, worst and mean.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import click

from sparsec.cli.console import out, show
from sparsec.device import detect_cpu
from sparsec.errors import SparsecError
from sparsec.planner import plan
from sparsec.records import RecordBase, database
from sparsec.tuning.fleet import spaces_in
from sparsec.tuning.jobs import Entry, Fleet, read_jobs
from sparsec.tuning.measure import Look
from sparsec.tuning.recording import Recorder, recorded_results
from sparsec.tuning.replay import Replayed, replay
from sparsec.tuning.space import Arm, Choice, Space
from sparsec.tuning.studies import Settings
from sparsec.tuning.worker import WorkerMeasurer, default_limits

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
@click.option("--match", default="", help="Only jobs whose title has this in it.")
@click.option("--seconds", default=0.3, show_default=True, help="Of timed runs of each configuration.")
@click.option("--most", default=200, show_default=True, help="Spaces with more points are left out.")
def exhaust(jobs: Path, into: Path, match: str, seconds: float, most: int) -> None:
    """Measures every configuration of each matching job."""
    base = RecordBase([], into)
    for title, space in _spaces(read_jobs(jobs), match):
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
@click.option("--trials", default=40, show_default=True)
@click.option("--seeds", default=5, show_default=True)
def replay_command(folder: Path, jobs: Path, trials: int, seeds: int) -> None:
    """Searches recorded timings with each setting."""
    records = list(RecordBase([], folder).records())
    rows: dict[str, list[Replayed]] = defaultdict(list)
    n_spaces = 0
    for _, space in _spaces(read_jobs(jobs), ""):
        recorded = recorded_results(space, records)
        known = {choice.arm for choice in recorded}
        whole = space.only(tuple(arm for arm in space.arms if arm in known))
        if not recorded or space.default not in recorded:
            continue
        n_spaces += 1
        for (name, settings), seed in itertools.product(SETTINGS.items(), range(seeds)):
            rows[name].append(replay(whole, recorded, trials, replace(settings, seed=seed)))
    if not n_spaces:
        raise click.ClickException(f"{folder} has no records of the jobs in {jobs}; run `exhaust` first")
    _show_replays(rows, n_spaces, trials, seeds)


def _show_replays(rows: dict[str, list[Replayed]], n_spaces: int, trials: int, seeds: int) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("setting")
    for name in ("median regret", "worst", "trials to within 5 %", "never"):
        table.add_column(name, justify="right")
    for name, each in rows.items():
        regrets = [one.regret for one in each]
        reached = [one.trials_to_near for one in each if one.trials_to_near is not None]
        table.add_row(
            name,
            f"{median(regrets):.1%}",
            f"{max(regrets):.1%}",
            f"{median(reached):.0f}" if reached else "",
            str(len(each) - len(reached)),
        )
    click.echo(f"{n_spaces} spaces, {seeds} seeds each, {trials} trials")
    show(out(), table)


@main.command()
@click.argument("jobs", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--match", default="", help="Only jobs whose title has this in it.")
@click.option("--seconds", default=2.0, show_default=True, help="Of each contest.")
@click.option("--rounds", default=31, show_default=True)
def default(jobs: Path, match: str, seconds: float, rounds: int) -> None:
    """Runs what the records say in turns with the default."""
    from rich.table import Table

    base, table = database(), Table(box=None, pad_edge=False)
    for name, side in (
        ("job", "left"),
        ("default", "right"),
        ("tuned", "right"),
        ("gain", "right"),
        ("tuned to", "left"),
    ):
        table.add_column(name, justify=side, overflow="fold")
    gains = []
    for title, space in _spaces(read_jobs(jobs), match):
        tuned = _by_records(space, base)
        if tuned is None or tuned == space.default:
            gains.append(1.0)
            table.add_row(title, "", "", "1.00×", "the default" if tuned else "no record")
            continue
        measurer = WorkerMeasurer(space, "cpu", default_limits(space.task))
        try:
            before, after = measurer.compare([space.default, tuned], rounds, seconds)
        finally:
            measurer.close()
        gains.append(before.us / after.us)
        table.add_row(title, f"{before.us / 1e3:.2f} ms", f"{after.us / 1e3:.2f} ms", f"{gains[-1]:.2f}×", str(tuned))
    show(out(), table)
    mean = math.exp(sum(map(math.log, gains)) / len(gains))
    click.echo(f"\ntuned over default: worst {min(gains):.2f}×, mean {mean:.2f}×, best {max(gains):.2f}×")


def _by_records(space: Space, base: RecordBase) -> Choice | None:
    """What a plan by the records runs, where that is one launch."""
    task = space.task
    made = plan(task.bound, task.problem, task.device, records=base)
    group = made.groups[0]
    launches = group.backward_launches if task.direction == "backward" else tuple(step.launch for step in group.steps)
    if len(launches) != 1:
        return None
    launch = launches[0]
    return Choice(Arm(launch.template.name, launch.backend, launch.work.ordering.name), launch.config)


def _spaces(fleet: Fleet, match: str) -> Iterator[tuple[str, Space]]:
    entries: list[Entry] = [entry for entry in fleet.entries if match in str(entry)]
    for entry in entries:
        try:
            yield from spaces_in(entry, detect_cpu())
        except SparsecError as error:
            click.echo(f"{entry}: {str(error).splitlines()[0]}", err=True)


if __name__ == "__main__":
    main()
