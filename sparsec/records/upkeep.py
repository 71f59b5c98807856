"""Record files as wholes: what each line is worth today, merging files, pruning one's own, choosing what to ship.

This file decides which lines are kept, dropped or passed on. It must not know which record answers a question.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from sparsec import data
from sparsec.cost import model_digest
from sparsec.data import JsonLine
from sparsec.errors import RecordError, SparsecError
from sparsec.records.base import DEVICE_KEY, RecordBase
from sparsec.records.record import Calibration, TuningRecord, is_newer, settings_of
from sparsec.records.winners import Case
from sparsec.template import templates

# What a line is worth: it can be served (or forbids something); its sources, or the cost model that it calibrates, are
# no longer today's; the template no longer allows its configuration; a newer sparsec wrote it; it is in another
# device's file; it says nothing.
Worth = Literal["usable", "stale", "illegal", "newer", "misplaced", "garbage"]

# Failures that hold for every mask of a key: they are shipped, so that nobody meets them again.
_LASTING_FAILURES: Final = ("compile", "launch", "incorrect")
# Configurations of a case that are shipped beside the winner and the default: who comes close may win elsewhere.
_RUNNERS_UP: Final = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a record file.

    Attributes:
        path: The file.
        number: Of the line, from 1.
        text: The line.
        worth: What it is worth today.
        reason: Why it is not usable, in one sentence; "" where it is.
        device: The device key it names; "" where it names none.
        record: What it says, where it can be read.
    """

    path: Path
    number: int
    text: bytes
    worth: Worth
    reason: str
    device: str
    record: TuningRecord | Calibration | None


def entries(path: Path) -> Iterator[Entry]:
    """Every line of a file.

    Raises:
        RecordError: The file cannot be read.
    """
    try:
        found = data.read_json_lines(path)
    except SparsecError as error:
        raise RecordError(f"record file: {error}") from None
    for line in found.lines:
        yield _entry(path, line)


def _entry(path: Path, line: JsonLine) -> Entry:
    row, text = line.value, line.text.strip()
    if row is None:
        return Entry(path, line.number, text, "garbage", line.problem, "", None)

    def entry(worth: Worth, reason: str = "", record: TuningRecord | Calibration | None = None) -> Entry:
        place = f"{path}:{line.number}: {reason}" if reason else ""
        return Entry(path, line.number, text, worth, place, device, record)

    named = row.get("device")
    device = named if isinstance(named, str) and DEVICE_KEY.fullmatch(named) else ""
    if is_newer(row):
        return entry("newer" if device else "garbage", f"written by a newer sparsec (schema {row['schema']})")
    try:
        record: TuningRecord | Calibration
        record = Calibration.from_json(row) if row.get("kind") == "calibration" else TuningRecord.from_json(row)
    except RecordError as error:
        return entry("garbage", str(error))
    if not device:
        return entry("garbage", f"device {named!r} is no device key")
    if isinstance(record, Calibration) and record.source != model_digest(record.device):
        return entry("stale", "the cost model is another now", record)
    if isinstance(record, TuningRecord):
        each = templates().get(record.key.template)
        if each is None or each.digest_of(record.key.backend) != record.key.source:
            return entry(
                "stale", f"the sources of {record.key.template} on {record.key.backend} are others now", record
            )
        config = each.config_of(record.key.backend, record.config.to_dict())
        if config is None and record.failure is None:
            return entry("illegal", f"the template does not allow {record.config}", record)
    if device != path.name.removesuffix(".jsonl"):
        return entry("misplaced", f"a record of {device} in another device's file", record)
    return entry("usable", record=record)


def record_files(places: Iterable[Path]) -> list[Path]:
    """Files, and those of folders, in order.

    Raises:
        RecordError: A place is neither.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += sorted(place.glob("*.jsonl"))
        elif place.is_file():
            found.append(place)
        else:
            raise RecordError(f"{place} was named as a record file or a folder of them, and there is no such thing")
    return found


# Merging.


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did.

    Attributes:
        added: Lines by file.
        n_duplicates: Lines that were there already.
        problems: Lines that were left out, and why.
    """

    added: dict[Path, int]
    n_duplicates: int
    problems: tuple[str, ...]


def merge(files: Sequence[Path], into: Path, *, is_dry_run: bool = False) -> Merged:
    """Adds the lines of files to the files of a folder, each to that of its device, unless they are there.

    Lines of a newer schema and of other sources are taken as they are; garbage is left out.

    Raises:
        RecordError: A file cannot be read or written.
    """
    lines: dict[str, list[bytes]] = defaultdict(list)
    problems = []
    for entry in (entry for file in files for entry in entries(file)):
        if entry.worth == "garbage":
            problems.append(entry.reason)
        else:
            lines[entry.device].append(entry.text)
    added, n_duplicates = {}, 0
    for device, texts in lines.items():
        path = into / f"{device}.jsonl"
        if is_dry_run:
            new = _new_lines(path, texts)
        else:
            try:
                data.made_records_dir(into)
                with data.entry_lock(path):
                    new = _new_lines(path, texts)
                    if new:
                        data.append_lines(path, new)
            except SparsecError as error:
                raise RecordError(f"merging into {into}: {error}") from None
        n_duplicates += len(texts) - len(new)
        if new:
            added[path] = len(new)
    return Merged(added, n_duplicates, tuple(problems))


def _new_lines(path: Path, texts: Sequence[bytes]) -> list[bytes]:
    known = {entry.text for entry in entries(path)} if path.exists() else set()
    return [text for text in dict.fromkeys(texts) if text not in known]


# Pruning.


@dataclass(frozen=True, slots=True)
class Pruned:
    """What pruning a file dropped, by worth, and how many lines it kept."""

    path: Path
    dropped: dict[Worth, int]
    n_kept: int


def prune(path: Path, *, is_dry_run: bool = False) -> Pruned:
    """Drops what can never be served again: garbage, other sources, illegal configurations, repeated lines, and every
    calibration of a device and model but the last.

    Lines of a newer schema stay. The file appears anew, whole or not at all.

    Raises:
        RecordError: It cannot be read or written.
    """
    if is_dry_run:
        return _pruned(path)[0]
    try:
        with data.entry_lock(path):
            report, kept = _pruned(path)
            if report.dropped:
                data.publish(path, b"".join(text + b"\n" for text in kept))
    except SparsecError as error:
        raise RecordError(f"pruning {path}: {error}") from None
    return report


def _pruned(path: Path) -> tuple[Pruned, list[bytes]]:
    kept: dict[bytes, None] = {}
    dropped: dict[Worth, int] = defaultdict(int)
    calibrated: dict[tuple[str, str], bytes] = {}
    for entry in entries(path):
        if entry.worth not in ("usable", "newer", "misplaced") or entry.text in kept:
            dropped[entry.worth] += 1
            continue
        kept[entry.text] = None
        if isinstance(entry.record, Calibration):
            silicon = entry.device, entry.record.model
            earlier = calibrated.get(silicon)
            if earlier is not None:
                del kept[earlier]
                dropped["stale"] += 1
            calibrated[silicon] = entry.text
    return Pruned(path, dict(dropped), len(kept)), list(kept)


# Choosing what to ship.


def worth_shipping(base: RecordBase, device: str) -> list[TuningRecord | Calibration]:
    """What of a device's records others should have, in order.

    Of each case that has a winner: the measurements of the winner, the default and the next best; failures that hold
    for every mask, once for each configuration; and the last calibration by today's cost model of each model of the
    device.
    """
    calibrations = {each.model: each for each in base.calibrations(device) if each.source == model_digest(device)}
    chosen: list[TuningRecord | Calibration] = [*calibrations.values()]
    seen: set[object] = set()
    for case in base.cases(device):
        for record in case.records:
            lasting = record.key, settings_of(record.config), record.failure, record.toolchain
            if record.failure in _LASTING_FAILURES and lasting not in seen and is_current(record):
                seen.add(lasting)
                chosen.append(record)
        chosen += _contestants(base, case)
    return chosen


def is_current(record: TuningRecord) -> bool:
    """Whether it was made from today's sources."""
    each = templates().get(record.key.template)
    return each is not None and each.digest_of(record.key.backend) == record.key.source


def _contestants(base: RecordBase, case: Case) -> list[TuningRecord]:
    served = base.lookup(case.key, case.workload)
    if served is None or served.nearness != "exact":
        return []
    timed = sorted((record for record in case.records if record.failure is None), key=lambda record: record.median_us)
    default = settings_of(templates()[case.key.template].default(case.key.backend))
    others = dict.fromkeys(settings_of(record.config) for record in timed)
    kept = {settings_of(served.config), default, *list(others)[: _RUNNERS_UP + 1]}
    return [record for record in case.records if record.failure is None and settings_of(record.config) in kept]
