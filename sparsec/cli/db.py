"""`sparsec db`: the tuning records there are, and their upkeep.

This file decides how records are told. It must not know which of them is served, nor how files are changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sparsec.cli.console import out, show, waiting
from sparsec.cli.names import nearest

if TYPE_CHECKING:
    from sparsec.records import Case, RecordBase, RecordKey, Served, Workload
    from sparsec.records.upkeep import Entry

_SHOWN_PROBLEMS: Final = 20
_LIMIT: Final = 20


class _Commands(click.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"there is no command 'db {args[0]}'; {nearest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, short_help="The tuning records there are, and their upkeep.")
def db() -> None:
    """Shows, checks and merges tuning records: what was measured, on which device, and what it leads to.

    Records come with sparsec, and from tuning on this machine; `sparsec db path` says where they lie.
    """


_json = click.option("--json", "is_json", is_flag=True, help="Print JSON.")
_device = click.option("--device", metavar="NAME", help="A name of `sparsec devices`, or a device key.")


@db.command("list", short_help="How many records there are, by kernel.")
@_device
@_json
def list_kernels(device: str | None, is_json: bool) -> None:
    """Lists the records by device, kernel and problem: how many workloads were measured, and how often."""
    base = _base()
    with waiting("reading records"):
        rows = _summaries(base, _device_keys(base, device))
    if is_json:
        _print_json([row.to_dict() for row in rows])
        return
    if not rows:
        _show_nothing(base, device)
        return
    from sparsec.report import Column, table

    console = out()
    columns = [Column("kernel"), Column("problem")]
    columns += [Column(name, "right") for name in ("workloads", "measured", "failed", "stale")]
    for key in dict.fromkeys(row.key.device for row in rows):
        mine = [row for row in rows if row.key.device == key]
        show(console, key)
        show(console, table(columns, [row.cells for row in mine], console))
        calibrations = len(base.calibrations(key))
        if calibrations:
            show(console, f"and {calibrations} calibration{'' if calibrations == 1 else 's'} of the device")
        show(console, "")
    show(console, "stale: measured with other sources, and not served any more; `sparsec db prune` drops them.")


@db.command("show", short_help="What the records lead to, workload by workload.")
@_device
@click.option("--template", metavar="NAME", help="Only this template.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Only this dtype.")
@click.option("--direction", type=click.Choice(["forward", "backward"]), help="Only this pass.")
@click.option("--limit", type=click.IntRange(min=1), default=_LIMIT, show_default=True, help="Workloads shown.")
@_json
def show_cases(
    device: str | None, template: str | None, dtype: str | None, direction: str | None, limit: int, is_json: bool
) -> None:
    """Shows each workload that was measured: what is served for it, and how that compares with the default."""
    base = _base()
    wanted = {"template": template, "dtype": dtype, "direction": direction}
    with waiting("reading records"):
        cases = [
            case
            for key in _device_keys(base, device)
            for case in base.cases(key)
            if all(value in (None, getattr(case.key, name)) for name, value in wanted.items())
        ]
        told = [(case, _exactly(base, case)) for case in (cases if is_json else cases[:limit])]
    if is_json:
        _print_json([_case_dict(case, served) for case, served in told])
        return
    if not told:
        _show_nothing(base, device)
        return
    console = out()
    for case, served in told:
        key = case.key
        show(console, f"{key.template} on {key.backend}, {key.direction}, {key.dtype} {_dims(key)}: {key.device}")
        show(console, f"  {_workload_words(case.workload)}")
        show(console, f"  {_outcome_words(case, served)}", "")
    if len(cases) > limit:
        show(console, f"and {len(cases) - limit} more; --limit shows them, --device, --template and --dtype choose.")


@db.command(short_help="Add the records of other files to one's own.")
@click.argument("places", metavar="FILE_OR_FOLDER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--into", type=click.Path(path_type=Path, file_okay=False), help="Another folder than one's own.")
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Only say what would be added.")
@_json
def merge(places: tuple[Path, ...], into: Path | None, is_dry_run: bool, is_json: bool) -> None:
    """Adds records of other machines to the user's own, each to the file of its device, and each once."""
    from sparsec.records import upkeep

    folder = into or _base().own_folder
    with waiting("merging"):
        merged = upkeep.merge(upkeep.record_files(places), folder, is_dry_run=is_dry_run)
    if is_json:
        added = {str(path): count for path, count in merged.added.items()}
        _print_json({"added": added, "duplicates": merged.n_duplicates, "problems": merged.problems})
        return
    console = out()
    would = "would be added" if is_dry_run else "added"
    for path, count in merged.added.items():
        show(console, f"{count:,} {would} to {path}")
    if not merged.added:
        show(console, f"nothing to add to {folder}")
    if merged.n_duplicates:
        show(console, f"{merged.n_duplicates:,} were there already")
    _show_problems(merged.problems, "left out")


@db.command(short_help="Check every line.")
@click.argument("places", metavar="[FILE_OR_FOLDER...]", nargs=-1, type=click.Path(path_type=Path))
@_json
@click.pass_context
def verify(context: click.Context, places: tuple[Path, ...], is_json: bool) -> None:
    """Checks every line of the shipped records and one's own, or of the files named.

    Fails where a line says nothing, has a configuration that the template does not allow, or lies in the wrong file.
    Records of other sources, or of a newer sparsec, are counted: they are not served, and harm nothing.
    """
    from sparsec.records import upkeep

    base = _base()
    with waiting("reading records"):
        files = upkeep.record_files(places or [folder for folder in base.folders if folder.is_dir()])
        found = [entry for file in files for entry in upkeep.entries(file)]
    wrong = [entry.reason for entry in found if entry.worth in ("garbage", "illegal", "misplaced")]
    counts = {file: _counts(entry for entry in found if entry.path == file) for file in files}
    if is_json:
        _print_json({"files": [{"path": str(file), **each} for file, each in counts.items()], "problems": wrong})
    else:
        console = out()
        for file, each in counts.items():
            show(console, f"{file}: " + (", ".join(f"{n:,} {worth}" for worth, n in each.items()) or "empty"))
        if not files:
            _show_nothing(base, None)
        _show_problems(wrong, "wrong")
    context.exit(1 if wrong else 0)


@db.command(short_help="Where records lie.")
@_json
def path(is_json: bool) -> None:
    """Says where one's own records lie, and where the shipped ones do."""
    base = _base()
    *shipped, own = base.folders
    if is_json:
        _print_json({"own": str(own), "shipped": [str(folder) for folder in shipped]})
        return
    click.echo(str(own))
    for folder in shipped:
        click.echo(f"shipped with sparsec, read-only: {folder}", err=True)


@db.command(short_help="Drop what can never be served again.")
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Only say what would be dropped.")
@_json
def prune(is_dry_run: bool, is_json: bool) -> None:
    """Drops from one's own records what can never be served again.

    That is: lines that say nothing, records of other sources than today's, configurations that the template no longer
    allows, calibrations but the last, and repeated lines. Records of a newer sparsec stay.
    """
    from sparsec.records import upkeep

    base = _base()
    files = upkeep.record_files([base.own_folder]) if base.own_folder.is_dir() else []
    with waiting("pruning"):
        reports = [upkeep.prune(file, is_dry_run=is_dry_run) for file in files]
    if is_json:
        _print_json([{"path": str(each.path), "dropped": each.dropped, "kept": each.n_kept} for each in reports])
        return
    console = out()
    for each in reports:
        would = "would drop" if is_dry_run else "dropped"
        named = {"usable": "repeated", "newer": "repeated"}
        dropped = ", ".join(f"{n:,} {named.get(worth, worth)}" for worth, n in each.dropped.items()) or "nothing"
        show(console, f"{each.path}: {would} {dropped}; {each.n_kept:,} kept")
    if not reports:
        _show_nothing(base, None)


@dataclass(frozen=True, slots=True)
class _Summary:
    """The records of one key, all sources together."""

    key: RecordKey
    workloads: int
    measurements: int
    failures: int
    stale: int

    @property
    def cells(self) -> tuple[str, ...]:
        key = self.key
        counts = (self.workloads, self.measurements, self.failures, self.stale)
        return (
            f"{key.template} on {key.backend}, {key.direction}",
            f"{key.dtype} {_dims(key)}",
            *(f"{n:,}" for n in counts),
        )

    def to_dict(self) -> dict[str, object]:
        key = {name: value for name, value in asdict(self.key).items() if name != "source"}
        counts = ("workloads", "measurements", "failures", "stale")
        return key | {name: getattr(self, name) for name in counts}


def _summaries(base: RecordBase, devices: Iterable[str]) -> list[_Summary]:
    from sparsec.records.upkeep import is_current

    groups: dict[RecordKey, list[Case]] = {}
    for device in devices:
        for case in base.cases(device):
            groups.setdefault(replace(case.key, source=""), []).append(case)
    rows = []
    for key, cases in sorted(groups.items(), key=lambda item: astuple(item[0])):
        records = [record for case in cases for record in case.records]
        current = [record for record in records if is_current(record)]
        failed = sum(record.failure is not None for record in current)
        workloads = len({record.workload for record in current})
        rows.append(_Summary(key, workloads, len(current) - failed, failed, len(records) - len(current)))
    return rows


def _dims(key: RecordKey) -> str:
    dims = f"d{key.head_dim}" if key.head_dim == key.v_dim else f"d{key.head_dim} v{key.v_dim}"
    return dims + (f" {key.group}:1" if key.group > 1 else "")


def _exactly(base: RecordBase, case: Case) -> Served | None:
    """What is served for a case itself."""
    served = base.lookup(case.key, case.workload)
    return served if served is not None and served.nearness == "exact" else None


def _workload_words(work: Workload) -> str:
    mask = work.mask
    reordered = f", in order {work.ordering}" if work.ordering else ""
    scored = ", with a score modifier" if work.has_score_mod else ""
    batch = f", batch {work.batch}" if work.batch > 1 else ""
    heads = f"{work.heads} head{'' if work.heads == 1 else 's'}{batch}"
    return (
        f"{work.q_len:,} × {work.kv_len:,}, {heads}: {work.nnz:,} edges a head, about {2**mask.degree_mean:,} keys a "
        f"query, tiles of 64 filled {2.0**mask.tile_fill:.0%}{reordered}{scored}"
    )


def _outcome_words(case: Case, served: Served | None) -> str:
    from sparsec.planner.words import duration
    from sparsec.records.upkeep import is_current

    n = len(case.records)
    count = f"{n} record{'' if n == 1 else 's'}"
    if not all(map(is_current, case.records)):
        return f"{count} of other sources: not served"
    if served is None:
        return f"{count}: nothing is served, as the default was not measured or nothing could run"
    best = f"{served.config}: {duration(served.us)}"
    if served.default_us is None:
        return f"{best}; the default could not run ({count})"
    if served.us == served.default_us:
        return f"{best}; the default, which nothing beats ({count})"
    return f"{best}; the default {duration(served.default_us)}, {served.default_us / served.us:.2f}× ({count})"


def _case_dict(case: Case, served: Served | None) -> dict[str, Any]:  # JSON values
    return {
        **asdict(case.key),
        "workload": asdict(case.workload),
        "records": len(case.records),
        "failures": sum(record.failure is not None for record in case.records),
        "served": None
        if served is None
        else {
            "config": served.config.to_dict(),
            "us": served.us,
            "default_us": served.default_us,
            "measurements": len(served.records),
        },
    }


def _counts(entries: Iterable[Entry]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry.worth] = counts.get(entry.worth, 0) + 1
    return counts


def _base() -> RecordBase:
    from sparsec.records import database

    return database()


def _device_keys(base: RecordBase, name: str | None) -> list[str]:
    """Keys of the devices asked for; a name of `sparsec devices` stands for its key."""
    known = base.devices()
    if name is None or name in known:
        return known if name is None else [name]
    from sparsec.device import device
    from sparsec.errors import SparsecError

    try:
        return [device(name).key]
    except SparsecError as error:
        raise click.BadParameter(f"{error}; there are records of {', '.join(known) or 'none'}") from error


def _show_nothing(base: RecordBase, device: str | None) -> None:
    of = f" of {device}" if device else ""
    show(out(), f"there are no records{of}; tuning writes them to {base.own_folder}")


def _show_problems(problems: Iterable[str], what: str) -> None:
    found = [*problems]
    for problem in found[:_SHOWN_PROBLEMS]:
        click.echo(f"{what}: {problem}", err=True)
    if len(found) > _SHOWN_PROBLEMS:
        click.echo(f"and {len(found) - _SHOWN_PROBLEMS:,} more", err=True)


def _print_json(document: Mapping[str, object] | Iterable[object]) -> None:
    from sparsec.report import json_text

    click.echo(json_text(document))
