"""How well a mask that was never tuned does with the configuration of its nearest neighbour: regret, mask by mask.

Every workload with enough recorded configurations is held out in turn, and the rest are asked for it. The regret is how
much slower what they serve was, measured on the workload itself, than the best that was measured there. Beside it: the
regret of the template's default, which is what there would be without records. Nothing is measured anew.

    python tools/eval_transfer.py                     # shipped records and the user's own
    python tools/eval_transfer.py autotune_db         # those of some folders

A workload counts where at least `--least` configurations were measured on it. Where what is served was not measured
there, the case says nothing and is counted apart.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import click
from bench.script import Aim, finish, json_option

from sparsec.cli.console import out, show, waiting
from sparsec.errors import SparsecError
from sparsec.records import Case, RecordBase, database, upkeep
from sparsec.records.record import settings_of
from sparsec.report import Column, table
from sparsec.template import templates

_LEAST_CONFIGURATIONS = 6
MOST_REGRET = 0.10


@dataclass(frozen=True)
class HeldOut:
    """One workload, answered by the others.

    Attributes:
        kernel: Template, back end, direction and dtype.
        workload: The mask's lengths and edges.
        nearness: How near the records were that answered; "none" where the default was taken for want of any.
        distance: Of the workload they speak of; None where there is none.
        regret: Of what was served: 0.05 is five per cent slower than the best; None where it was not measured here.
        default_regret: Of the template's default; None where that could not run.
    """

    kernel: str
    workload: str
    nearness: str
    distance: float | None
    regret: float | None
    default_regret: float | None


def held_out(base: RecordBase, least: int = _LEAST_CONFIGURATIONS) -> list[HeldOut]:
    """Every case with enough configurations, answered by those of other masks."""
    return [
        _answered(base, case)
        for case in base.cases()
        if upkeep.is_current(case.records[0]) and len(_times(case)) >= least
    ]


def _answered(base: RecordBase, case: Case) -> HeldOut:
    key, mask = case.key, case.workload.mask
    # Another length of the same mask is no other mask: what has its signature is held out too.
    served = base.lookup(key, case.workload, is_held_out=lambda workload: workload.mask == mask)
    times = _times(case)
    best = min(times.values())
    default = times.get(settings_of(templates()[key.template].default(key.backend)))
    us = default if served is None else times.get(settings_of(served.config))
    return HeldOut(
        kernel=f"{key.template} on {key.backend}, {key.direction}, {key.dtype}",
        workload=f"{case.workload.q_len:,} × {case.workload.kv_len:,}, {case.workload.nnz:,} edges",
        nearness="none" if served is None else served.nearness,
        distance=None if served is None else served.distance,
        regret=None if us is None else us / best - 1.0,
        default_regret=None if default is None else default / best - 1.0,
    )


def _times(case: Case) -> dict[frozenset[tuple[str, int]], float]:
    """Median of medians of each configuration."""
    found: dict[frozenset[tuple[str, int]], list[float]] = defaultdict(list)
    for record in case.records:
        if record.failure is None:
            found[settings_of(record.config)].append(record.median_us)
    return {settings: median(times) for settings, times in found.items()}


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--least", type=click.IntRange(min=2), default=_LEAST_CONFIGURATIONS, show_default=True)
@json_option
def evaluate(folders: tuple[Path, ...], least: int, path: Path | None) -> None:
    """Says how much slower an untuned mask is with records of other masks."""
    try:
        with waiting("holding out"):
            base = RecordBase(folders[:-1], folders[-1]) if folders else database()
            results = held_out(base, least)
    except SparsecError as error:
        raise click.ClickException(str(error)) from error
    console = out()
    if not results:
        raise click.ClickException(f"no workload has {least} configurations measured on it: tune some masks first")
    columns = [
        Column("kernel"),
        Column("workload"),
        Column("by"),
        Column("regret", "right"),
        Column("default", "right"),
    ]
    rows = [
        (
            each.kernel,
            each.workload,
            each.nearness if each.distance is None else f"{each.nearness} {each.distance:.1f}",
            _percent(each.regret),
            _percent(each.default_regret),
        )
        for each in sorted(results, key=lambda each: -(each.regret or 0.0))
    ]
    show(console, table(columns, rows, console))
    summary = _summary(results)
    for name, value in summary.items():
        show(console, f"{name}: {value if isinstance(value, int) else _percent(value)}")
    told = summary["median regret of transfer"]
    aims = [Aim("median regret of a held-out mask that others' records serve:", told, at_most=MOST_REGRET)]
    finish(aims, {"summary": summary, "cases": [asdict(each) for each in results]}, path)


def _summary(results: list[HeldOut]) -> dict[str, float | int | None]:
    served = [each for each in results if each.nearness != "none"]
    told = [each.regret for each in served if each.regret is not None]
    defaults = [each.default_regret for each in results if each.default_regret is not None]
    return {
        "masks held out": len(results),
        "of these, left to the default: no record is near": len(results) - len(served),
        "of these, served a configuration that was not measured there": len(served) - len(told),
        "median regret of transfer": median(told) if told else None,
        "worst regret of transfer": max(told, default=None),
        "median regret of the default": median(defaults) if defaults else None,
        "worst regret of the default": max(defaults, default=None),
    }


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{value:.1%}"


if __name__ == "__main__":
    evaluate()
