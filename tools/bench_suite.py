#!/usr/bin/env python3
"""Measures sparsec and its peers on the same work, and makes the tables and plots of the results.

    tools/bench_suite.py run --grid quick
    tools/bench_suite.py count
    tools/bench_suite.py compare OLD NEW
    tools/bench_suite.py table FILE... [--write README.md]
    tools/bench_suite.py plot FILE...
    tools/bench_suite.py figures

This file decides the command line only; `tools/bench/` does the work.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import click
from bench import counting, sheet, tables, verdict
from bench.grid import ON_CPU, ON_GPU, Case, Grid, find_grid, load_grid
from bench.provenance import provenance
from bench.results import DEVICE_PROTOCOL, SCHEMA, Protocol, Run, read_run, resumed
from bench.supervisor import Limits, measure_ceilings, run_grid
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sparsec import data
from sparsec.device import Device, detect_cpu, detect_gpu
from sparsec.errors import SparsecError
from sparsec.planner.words import duration

_BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
_SHEETS = _BENCHMARKS / "results" / "scripts"
# The rest is on a page of its own: a README is read.
_IN_README = ("cpu_backward-", "cpu_forward-")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except SparsecError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group)
def main() -> None:
    """Measures sparsec and its peers on the same work."""


@main.command()
@click.option("--grid", "grid_name", default="quick", show_default=True, help="Name of a grid, or a YAML file.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only cases whose id contains or matches this.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["fp32", "fp16", "bf16"]), help="Only this dtype.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; all that this process may use by default.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
@click.option("--fresh", is_flag=True, help="Replace the result file; otherwise its finished cases are kept.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds without a sign of life before a peer ends.")
@click.option("--memory-gib", type=float, help="Memory of a case's process; nine tenths of the machine's by default.")
@click.option("--device", "kind", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True, help="Where.")
@click.option("--list", "is_listing", is_flag=True, help="Print the ids of the cases and run nothing.")
def run(
    grid_name: str,
    only: tuple[str, ...],
    dtypes: tuple[str, ...],
    threads: int | None,
    out: Path | None,
    fresh: bool,
    timeout: float,
    memory_gib: float | None,
    kind: str,
    is_listing: bool,
) -> None:
    """Measures a grid. Ended half-way, the same command goes on where it stopped."""
    grid = load_grid(find_grid(grid_name))
    cases = [case for case in grid.cases if _is_wanted(case, only, dtypes)]
    if not cases:
        raise click.ClickException(f"no case of {grid.name} is left; `run --grid {grid_name} --list` shows their ids")
    if is_listing:
        for case in cases:
            click.echo(case.id)
        return
    processor = detect_cpu()
    device = processor if kind == "cpu" else detect_gpu()
    threads = threads or processor.units
    if too_many := [case for case in cases if case.threads > processor.units]:
        click.echo(
            f"{len(too_many)} cases want more threads than the {processor.units} here, and are left out", err=True
        )
        cases = [case for case in cases if case not in too_many]
    if others := [case for case in cases if case.measure not in (ON_CPU if kind == "cpu" else ON_GPU)]:
        click.echo(f"{len(others)} cases measure nothing on a {kind.upper()}, and are left out", err=True)
        cases = [case for case in cases if case not in others]
    # A GPU's driver reserves far more than it uses: there, only a limit that was asked for is set.
    memory = int(memory_gib * 2**30) if memory_gib else int(0.9 * device.memory_bytes) if kind == "cpu" else 0
    out = out or _BENCHMARKS / "results" / f"{grid.name}-{device.key}.json"
    limits = Limits(timeout, memory, "cpu" if kind == "cpu" else "cuda")
    finished = _measured(grid, cases, threads, limits, out, fresh, device)
    click.echo(tables.markdown(finished))
    click.echo(f"results: {out}", err=True)


def _is_wanted(case: Case, only: tuple[str, ...], dtypes: tuple[str, ...]) -> bool:
    if dtypes and case.dtype not in dtypes:
        return False
    return not only or any(pattern in case.id or fnmatchcase(case.id, pattern) for pattern in only)


def _measured(
    grid: Grid, cases: list[Case], threads: int, limits: Limits, out: Path, fresh: bool, device: Device
) -> Run:
    effort = grid.effort
    protocol = replace(
        Protocol() if device.kind == "cpu" else DEVICE_PROTOCOL,
        seconds=effort.seconds,
        min_repeats=effort.min_repeats,
        max_repeats=effort.max_repeats,
    )
    if effort.settled_memory:
        memory = "what a second preparation and call add, in a process whose imports, kernels and measurements are made"
        protocol = replace(protocol, memory=memory)
    # Fields by name: there are many, and their order is the file's.
    begun = Run(
        schema=SCHEMA,
        grid=grid.name,
        about=grid.about,
        grid_digest=grid.digest,
        plot=grid.plot,
        x=grid.x,
        protocol=protocol,
        provenance=provenance(device),
        threads=threads,
        ceilings=(),
        goals=grid.goals,
        cases=(),
    )
    if not fresh:
        begun = replace(begun, cases=resumed(out, begun))
    known = {row.case.id for row in begun.cases}
    left = [case for case in cases if case.id not in known]
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task("measuring the machine", total=len(cases), completed=len(cases) - len(left))
        if not left:
            return read_run(out)
        begun = replace(begun, ceilings=measure_ceilings(threads, limits))

        def progress(case: Case, doing: str) -> None:
            if not doing:
                bar.update(task, completed=len(cases) - len(left) + left.index(case))
            bar.update(task, description=f"{case.id} {doing}")

        finished = run_grid(grid, begun, left, threads, limits, out, progress)
        bar.update(task, completed=len(cases), description="done")
    return finished


@main.command()
@click.option("--grid", "grid_name", default="counts", show_default=True, help="Name of a grid, or a YAML file.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only cases whose id contains or matches this.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
def count(grid_name: str, only: tuple[str, ...], out: Path | None) -> None:
    """Counts the instructions of CPU kernels with callgrind: the measure that a busy machine does not move."""
    grid = load_grid(find_grid(grid_name))
    cases = [case for case in grid.cases if _is_wanted(case, only, ())]
    if not cases:
        raise click.ClickException(f"no case of {grid.name} is left")
    found = sheet.made(grid.name, grid.about, counting.PROTOCOL, 1, counting.count(cases))
    out = out or _SHEETS / f"{grid.name}-{found.provenance.device}.json"
    sheet.write_sheet(out, found)
    click.echo(tables.sheet_markdown(found))
    click.echo(f"results: {out}", err=True)


@main.command()
@click.argument("old", type=_FILE)
@click.argument("new", type=_FILE)
@click.option("--strict", is_flag=True, help="End with status 1 where anything of ours is slower or no longer exact.")
def compare(old: Path, new: Path, strict: bool) -> None:
    """What became faster or slower between two result files."""
    if sheet.is_sheet(old) or sheet.is_sheet(new):
        _compare_sheets(sheet.read_sheet(old), sheet.read_sheet(new), strict)
        return
    before, after = read_run(old), read_run(new)
    for difference in verdict.differences(before, after):
        click.echo(f"not the same {difference}", err=True)
    changes = verdict.compare(before, after)
    if not changes:
        raise click.ClickException(f"{old} and {new} have no case in common that was timed")
    lines = []
    for change in sorted(changes, key=lambda each: each.speedup or 0.0):
        drift = "" if change.peak_drift is None else f"{change.peak_drift:.2f}"
        cells = [duration(us) if us else "–" for us in (change.before_us, change.after_us)]
        speedup = "" if change.speedup is None else f"{change.speedup:.2f}×"
        lines.append([change.case_id, change.peer, *cells, speedup, change.judgement, drift])
    click.echo(tables.table(["case", "peer", "before", "after", "speed-up", "", "peak drift"], lines))
    counts = Counter(change.judgement for change in changes)
    click.echo("\n" + ", ".join(f"{count} {judgement}" for judgement, count in counts.items()))
    bad = [each for each in changes if each.peer == "ours" and each.judgement in ("slower", "no longer exact", "lost")]
    if strict and bad:
        sys.exit(1)


def _compare_sheets(old: sheet.Sheet, new: sheet.Sheet, strict: bool) -> None:
    changes = verdict.compare_sheets(old, new)
    if not changes:
        raise click.ClickException("the two files have no figure in common")
    lines = [
        [change.what, change.shape, sheet.measured(change.before), sheet.measured(change.after), change.judgement]
        for change in changes
    ]
    click.echo(tables.table(["figure", "of", "before", "after", ""], lines, text_columns=2))
    counts = Counter(change.judgement for change in changes)
    click.echo("\n" + ", ".join(f"{count} {judgement}" for judgement, count in counts.items()))
    if strict and counts.keys() & {"slower", "no longer exact"}:
        sys.exit(1)


@main.command()
@click.argument("files", type=_FILE, nargs=-1, required=True)
@click.option("--write", type=_FILE, metavar="FILE", help=f"Put the tables between {tables.BEGIN} and {tables.END}.")
@click.option(
    "--check", is_flag=True, help="With --write: change nothing, end with status 1 if the file is out of date."
)
def table(files: tuple[Path, ...], write: Path | None, check: bool) -> None:
    """Markdown tables of result files."""
    content = "\n".join(_markdown(path) for path in files)
    if write is None:
        click.echo(content)
        return
    _put(write, content, check)


def _markdown(path: Path, plots: str = "") -> str:
    if sheet.is_sheet(path):
        return tables.sheet_markdown(sheet.read_sheet(path))
    return tables.markdown(read_run(path), plots)


@main.command()
@click.option("--check", is_flag=True, help="Change nothing, end with status 1 if a page is out of date.")
def figures(check: bool) -> None:
    """The tables of the README and of benchmarks/RESULTS.md, and the plots, from the committed results alone."""
    grids = sorted((_BENCHMARKS / "results").glob("*.json"))
    again = sorted((_BENCHMARKS / "results" / "partial").glob("*.json"))
    sheets = [path for path in sorted(_SHEETS.glob("*.json")) if sheet.is_sheet(path)]
    in_readme = [path for path in grids if path.name.startswith(_IN_README)]
    others = [path for path in grids if path not in in_readme]
    _put(_BENCHMARKS.parent / "README.md", "\n".join(_markdown(path) for path in in_readme), check)
    runs = [read_run(path) for path in grids]
    parts = [tables.overview(runs, [sheet.read_sheet(path) for path in sheets]) + "\n"]
    parts += [_markdown(path, "plots") for path in [*others, *sheets]]
    parts += [tables.markdown(read_run(path), is_part=True) for path in again]
    _put(_BENCHMARKS / "RESULTS.md", "\n".join(parts), check)
    if not check:
        _draw(grids, _BENCHMARKS / "plots")


def _put(page: Path, content: str, check: bool) -> None:
    """Puts tables between the markers of a page, or says that they are not there."""
    text = tables.replaced_block(page, content)
    if text == page.read_text():
        return
    if check:
        raise click.ClickException(f"the tables in {page} are not those of the results: run `make figures`")
    mode = page.stat().st_mode
    data.publish(page, text.encode())
    page.chmod(mode)


@main.command()
@click.argument("files", type=_FILE, nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=_BENCHMARKS / "plots", help="Where plots go."
)
def plot(files: tuple[Path, ...], out: Path) -> None:
    """PNG and SVG plots of result files."""
    _draw(files, out)


def _draw(files: Iterable[Path], out: Path) -> None:
    from bench.plots import plot as draw

    for path in files:
        for written in draw(read_run(path), out):
            click.echo(written)


if __name__ == "__main__":
    main()
