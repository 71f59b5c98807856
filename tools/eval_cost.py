"""How far the cost model is off, over all records; and how often the template it would choose is the best one.

Two questions, both answered from records alone:

- of every record that keeps what the model said of it: measured over estimated, by template, back end and dtype;
- of every mask on which several templates were measured: whether the one the model puts first, each with its own best
  configuration by the model, is within 15 % of the fastest that was measured.

    python tools/eval_cost.py                 # shipped records and the user's own
    python tools/eval_cost.py --json folder   # those of some folders
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import click

from sparsec.cli.console import out, show
from sparsec.records import RecordBase, TuningRecord, database
from sparsec.report import json_text

# A template counts as well chosen when it is this near the best.
NEAR = 1.15


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
    """

    workload: str
    chosen: str
    best: str
    regret: float

    @property
    def is_good(self) -> bool:
        return self.regret <= NEAR - 1.0


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
        found.append(Chosen(title, chosen, best, measured[chosen] / measured[best] - 1.0))
    return found


def _by_config(records: list[TuningRecord]) -> dict[object, float]:
    times: dict[object, list[float]] = defaultdict(list)
    for record in records:
        times[record.config].append(record.median_us)
    return {config: median(each) for config, each in times.items()}


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def main(folders: tuple[Path, ...], is_json: bool) -> None:
    base = RecordBase(folders[:-1], folders[-1]) if folders else database()
    records = list(base.records())
    off, chosen = errors(records), choices(records)
    if is_json:
        click.echo(json_text({"errors": [asdict(each) for each in off], "choices": [asdict(each) for each in chosen]}))
        return
    if not off:
        raise click.ClickException("no record says what the cost model thought of it; tune something first")
    _show(off, chosen)


def _show(off: list[Error], chosen: list[Chosen]) -> None:
    from rich.table import Table

    first = Table(box=None, pad_edge=False)
    for name, side in (
        ("kernel", "left"),
        ("records", "right"),
        ("measured / estimated", "right"),
        ("half within", "right"),
    ):
        first.add_column(name, justify=side, overflow="fold")
    for each in off:
        first.add_row(each.kernel, str(each.records), f"{each.median:.2f}", f"× {each.spread:.2f}")
    show(out(), first)
    if not chosen:
        click.echo("\nno mask has records of two templates: nothing can be said of the choice between them")
        return
    second = Table(box=None, pad_edge=False)
    for name, side in (("mask", "left"), ("chosen", "left"), ("fastest", "left"), ("slower by", "right")):
        second.add_column(name, justify=side, overflow="fold")
    for each in sorted(chosen, key=lambda one: -one.regret):
        second.add_row(each.workload, each.chosen, each.best, f"{each.regret:.1%}")
    click.echo("")
    show(out(), second)
    good = sum(each.is_good for each in chosen)
    click.echo(f"\nthe chosen template is the best, or within {NEAR - 1:.0%} of it, in {good} of {len(chosen)} cases")


if __name__ == "__main__":
    main()
