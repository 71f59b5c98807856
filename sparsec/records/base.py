"""The record base: the shipped `autotune_db/` and the user's own records, read as one.

This file decides where a record is written, what is read again and when, and which record answers a question. A file is
`<device-key>.jsonl`; only what was added to it since the last look is read. What cannot be written is kept in memory,
and written with the next record that can. It must not know how anything is measured.

The user's records are added to under a lock, in one write: threads, processes and machines on a shared folder can all
write at once.
"""

from __future__ import annotations

import heapq
import logging
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from sparsec import data
from sparsec.device import family_of
from sparsec.errors import RecordError, SparsecError
from sparsec.records.index import Index, RecordFile, kernel_of
from sparsec.records.record import Calibration, RecordKey, Settings, TuningRecord, Workload, settings_of
from sparsec.records.winners import Case, Standings, Winner, standings
from sparsec.template import Config, Template, templates

logger = logging.getLogger(__name__)

Nearness = Literal["exact", "near", "architecture"]

# Beyond this the nearest record speaks of another kind of mask: four octaves of row length or tile fill.
MAX_DISTANCE: Final = 4.0

# Below this the time of an edge is about the same: nothing but the reach from the diagonal, or the number of edges, may
# differ by as much as an octave or four.
_SAME_RATE: Final = 0.5

# What can be the name of a file, and is the key of a device.
DEVICE_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,120}")
_LOCK_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Served:
    """What the records answer.

    Attributes:
        config: The configuration; legal today.
        us: Its median of medians on the workload that was measured.
        default_us: The default's there, or None where the default failed.
        nearness: Whether the same workload was measured on this device, a like one, or one on its kin.
        distance: How unlike the workload that was measured is (`Workload.distance`).
        key: The key of the measurements.
        workload: What was measured.
        records: The measurements of `config`.
    """

    config: Config
    us: float
    default_us: float | None
    nearness: Nearness
    distance: float
    key: RecordKey
    workload: Workload
    records: tuple[TuningRecord, ...]

    @property
    def ns_per_edge(self) -> float:
        return self.us * 1e3 / max(1, self.workload.edges)

    def us_on(self, workload: Workload) -> float | None:
        """What it should take on a workload; None where the measurement is not near enough to say."""
        if self.nearness == "architecture" or self.distance >= _SAME_RATE:
            return None
        return self.us * workload.edges / max(1, self.workload.edges)

    def __str__(self) -> str:
        """Which records they are and how near, to follow "from the"."""
        n = len(self.records)
        count = f"{n} measurement{'' if n == 1 else 's'}"
        if self.nearness == "exact":
            return f"records of such a mask on this device ({count})"
        far = f"distance {self.distance:.2g}, {count}"
        if self.nearness == "near":
            return f"nearest records on this device ({far})"
        return f"nearest records of {self.key.device}, of the same architecture ({far})"


@dataclass(frozen=True, slots=True)
class _Shelf:
    """The cases under one key, and what is known against configurations there.

    Attributes:
        stamp: Of the files it was made from.
        cases: One for each workload.
        points: `[cases, dimensions]`, where each workload lies.
        unrunnable: Configurations that did not compile or launch, with the toolchains.
        timed_out: Configurations that ran out of time, by workload.
        standings: How those of a case did, as far as it was asked.
    """

    stamp: tuple[tuple[int, int], ...]
    cases: tuple[Case, ...]
    points: npt.NDArray[np.float64]
    unrunnable: dict[Settings, set[str]]
    timed_out: dict[Workload, set[Settings]]
    standings: dict[tuple[int, Config, str | None], Standings | None]

    def by_distance(self, workload: Workload, n_shelf: int) -> Iterator[tuple[float, int, int]]:
        """Distance, `n_shelf` and number of each case that is not too far, the nearest first."""
        if not self.cases:
            return
        distances = np.abs(self.points - np.array(workload.coordinates)).sum(axis=1)
        for number in np.argsort(distances, kind="stable").tolist():
            if distances[number] > MAX_DISTANCE:
                return
            yield float(distances[number]), n_shelf, number

    def standings_of(self, number: int, default: Config, toolchain: str | None) -> Standings | None:
        asked = (number, default, toolchain)
        if asked not in self.standings:
            self.standings[asked] = standings(self.cases[number], default, toolchain)
        return self.standings[asked]


class RecordBase:
    """Records of folders, the last of which is the user's own and is written to; safe to share between threads."""

    def __init__(self, shipped: Sequence[Path], own: Path) -> None:
        self._folders, self._own = (*shipped, own), own
        self._files: dict[Path, RecordFile] = {}
        self._memory: dict[str, Index] = {}
        self._pending: dict[str, list[bytes]] = defaultdict(list)
        self._shelves: dict[RecordKey, _Shelf] = {}
        self._has_warned = False
        self._lock = threading.RLock()

    # Writing.

    def append(self, record: TuningRecord | Calibration) -> None:
        """Keeps a record: in the user's folder, or in memory where that cannot be written."""
        self.extend([record])

    def extend(self, records: Iterable[TuningRecord | Calibration]) -> None:
        """Keeps records; those of one device are written together or not at all.

        Raises:
            RecordError: A device key that can be no file name.
        """
        lines: dict[str, list[bytes]] = defaultdict(list)
        for record in records:
            device = record.device if isinstance(record, Calibration) else record.key.device
            if not DEVICE_KEY.fullmatch(device):
                raise RecordError(f"a record names device {device!r}, which is no key that `Device.key` gives")
            lines[device].append(data.json_line(record.to_json()))
        with self._lock:
            for device, mine in lines.items():
                self._write(device, mine)

    def _write(self, device: str, lines: list[bytes]) -> None:
        pending = self._pending[device] + lines
        path = self._own / f"{device}.jsonl"
        try:
            data.made_records_dir(self._own)
            with data.entry_lock(path, _LOCK_TIMEOUT_S):
                data.append_lines(path, pending)
        except SparsecError as error:
            self._pending[device] = pending
            index = self._memory.setdefault(device, Index(f"records of {device} in memory", device))
            for line in lines:
                index.add(len(pending), line)
            if not self._has_warned:
                logger.warning("tuning records are kept for this process only: %s", error)
                self._has_warned = True
            return
        # They are read back from the file, like everyone else's.
        self._pending.pop(device, None)
        self._memory.pop(device, None)

    @property
    def own_folder(self) -> Path:
        """Where records are written."""
        return self._own

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where records are read, shipped ones first."""
        return self._folders

    @property
    def n_unwritten(self) -> int:
        """Records that are kept in memory because they could not be written."""
        with self._lock:
            return sum(map(len, self._pending.values()))

    def devices(self) -> list[str]:
        """Keys of the devices that there are records of."""
        with self._lock:
            return self._device_keys()

    # Reading.

    def records(self, device: str | None = None) -> Iterator[TuningRecord]:
        """Every usable record, of one device or of all; shipped ones first."""
        with self._lock:
            indexes = [index for each in self._device_keys(device) for index in self._indexes(each)]
            found = [record for index in indexes for key in list(index.by_key) for record in index.records(key)]
        yield from found

    def calibrations(self, device: str) -> tuple[Calibration, ...]:
        """Every calibration of a device, in the order they were read."""
        with self._lock:
            return tuple(each for index in self._indexes(device) for each in index.calibrations)

    def problems(self, device: str | None = None) -> tuple[str, ...]:
        """What was skipped and why, one sentence for each line."""
        with self._lock:
            for _ in self.records(device):
                pass
            found = []
            for key in self._device_keys(device):
                for file in [self._files[path] for path in self._paths(key) if path in self._files]:
                    found += [*file.index.problems, *([file.torn] if file.torn else [])]
        return tuple(found)

    def cases(self, device: str | None = None) -> tuple[Case, ...]:
        """Every case, of one device or of all."""
        with self._lock:
            keys = {
                key: None for each in self._device_keys(device) for index in self._indexes(each) for key in index.by_key
            }
            return tuple(case for key in keys for case in self._shelf(key).cases)

    def knows(self, device: str) -> bool:
        """Whether there are records of a device or its kin at all."""
        with self._lock:
            return any(self._indexes(each) for each in (device, *self._kin(device)))

    def lookup(
        self,
        key: RecordKey,
        workload: Workload,
        *,
        toolchain: str | None = None,
        default: Config | None = None,
        is_allowed: Callable[[Config], bool] = lambda config: True,
        is_held_out: Callable[[Workload], bool] = lambda workload: False,
    ) -> Served | None:
        """The configuration that the nearest measurements speak for, or None where there are none near.

        The same device comes first, however near another of its architecture is. A configuration is served only where
        the default was measured beside it, where the template allows it today, and where nothing is known against it.

        Args:
            key: What would run.
            workload: On what.
            toolchain: What would compile it; measurements with it are preferred, and failures with others forgotten.
                None where it is not known: all failures count.
            default: What would run without records; the template's default, unless that does not suit the device.
            is_allowed: Whether a legal configuration suits the device and problem.
            is_held_out: Which workloads are left out of account, for judging how well the others stand in for them.
        """
        kernel = templates().get(key.template)
        if kernel is None or kernel.digest_of(key.backend) != key.source:
            return None
        with self._lock:
            base = default or kernel.default(key.backend)
            asked = _Question(kernel, key, workload, toolchain, base, is_allowed, is_held_out)
            found = self._nearest(asked, [key])
            if found is None:
                found = self._nearest(asked, [replace(key, device=kin) for kin in self._kin(key.device)])
            return found

    def _nearest(self, asked: _Question, keys: Sequence[RecordKey]) -> Served | None:
        shelves = [self._shelf(key) for key in keys]
        if not any(shelf.cases for shelf in shelves):
            return None
        may_serve = self._objections(asked, keys)
        walks = (shelf.by_distance(asked.workload, n_shelf) for n_shelf, shelf in enumerate(shelves))
        for distance, n_shelf, number in heapq.merge(*walks):
            shelf, key = shelves[n_shelf], keys[n_shelf]
            if asked.is_held_out(shelf.cases[number].workload):
                continue
            stood = shelf.standings_of(number, asked.default, asked.toolchain)
            won = None if stood is None else stood.winner(may_serve, distance)
            if won is not None:
                return _served(asked, won, key, shelf.cases[number], distance)
        return None

    def _objections(self, asked: _Question, keys: Sequence[RecordKey]) -> Callable[[Settings], bool]:
        """Whether a configuration may be served: it is legal, and nothing is known against it on any of the devices."""
        indexes = [index for key in {asked.key, *keys} for index in self._indexes(key.device)]
        own = self._shelf(asked.key)
        timed_out = own.timed_out.get(asked.workload, set())

        def is_held_against(toolchains: Iterable[str]) -> bool:
            return any(asked.toolchain in (None, each) for each in toolchains)

        def may_serve(settings: Settings) -> bool:
            config = asked.template.config_of(asked.key.backend, dict(settings))
            return (
                config is not None
                and settings not in timed_out
                and not is_held_against(own.unrunnable.get(settings, ()))
                and not any(is_held_against(index.wrong.get(kernel_of(asked.key, settings), ())) for index in indexes)
                and asked.is_allowed(config)
            )

        return may_serve

    def _shelf(self, key: RecordKey) -> _Shelf:
        indexes = self._indexes(key.device)
        stamp = tuple(index.stamp(key) for index in indexes)
        shelf = self._shelves.get(key)
        if shelf is None or shelf.stamp != stamp:
            by_workload: dict[Workload, list[TuningRecord]] = defaultdict(list)
            unrunnable: dict[Settings, set[str]] = defaultdict(set)
            timed_out: dict[Workload, set[Settings]] = defaultdict(set)
            for index in indexes:
                for record in index.records(key):
                    by_workload[record.workload].append(record)
                    if record.failure in ("constraint", "compile", "launch"):
                        unrunnable[settings_of(record.config)].add(record.toolchain)
                    elif record.failure == "timeout":
                        timed_out[record.workload].add(settings_of(record.config))
            cases = tuple(Case(key, workload, tuple(mine)) for workload, mine in by_workload.items())
            points = np.array([case.workload.coordinates for case in cases], np.float64)
            # An unusable line was taken out meanwhile.
            stamp = tuple(index.stamp(key) for index in indexes)
            shelf = self._shelves[key] = _Shelf(stamp, cases, points, dict(unrunnable), dict(timed_out), {})
        return shelf

    def _indexes(self, device: str) -> list[Index]:
        """What there is about a device, read up to now."""
        found = []
        for path in self._paths(device):
            file = self._files.get(path)
            if file is None:
                if not os.path.exists(path):  # unlike Path.exists, False where one may not look
                    continue
                file = self._files[path] = RecordFile(path)
            file.refresh()
            found.append(file.index)
        if device in self._memory:
            found.append(self._memory[device])
        return found

    def _paths(self, device: str) -> list[Path]:
        return [folder / f"{device}.jsonl" for folder in self._folders]

    def _device_keys(self, device: str | None = None) -> list[str]:
        """Devices that there is a file for."""
        if device is not None:
            return [device]
        keys = set(self._memory)
        for folder in self._folders:
            try:
                names = os.listdir(folder)
            except OSError:
                continue
            keys.update(name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl"))
        return sorted(key for key in keys if DEVICE_KEY.fullmatch(key))

    def _kin(self, device: str) -> list[str]:
        family = family_of(device)
        return [key for key in self._device_keys() if key != device and family_of(key) == family]


@dataclass(frozen=True, slots=True)
class _Question:
    """What `lookup` was asked."""

    template: Template
    key: RecordKey
    workload: Workload
    toolchain: str | None
    default: Config
    is_allowed: Callable[[Config], bool]
    is_held_out: Callable[[Workload], bool]


def _served(asked: _Question, won: Winner, key: RecordKey, case: Case, distance: float) -> Served:
    config = asked.template.config_of(key.backend, won.config.to_dict())
    assert config is not None, "what is served is legal"
    nearness: Nearness = "architecture" if key != asked.key else "exact" if distance == 0 else "near"
    return Served(config, won.us, won.default_us, nearness, distance, key, case.workload, won.records)


def database() -> RecordBase:
    """The shipped records and the user's own."""
    return _database(data.autotune_db_dir(), data.records_dir())


@cache
def _database(shipped: Path, own: Path) -> RecordBase:
    return RecordBase([shipped], own)
