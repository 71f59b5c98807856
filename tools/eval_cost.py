"""How far the cost model is off, over all records; and how often the template it would choose is the best one.

    python tools/eval_cost.py                      # by shipped records and the user's own
    python tools/eval_cost.py folder               # by those of some folders
    python tools/eval_cost.py --grid cpu_forward   # by measuring the masks of a grid
    python tools/eval_cost.py --grid gpu_masks --device gpu

From records: of each that keeps what the model said of it, measured over estimated, by template, back end and dtype;
and of every mask on which several templates were measured, whether the one the model puts first is within 15 % of the
fastest (on a GPU 20 %), each at its best.

With `--grid` the masks of a grid are measured. The plan that the model makes without records takes turns with every
other template and order of tokens, each in the configuration that the model gives it; all are checked against fp64
first. Left out is only what the model puts at many times the best and at more than half a second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles

import click
from bench.grid import Case, find_grid, load_grid
from bench.script import Aim, budget_option, finish, in_time, json_option
from bench.workload import bound_mask, problem

from sparsec.cli.console import out, show, waiting
from sparsec.device import detect_cpu, detect_gpu
from sparsec.errors import SparsecError
from sparsec.records import RecordBase, TuningRecord, database
from sparsec.report import Column, table
from sparsec.tuning.measure import Look
from sparsec.tuning.space import Arm, Choice, Space, Task, planned_group
from sparsec.tuning.worker import Host, WorkerMeasurer, default_limits

# A template counts as well chosen when it is this near the best.
NEAR, NEAR_ON_GPU = 1.15, 1.20
# And it should be in so many cases.
MOST_CASES = 0.9
_ROUNDS = 15
# What should take longer, and many times what the best does, is not run to see whether it does.
_LONGEST_US = 5e5


@dataclass(frozen=True)
class Error:
    """Measured over estimated, for one kind of kernel.

    Attributes:
        kernel: Template, back end, direction and dtype, and the device.
        records: How many.
        median: 1 is right on average; above, the model is too hopeful.
        spread: Half of the records are within this factor of the median.
    """

    kernel: str
    records: int
    median: float
    spread: float


@dataclass(frozen=True)
class Chosen:
    """One mask on which several templates were measured.

    Attributes:
        workload: What it is.
        chosen: The template that the model puts first.
        best: The one that was fastest.
        regret: How much slower the chosen one is at its best: 0.15 is fifteen per cent.
        near: How many times the best's time is still well chosen.
    """

    workload: str
    chosen: str
    best: str
    regret: float
    near: float = NEAR

    @property
    def is_good(self) -> bool:
        return self.regret <= self.near - 1.0


def errors(records: Iterable[TuningRecord]) -> list[Error]:
    ratios: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.timings_us and record.estimate_us:
            key = record.key
            name = f"{key.template} on {key.backend}, {key.direction}, {key.dtype}, {key.device}"
            ratios[name].append(record.median_us / record.estimate_us)
    found = []
    for name, each in sorted(ratios.items()):
        middle = median(each)
        off = sorted(max(ratio / middle, middle / ratio) for ratio in each)
        found.append(Error(name, len(each), middle, off[len(off) // 2]))
    return found


def choices(records: Iterable[TuningRecord]) -> list[Chosen]:
    """One for each mask, problem and direction on which at least two templates have estimates and timings."""
    by_mask: dict[tuple[object, ...], dict[str, list[TuningRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        key, work = record.key, record.workload
        if not record.timings_us or not record.estimate_us:
            continue
        # Another order of tokens is another signature of the same mask: edges and lengths hold them together.
        same = (key.device, key.direction, key.dtype, key.head_dim, key.v_dim, key.group)
        mask = (work.q_len, work.kv_len, work.heads, work.batch, work.nnz)
        by_mask[same + mask][
            f"{key.template} on {key.backend}" + (f", {work.ordering}" if work.ordering else "")
        ].append(record)
    found = []
    for group, templates in by_mask.items():
        if len(templates) < 2:
            continue
        estimated = {name: min(each.estimate_us or 0.0 for each in mine) for name, mine in templates.items()}
        measured = {name: min(_by_config(mine).values()) for name, mine in templates.items()}
        chosen, best = min(estimated, key=estimated.__getitem__), min(measured, key=measured.__getitem__)
        title = (
            f"{group[6]:,} × {group[7]:,}, {group[10]:,} edges, {group[8]} heads, d{group[3]}, {group[2]}, {group[1]}"
        )
        near = NEAR if str(group[0]).startswith("cpu") else NEAR_ON_GPU
        found.append(Chosen(title, chosen, best, measured[chosen] / measured[best] - 1.0, near))
    return found


def _by_config(records: list[TuningRecord]) -> dict[object, float]:
    times: dict[object, list[float]] = defaultdict(list)
    for record in records:
        times[record.config].append(record.median_us)
    return {config: median(each) for config, each in times.items()}


@dataclass(frozen=True)
class Raced(Chosen):
    """A mask of a grid on which several templates took turns.

    Attributes:
        times_us: First quartile, median and third quartile of each.
    """

    times_us: dict[str, tuple[float, float, float]] = field(default_factory=dict)


def raced(case: Case, seconds: float, host: Host, where: str = "cpu") -> Raced:
    """One case of a grid: the plan without records against the other templates, in turns.

    Raises:
        SparsecError: Nothing can run it.
    """
    bound = bound_mask(case)
    task = Task(bound, problem(case, bound), detect_cpu() if where == "cpu" else detect_gpu())
    group, usual = planned_group(task), Space(task)
    rivals = {
        Arm(each.template, each.backend, each.ordering): each.config
        for each in reversed(group.alternatives)
        if each.us <= _LONGEST_US
    }
    tried = {choice.arm: choice for choice in reversed(usual.seeds())}
    tried |= {arm: Choice(arm, config) for arm, config in rivals.items() if arm not in tried and not arm.is_mixture}
    space = Space(task, tuple(tried), group)
    with closing(WorkerMeasurer(space, where, default_limits(task), host)) as measurer:
        # A rival that cannot run is none.
        able = [each for each in tried.values() if measurer.measure(each, Look(runs=1, seconds=0.0)).timings_us]
        found = measurer.compare(able, _ROUNDS, seconds)
    times = {choice: each for choice, each in zip(able, found, strict=True) if each.timings_us}
    if space.default not in times:
        raise SparsecError(f"{case.id}: the default, {space.default}, does not run")
    best = min(times, key=lambda choice: times[choice].us)
    regret = times[space.default].us / times[best].us - 1.0
    spreads = {str(choice): _quartiles(each.timings_us) for choice, each in times.items()}
    near = NEAR if where == "cpu" else NEAR_ON_GPU
    return Raced(case.id, str(space.default), str(best), regret, near, spreads)


def _quartiles(timings_us: Sequence[float]) -> tuple[float, float, float]:
    q25, middle, q75 = quantiles(timings_us, n=4, method="inclusive")
    return q25, middle, q75


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--grid", "grids", multiple=True, metavar="GRID", help="Measure the masks of this grid instead.")
@click.option("--only", default="", metavar="TEXT", help="Of a grid, only cases whose name has this in it.")
@click.option("--device", "kind", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True, help="Where.")
@click.option("--seconds", default=2.0, show_default=True, help="Of each contest on a mask of a grid.")
@budget_option
@json_option
def main(
    folders: tuple[Path, ...],
    grids: tuple[str, ...],
    only: str,
    kind: str,
    seconds: float,
    budget: float,
    path: Path | None,
) -> None:
    left_out: list[Case] = []
    off: list[Error] = []
    chosen: list[Chosen]
    try:
        if grids:
            cases = [case for name in grids for case in load_grid(find_grid(name)).cases]
            # A race is one of forward passes.
            wanted = [each for each in cases if each.measure == "attention" and each.direction == "forward"]
            wanted = [each for each in wanted if only in each.id]
            where = "cpu" if kind == "cpu" else "cuda"
            chosen = [*_races(in_time(wanted, budget, left_out), seconds, where)]
        else:
            base = RecordBase(folders[:-1], folders[-1]) if folders else database()
            records = list(base.records())
            off, chosen = errors(records), choices(records)
            if not off:
                raise click.ClickException("no record says what the cost model thought of it; tune something first")
            _show_errors(off)
    except SparsecError as error:
        raise click.ClickException(str(error)) from error
    if chosen:
        _show_choices(chosen)
    good = sum(each.is_good for each in chosen)
    near = " or ".join(f"{each - 1:.0%}" for each in sorted({each.near for each in chosen} or {NEAR}))
    what = f"the template chosen is the best, or within {near} of it, in {good} of {len(chosen)} cases:"
    aims = [Aim(what, good / len(chosen) if chosen else None, at_least=MOST_CASES)]
    for case in left_out:
        click.echo(f"left out, as there was no time: {case.id}")
    results = {"errors": [asdict(each) for each in off], "choices": [asdict(each) for each in chosen]}
    finish(aims, results | {"left_out": [case.id for case in left_out]}, path)


def _races(cases: Iterable[Case], seconds: float, where: str) -> Iterator[Raced]:
    with waiting("measuring"), closing(Host()) as host:
        for case in cases:
            found = raced(case, seconds, host, where)
            click.echo(f"{case.id}: {found.regret:.1%} slower than {found.best}", err=True)
            yield found


def _show_errors(off: list[Error]) -> None:
    columns = [
        Column("kernel"),
        *(Column(name, "right") for name in ("records", "measured / estimated", "half within")),
    ]
    rows = [(each.kernel, str(each.records), f"{each.median:.2f}", f"× {each.spread:.2f}") for each in off]
    show(out(), table(columns, rows, out()), "")


def _show_choices(chosen: list[Chosen]) -> None:
    columns = [Column("mask"), Column("chosen"), Column("fastest"), Column("slower by", "right")]
    rows = [
        (each.workload, each.chosen, each.best, f"{each.regret:.1%}")
        for each in sorted(chosen, key=lambda one: -one.regret)
    ]
    show(out(), table(columns, rows, out()), "")


if __name__ == "__main__":
    main()
