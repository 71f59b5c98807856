"""Copies reviewed records of the user's cache into `autotune_db/`, from which they are shipped.

What goes: of every workload that has a winner, the measurements of the winner, of the default and of the next best;
failures that hold for every mask; the last calibration. What does not: records of other sources than today's,
configurations that are not legal, what is there already. Look at the table, run it again without `--dry-run`, and
review the diff.

    python tools/promote_records.py --dry-run
    python tools/promote_records.py --device cpu-x86-64-avx512-bf16-2c
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from sparsec import data
from sparsec.cli.console import out, show
from sparsec.errors import SparsecError
from sparsec.records import Calibration, RecordBase, TuningRecord, upkeep
from sparsec.report import Column, table


@click.command()
@click.option("--device", "devices", multiple=True, metavar="KEY", help="Only this device key; may be repeated.")
@click.option("--from", "source", type=click.Path(path_type=Path), help="A folder of records; the user's by default.")
@click.option("--into", type=click.Path(path_type=Path), help="Another folder than autotune_db/.")
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Only show what would go.")
def promote(devices: tuple[str, ...], source: Path | None, into: Path | None, is_dry_run: bool) -> None:
    """Copies records worth shipping into autotune_db/."""
    try:
        _promote(devices, source or data.records_dir(), into or data.autotune_db_dir(), is_dry_run)
    except SparsecError as error:
        raise click.ClickException(str(error)) from error


def _promote(devices: tuple[str, ...], source: Path, into: Path, is_dry_run: bool) -> None:
    base = RecordBase([], source)
    known = base.devices()
    unknown = sorted(set(devices).difference(known))
    if unknown:
        raise click.BadParameter(
            f"there are no records of {', '.join(unknown)} in {source}; there are of {', '.join(known) or 'none'}",
            param_hint="'--device'",
        )
    console = out()
    for device in devices or known:
        path = into / f"{device}.jsonl"
        there = {_said(entry.record) for entry in upkeep.entries(path) if entry.record} if path.exists() else set()
        chosen = [record for record in upkeep.worth_shipping(base, device) if _said(record) not in there]
        if not chosen:
            show(console, f"{device}: nothing new that is worth shipping")
            continue
        columns = [Column("kernel"), Column("workloads", "right"), Column("records", "right"), Column("labels")]
        show(console, f"{device} → {path}", table(columns, _rows(chosen), console), "")
        if not is_dry_run:
            _add(path, chosen)
    show(console, "nothing was written" if is_dry_run else f"review `git diff {into}` before it goes in")


def _said(record: TuningRecord | Calibration) -> bytes:
    """What a record says, as one line: equal for equal records, whatever file they are in."""
    return data.json_line(record.to_json())


def _rows(chosen: list[TuningRecord | Calibration]) -> list[tuple[str, ...]]:
    kernels: dict[str, list[TuningRecord]] = {}
    for record in chosen:
        if isinstance(record, TuningRecord):
            key = record.key
            title = f"{key.template} on {key.backend}, {key.direction}, {key.dtype} d{key.head_dim} {key.group}:1"
            kernels.setdefault(title, []).append(record)
    rows = []
    for title, mine in kernels.items():
        labels = Counter(record.device_label or "?" for record in mine)
        workloads = len({record.workload for record in mine})
        rows.append((title, f"{workloads:,}", f"{len(mine):,}", ", ".join(labels)))
    n_calibrations = sum(isinstance(record, Calibration) for record in chosen)
    return rows + ([("calibrations of the device", "", f"{n_calibrations:,}", "")] if n_calibrations else [])


def _add(path: Path, chosen: list[TuningRecord | Calibration]) -> None:
    """The file with these lines added: whole or not at all, and without a lock file left in the repository."""
    before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    data.publish(path, before + b"".join(_said(record) + b"\n" for record in chosen))
    # Published files are private; shipped ones are everyone's to read.
    path.chmod(0o644)


if __name__ == "__main__":
    promote()
