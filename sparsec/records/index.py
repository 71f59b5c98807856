"""What has been read of record files: lines by the key they speak of, and what was added since the last look.

This file decides what is read again and when, and which lines say nothing. It must not know which record is served.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from sparsec import data
from sparsec.data import TextLine
from sparsec.errors import RecordError, SparsecError
from sparsec.records.record import Calibration, RecordKey, Row, Settings, TuningRecord, key_of, settings_of

# The key of a configuration that computed wrong results, whatever the mask and dtype.
Kernel = tuple[str, str, str, str, Settings]


def kernel_of(key: RecordKey, settings: Settings) -> Kernel:
    return key.template, key.source, key.backend, key.direction, settings


# Where the key of a line that this sparsec wrote ends, and what says that it did not fail.
_AFTER_KEY, _UNFAILED = b',"mask":', b'"failure":null'


class Index:
    """Lines of one device sorted by what they speak of; each is understood in full only when it is asked for."""

    def __init__(self, title: str, device: str) -> None:
        self.title, self.device = title, device
        self.generation = 0
        self.clear()

    def clear(self) -> None:
        self.generation += 1
        # Numbers and texts: a dictionary for each line would take five times the memory.
        self.by_key: dict[RecordKey, list[tuple[int, bytes]]] = defaultdict(list)
        self.calibrations: list[Calibration] = []
        self.wrong: dict[Kernel, set[str]] = defaultdict(set)
        self.problems: list[str] = []
        self._keys: dict[bytes, RecordKey] = {}

    def add(self, number: int, text: bytes) -> None:
        # Lines that begin alike have the same key, and most do: they need not be parsed yet.
        beginning = text.partition(_AFTER_KEY)[0]
        key = self._keys.get(beginning)
        if key is not None and _UNFAILED in text:
            self.by_key[key].append((number, text))
            return
        line = data.parse_json_line(self.title, number, text)
        if line.value is None:
            self.problems.append(line.problem)
            return
        try:
            key = self._add_parsed(line.value)
        except RecordError as error:
            self._refuse(number, error)
            return
        if key is not None:
            self._keys[beginning] = key
            self.by_key[key].append((number, text))

    def _add_parsed(self, row: Row) -> RecordKey | None:
        """The key of a measurement, or None for a calibration, which is taken in."""
        if row.get("device") != self.device:
            raise RecordError(f"the record is of device {row.get('device')!r}; `sparsec db merge` puts it right")
        if row.get("kind") == "calibration":
            self.calibrations.append(Calibration.from_json(row))
            return None
        key = key_of(row)
        if row.get("failure") == "incorrect":
            record = TuningRecord.from_json(row)
            self.wrong[kernel_of(key, settings_of(record.config))].add(record.toolchain)
        return key

    def records(self, key: RecordKey) -> list[TuningRecord]:
        """What the lines of a key say; one that turns out to say nothing is reported, and forgotten."""
        found, usable = [], []
        for number, text in self.by_key.get(key, ()):
            line = data.parse_json_line(self.title, number, text)
            try:
                if line.value is None:
                    self.problems.append(line.problem)
                    continue
                record = TuningRecord.from_json(line.value)
                if record.key != key:
                    raise RecordError(f"the record has two keys: {key} and {record.key}")
            except RecordError as error:
                self._refuse(number, error)
                continue
            found.append(record)
            usable.append((number, text))
        if usable or key in self.by_key:
            self.by_key[key] = usable
        return found

    def stamp(self, key: RecordKey) -> tuple[int, int]:
        """Equal as long as `records(key)` are."""
        return self.generation, len(self.by_key.get(key, ()))

    def _refuse(self, number: int, error: RecordError) -> None:
        self.problems.append(f"{self.title}:{number}: skipped, {error}")


class RecordFile:
    """What has been read of one file."""

    def __init__(self, path: Path) -> None:
        self.index = Index(str(path), path.name.removesuffix(".jsonl"))
        self.torn: str | None = None
        self.n_readings = 0
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self.index.clear()
        self.torn = None
        self._stamp: tuple[int, int, int] | None = None
        self._last = TextLine(1, 0, b"")  # that was read

    def refresh(self) -> None:
        """Reads what was added; everything again where the file is another or was changed otherwise."""
        try:
            status = os.stat(self._path)
        except OSError:
            if self._stamp is not None:
                self._forget()
            return
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        if stamp == self._stamp:
            return
        is_longer = self._stamp is not None and stamp[0] == self._stamp[0] and stamp[1] > self._stamp[1]
        if not (is_longer and self._read_on()):
            self._forget()
            self._read_on()
        self._stamp = stamp

    def _read_on(self) -> bool:
        """Reads from the last line known on; False where that line is not what it was."""
        try:
            lines, unfinished = data.read_text_lines(self._path, self._last.offset, self._last.number)
        except SparsecError as error:
            self.index.problems.append(str(error))
            return True
        self.n_readings += 1
        self.torn = None
        if unfinished is not None:
            torn = data.parse_json_line(str(self._path), unfinished.number, unfinished.text)
            if torn.value is None:
                self.torn = torn.problem
            else:
                # Written by hand, without an end; a writer after us begins on a line of its own.
                lines.append(unfinished)
        if self._last.text:
            if not lines or lines[0] != self._last:
                return False
            lines = lines[1:]
        for line in lines:
            self.index.add(line.number, line.text)
        if lines:
            self._last = lines[-1]
        return True
