"""What one line of a record file says: a `TuningRecord`, which is one measurement, or a `Calibration` of a device.

This file decides the fields, their JSON form and what makes a line unusable; `autotune_db/SCHEMA.md` tells a reader the
same. It must not know where lines are kept, nor which record wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from statistics import median
from typing import Any, Final, Literal, NoReturn, get_args

from sparsec.analysis import MaskProfile
from sparsec.analysis.signatures import MaskSignature, signature
from sparsec.backends.base import DTYPES, Problem
from sparsec.device import Device
from sparsec.errors import RecordError
from sparsec.template import Config, Template

SCHEMA: Final = 1

Direction = Literal["forward", "backward"]
Failure = Literal["constraint", "compile", "launch", "timeout", "incorrect"]

# A record keeps at most so many timings, so that a line stays one short write.
MAX_TIMINGS: Final = 256

# No length, count or time is larger: a number beyond it is a fault, and would overflow where it is used.
_LARGEST: Final = 1 << 62

# How much each octave of edges, another order of tokens and a score modifier say about which launch parameters win.
_EDGES_WEIGHT, _ORDERING_WEIGHT, _SCORE_WEIGHT = 0.125, 0.5, 0.5

# A configuration whatever the order its parameters were written in.
Settings = frozenset[tuple[str, int]]

# Values of a JSON line, as json gives them: checked where they are read.
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RecordKey:
    """What must be equal for a measurement to speak of a kernel.

    Attributes:
        device: `Device.key`.
        template: Its name.
        source: Digest of everything the kernel is compiled from (`Template.digest_of`).
        backend: Who compiled it.
        direction: One call of `Kernel` or of `GradientKernel`.
        dtype: Of q, k, v and out.
        head_dim: Of q and k.
        v_dim: Of v.
        group: Query heads for each key head.
    """

    device: str
    template: str
    source: str
    backend: str
    direction: Direction
    dtype: str
    head_dim: int
    v_dim: int
    group: int

    @classmethod
    def of(
        cls, template: Template, backend: str, problem: Problem, device: Device, direction: Direction = "forward"
    ) -> RecordKey:
        """The key of a template on a back end for a problem on a device."""
        return cls(
            device.key,
            template.name,
            template.digest_of(backend),
            backend,
            direction,
            problem.dtype,
            problem.head_dim,
            problem.v_dim,
            problem.q_heads // problem.kv_heads,
        )


@dataclass(frozen=True, slots=True)
class Workload:
    """What a launch walked: a mask in position space, and how much of it.

    Attributes:
        mask: Signature of the mask as the kernel sees it, after any reordering.
        q_len: Queries.
        kv_len: Keys.
        heads: Query heads of the launch.
        batch: Batch elements of the launch.
        nnz: Edges of one head.
        ordering: Name of the order of tokens; "" for their own.
        has_score_mod: Whether scores were modified before softmax.
    """

    mask: MaskSignature
    q_len: int
    kv_len: int
    heads: int
    batch: int
    nnz: int
    ordering: str = ""
    has_score_mod: bool = False

    @classmethod
    def of(
        cls, profile: MaskProfile, *, heads: int, batch: int, ordering: str = "", has_score_mod: bool = False
    ) -> Workload:
        """The workload of a launch over a mask with that profile."""
        q_len, kv_len = profile.shape
        return cls(signature(profile), q_len, kv_len, heads, batch, profile.nnz, ordering, has_score_mod)

    @property
    def edges(self) -> int:
        """Of all heads and batch elements."""
        return self.nnz * self.heads * self.batch

    @property
    def coordinates(self) -> tuple[float, ...]:
        """A point whose differences from another, summed, are their distance."""
        return (
            *self.mask.coordinates,
            _EDGES_WEIGHT * math.log2(1 + self.edges),
            # Residue 4 and residue 8 are alike: what counts is whether q and out are fetched out of order.
            _ORDERING_WEIGHT * bool(self.ordering),
            _SCORE_WEIGHT * self.has_score_mod,
        )

    def distance(self, other: Workload) -> float:
        """How unlike two launches are: 0 when equal, about 1 for each octave of row length or tile fill."""
        return sum(abs(mine - theirs) for mine, theirs in zip(self.coordinates, other.coordinates, strict=True))


@dataclass(frozen=True, slots=True)
class TuningRecord:
    """One measurement, good or bad.

    Attributes:
        key: What was measured.
        workload: On what.
        config: With which launch parameters.
        timings_us: Every timed run in order, microseconds; empty where it failed.
        failure: Why there are none, or None.
        toolchain: What compiled it, with versions.
        device_label: The product's name; nothing is decided by it.
        contest: Records that name the same contest were measured interleaved; "" for one measured alone.
        estimate_us: What the cost model of that day said, or None.
        date: ISO 8601, UTC; provenance only, as clocks jump.
    """

    key: RecordKey
    workload: Workload
    config: Config
    timings_us: tuple[float, ...]
    failure: Failure | None = None
    toolchain: str = ""
    device_label: str = ""
    contest: str = ""
    estimate_us: float | None = None
    date: str = ""

    @property
    def median_us(self) -> float:
        """The median timing; infinite where it failed."""
        return median(self.timings_us) if self.timings_us else math.inf

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median; 0 for fewer than four timings."""
        if len(self.timings_us) < 4:
            return 0.0
        ordered = sorted(self.timings_us)
        quarter = len(ordered) // 4
        return (ordered[-1 - quarter] - ordered[quarter]) / 2 / self.median_us

    def to_json(self) -> dict[str, Any]:
        """The line, as JSON values."""
        workload = asdict(self.workload)
        return {
            "schema": SCHEMA,
            "kind": "measurement",
            **asdict(self.key),
            "mask": workload.pop("mask"),
            "work": workload,
            "config": self.config.to_dict(),
            "timings_us": [round(us, 3) for us in self.timings_us[:MAX_TIMINGS]],
            "failure": self.failure,
            "toolchain": self.toolchain,
            "device_label": self.device_label,
            "contest": self.contest,
            "estimate_us": None if self.estimate_us is None else round(self.estimate_us, 3),
            "date": self.date or now(),
        }

    @classmethod
    def from_json(cls, row: Row) -> TuningRecord:
        """The record of a line.

        Raises:
            RecordError: A field is missing, of the wrong kind or impossible; the message names it.
        """
        key = key_of(row)
        config = _part(row, "config")
        for name in config:
            _int(config, name, least=None)
        timings = _timings(row)
        failure = _choice(row, "failure", (None, *get_args(Failure)))
        if bool(timings) == (failure is not None):
            _refuse(f"has {len(timings)} timings and failure {failure!r}: a measurement has one or the other")
        estimate = row.get("estimate_us")
        return cls(
            key,
            _workload(row),
            Config(tuple(config.items())),
            timings,
            failure,
            toolchain=_text(row, "toolchain", ""),
            device_label=_text(row, "device_label", ""),
            contest=_text(row, "contest", ""),
            estimate_us=None if estimate is None else _positive(estimate, "estimate_us"),
            date=_text(row, "date", ""),
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """Values measured of a device itself: its ceilings, or coefficients of the cost model.

    Attributes:
        device: `Device.key`.
        source: Digest or version of what measured them: values of another are not comparable.
        values: By name; positive.
        toolchain: What compiled the probes, with versions.
        device_label: The product's name.
        date: ISO 8601, UTC.
        model: `Device.model`; "" where it was not told.
    """

    device: str
    source: str
    values: tuple[tuple[str, float], ...]
    toolchain: str = ""
    device_label: str = ""
    date: str = ""
    model: str = ""

    def to_json(self) -> dict[str, Any]:
        """The line, as JSON values."""
        return {"schema": SCHEMA, "kind": "calibration", **asdict(self), "values": dict(self.values)} | {
            "date": self.date or now()
        }

    @classmethod
    def from_json(cls, row: Row) -> Calibration:
        """The calibration of a line.

        Raises:
            RecordError: As in `TuningRecord.from_json`.
        """
        _check_schema(row)
        values = _part(row, "values")
        return cls(
            _text(row, "device"),
            _text(row, "source"),
            tuple((name, _positive(value, name)) for name, value in values.items()),
            _text(row, "toolchain", ""),
            _text(row, "device_label", ""),
            _text(row, "date", ""),
            _text(row, "model", ""),
        )


def settings_of(config: Config) -> Settings:
    """The configuration as a set, for comparing."""
    return frozenset(config.items)


def now() -> str:
    """The date of a record made now."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# Reading a line.


def is_newer(row: Row) -> bool:
    """Whether a later version of sparsec wrote it: it is kept, and not understood."""
    schema = row.get("schema")
    return isinstance(schema, int) and schema > SCHEMA


def key_of(row: Row) -> RecordKey:
    """The key of a line.

    Raises:
        RecordError: It has another schema, or a field is missing or impossible.
    """
    _check_schema(row)
    return RecordKey(
        _text(row, "device"),
        _text(row, "template"),
        _text(row, "source"),
        _text(row, "backend"),
        _choice(row, "direction", get_args(Direction)),
        _choice(row, "dtype", DTYPES),
        *(_int(row, name, least=1) for name in ("head_dim", "v_dim", "group")),
    )


def _check_schema(row: Row) -> None:
    schema = row.get("schema")
    if schema == SCHEMA and type(schema) is int:
        return
    if is_newer(row):
        _refuse(f"has schema {schema}, and this sparsec reads {SCHEMA}; it is kept for a newer one")
    _refuse(f"has schema {schema!r}, and there is only {SCHEMA}")


_SIGNATURE_FIELDS: Final = tuple(field.name for field in fields(MaskSignature))


def _workload(row: Row) -> Workload:
    mask, work = _part(row, "mask"), _part(row, "work")
    return Workload(
        MaskSignature(*(_int(mask, name, least=None) for name in _SIGNATURE_FIELDS)),
        q_len=_int(work, "q_len", least=1),
        kv_len=_int(work, "kv_len", least=1),
        heads=_int(work, "heads", least=1),
        batch=_int(work, "batch", least=1),
        nnz=_int(work, "nnz", least=0),
        ordering=_text(work, "ordering", ""),
        has_score_mod=work.get("has_score_mod") is True,
    )


def _timings(row: Row) -> tuple[float, ...]:
    timings = row.get("timings_us")
    if not isinstance(timings, list) or len(timings) > MAX_TIMINGS:
        _refuse(f"has timings_us {str(timings)[:60]!r}: a list of at most {MAX_TIMINGS} is needed")
    return tuple(_positive(us, "timings_us") for us in timings)


def _positive(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _LARGEST:
        _refuse(f"has {name} {value!r}: a positive number is needed")
    return float(value)


def _part(row: Row, name: str) -> Row:
    value = row.get(name)
    if not isinstance(value, dict):
        _refuse(f"has {name} {value!r}: an object is needed")
    return value


def _int(row: Row, name: str, least: int | None) -> int:
    value = row.get(name)
    if type(value) is not int or abs(value) > _LARGEST or (least is not None and value < least):
        _refuse(f"has {name} {value!r}: an integer{'' if least is None else f' of at least {least}'} is needed")
    return value


def _text(row: Row, name: str, otherwise: str | None = None) -> str:
    value = row.get(name, otherwise)
    if not isinstance(value, str) or (otherwise is None and not value):
        _refuse(f"has {name} {value!r}: text is needed")
    return value


# Any: one of the choices, whose type only the caller knows.
def _choice(row: Row, name: str, choices: tuple[str | None, ...]) -> Any:
    value = row.get(name)
    if value not in choices:
        _refuse(f"has {name} {value!r}: one of {', '.join(map(str, choices))} is needed")
    return value


def _refuse(what: str) -> NoReturn:
    raise RecordError(f"the record {what}")
