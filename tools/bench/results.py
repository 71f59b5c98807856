"""The result file: what was measured, how, where and by which code.

This file decides the schema, that a file is replaced whole or not at all, and when an interrupted run may go on. It
must not know how anything is measured or shown.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from bench.grid import Case, Goal, PlotKind
from bench.names import family
from sparsec import data
from sparsec.backends.base import DTYPE_BYTES
from sparsec.errors import SparsecError

SCHEMA: Final = 1

Status = Literal["ok", "wrong", "skipped", "failed", "timed out", "crashed"]
T = TypeVar("T")


class ResultError(SparsecError, ValueError):
    """A file that holds no results of this schema."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Repeated calls of one peer, in microseconds."""

    median_us: float
    q25_us: float
    q75_us: float
    min_us: float
    repeats: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        return (self.q75_us - self.q25_us) / self.median_us


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """What a plan of ours says of itself.

    Attributes:
        runs: Template, back end and configuration of each launch.
        planning_us: Time of planning in that call.
        estimate_us: What the cost model expected.
        layout_bytes: Of its index arrays.
    """

    runs: tuple[str, ...]
    planning_us: float
    estimate_us: float
    layout_bytes: int


@dataclass(frozen=True, slots=True)
class PeerRow:
    """One peer on one case.

    Attributes:
        peer: Its name.
        status: `ok`; `wrong` where its result was not exact; else why there is no time.
        reason: For a person, where it is not `ok`.
        timing: Of the calls, where there were any.
        error: The largest error on the sampled rows.
        allowed: The largest a correct result may have there.
        setup_us: Preparation and the first call, less an ordinary call.
        peak_bytes: Memory that preparation and the first call added, at the highest.
        plan: For ours.
        note: What a reader of the time must know.
        forward: Where gradients are measured: of the forward pass alone, in the same rounds; it keeps what they need.
        warm: On a GPU, of calls that find the L2 as the same call has left it; `timing` is of those that find it cold.
    """

    peer: str
    status: Status
    reason: str = ""
    timing: Timing | None = None
    error: float | None = None
    allowed: float | None = None
    setup_us: float | None = None
    peak_bytes: int | None = None
    plan: PlanFacts | None = None
    note: str = ""
    forward: Timing | None = None
    warm: Timing | None = None

    @property
    def us(self) -> float | None:
        """The median time, only where the result was exact."""
        return self.timing.median_us if self.status == "ok" and self.timing is not None else None

    @property
    def backward_over_forward(self) -> float | None:
        """How much longer the backward pass takes than the forward pass, which both were timed with."""
        if self.us is None or self.forward is None:
            return None
        return self.us / self.forward.median_us - 1


@dataclass(frozen=True, slots=True)
class CaseRow:
    """All peers on one case.

    Attributes:
        case: What was declared.
        threads: That were used.
        q_len: Queries.
        kv_len: Keys.
        edges: Of all heads and batch elements.
        density: Edges of a head over `q_len * kv_len`.
        tile_fill: Share of 64×64 tiles that is edges.
        flops: Useful floating-point operations, 4 · edges · head_dim forward, 14 with backward; 0 where nothing is
            computed.
        tensor_bytes: Of q, k, v and out.
        peak_flops: Of this machine for this dtype with these threads (FLOP/s), timed among the peers.
        peers: Rows in the order of the grid.
        gather_bytes_per_s: On a GPU, of a kernel that only reads the rows of K and V of every edge, timed among the
            peers; None where rows are long, or heads share keys.
    """

    case: Case
    threads: int
    q_len: int
    kv_len: int
    edges: int
    density: float
    tile_fill: float | None
    flops: int
    tensor_bytes: int
    peak_flops: float | None
    peers: tuple[PeerRow, ...]
    gather_bytes_per_s: float | None = None

    @property
    def edge_bytes(self) -> int:
        """Of the rows of K and V of every edge, read anew for each."""
        return self.edges * 2 * self.case.head_dim * DTYPE_BYTES[self.case.dtype]

    def row(self, peer: str) -> PeerRow | None:
        return next((row for row in self.peers if row.peer == peer), None)

    def best(self, wanted: str) -> PeerRow | None:
        """The fastest exact row of a family of peers; for ours, the plan's own choice."""
        if wanted == "ours":
            own = self.row("ours")
            return own if own is not None and own.us is not None else None
        rows = [row for row in self.peers if family(row.peer) == wanted and row.us is not None]
        return min(rows, key=lambda row: row.us or math.inf, default=None)

    def gflops(self, row: PeerRow) -> float | None:
        """Useful GFLOP/s."""
        return self.flops / row.us * 1e-3 if row.us and self.flops else None

    def ratio(self, wanted: str, peer: str = "ours") -> float | None:
        """How many times faster a peer is than the best of a family, or than another peer."""
        ours, theirs = self.row(peer), self.row(wanted) if ":" in wanted else self.best(wanted)
        return theirs.us / ours.us if ours and theirs and ours.us and theirs.us else None

    def share_of_peak(self, row: PeerRow, ceilings: Sequence[Ceiling]) -> float | None:
        """Useful FLOP/s over what the machine did in the same minutes or at the start of the run, whichever is more."""
        rate = self.gflops(row)
        if not rate or not self.peak_flops:
            return None
        # That of all threads bounds nothing where a case has its own number of them.
        known = [
            each.one_thread if self.threads == 1 else each.all_threads
            for each in ceilings
            if each.dtype == self.case.dtype and (self.threads == 1 or not self.case.threads)
        ]
        return rate * 1e9 / max([self.peak_flops, *known])

    def at(self, x: str) -> float:
        """Where this case lies on the axis of a plot."""
        known = {"length": self.q_len, "density": self.density, "threads": self.threads, "edges": self.edges}
        return float(known[x] if x in known else self.case.varied[x])

    def break_even_calls(self, wanted: str) -> float | None:
        """After so many calls ours has won back what it needs more to set up; infinite where it never does."""
        ours, theirs = self.best("ours"), self.best(wanted)
        if not ours or not theirs or ours.setup_us is None or theirs.setup_us is None or not ours.us or not theirs.us:
            return None
        behind = ours.setup_us - theirs.setup_us
        if behind <= 0:
            return 0.0
        gain = theirs.us - ours.us
        return behind / gain if gain > 0 else None

    def to_dict(self) -> dict[str, Any]:  # Any: JSON values
        """As the file has it: of a CPU's results, nothing is said of a warm L2."""
        content = asdict(self)
        if self.gather_bytes_per_s is None:
            del content["gather_bytes_per_s"]
        for row in content["peers"]:
            if row["warm"] is None:
                del row["warm"]
        return content

    @property
    def rivals(self) -> tuple[str, ...]:
        """Families beside ours, in order."""
        return tuple(dict.fromkeys(family(row.peer) for row in self.peers if family(row.peer) != "ours"))


@dataclass(frozen=True, slots=True)
class Protocol:
    """How times were taken: told, not read back by the tool."""

    clock: str = "time.perf_counter_ns (monotonic)"
    warm_up: str = "each peer prepares, makes one checked call, then two more that are not counted"
    order: str = "interleaved: every round calls each peer once, in a shuffled order of its own"
    statistic: str = "median, quartiles and least of the calls"
    exactness: str = (
        "rows (the fullest, the emptiest, the ends, random ones) of the first and last head are compared with dense "
        "attention in fp64; allowed is twice the error of a plain attention of the same dtype plus one rounding unit"
    )
    flops: str = "useful work only: 4 · edges · head_dim forward, and 10 more of them backward (five products for two)"
    peak: str = (
        "register-resident FMA (bf16: dot-product) loop on the same threads, timed in the same rounds; a share is of "
        "the larger of that and the one at the start of the run"
    )
    memory: str = "what preparation and the first call added to the process's resident memory at the highest"
    gradients: str = (
        "where they are measured: dq of those rows, dk and dv of keys chosen likewise are held to the same rule; the "
        "forward pass alone is timed in the same rounds"
    )
    inputs: str = "standard normal, seed 0; each peer gets its own layout beforehand, untimed"
    seconds: float = 0.0
    min_repeats: int = 0
    max_repeats: int = 0


# What differs on a GPU.
DEVICE_PROTOCOL: Final = Protocol(
    clock="events of the device around each call; what is enqueued before keeps it busy while Python launches the call",
    warm_up="each peer prepares, makes one checked call, then two with a cold and two with a warm L2, not counted",
    order=(
        "interleaved: every round calls each peer with a cold L2 (a buffer of four times the last cache, at least "
        "256 MiB, is written before) and with a warm one (the same call comes before), in a shuffled order of its own"
    ),
    statistic="median, quartiles and least of the calls; `timing` with a cold L2, `warm` with a warm one",
    peak=(
        "torch's product of two 8192 × 8192 matrices of the dtype, timed in the same rounds; so is, for masks of short "
        "rows, a kernel that reads the rows of K and V of every edge and adds them up"
    ),
    memory="what preparation and the first call took of torch's memory on the device at the highest",
)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where and with what it was measured.

    Attributes:
        date: UTC, ISO 8601, of the start.
        commit: Of the checkout; "" outside one.
        is_dirty: Whether tracked files differed from it.
        code_digest: Of sparsec and its templates: results of the same digest belong together.
        device: Key of the device.
        processor: Its model.
        isa: The highest instruction set in use.
        cores: That the process may use.
        memory_bytes: Likewise.
        versions: By name: Python, torch, the compiler and others.
        environment: Variables that change what is measured.
    """

    date: str
    commit: str
    is_dirty: bool
    code_digest: str
    device: str
    processor: str
    isa: str
    cores: int
    memory_bytes: int
    system: str
    versions: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the machine reached at the start of the run, in FLOP/s, on one thread and on all."""

    dtype: str
    unit: str
    one_thread: float
    all_threads: float


@dataclass(frozen=True, slots=True)
class Run:
    """One result file."""

    schema: int
    grid: str
    about: str
    grid_digest: str
    plot: PlotKind
    x: str
    protocol: Protocol
    provenance: Provenance
    threads: int
    ceilings: tuple[Ceiling, ...]
    goals: tuple[Goal, ...]
    cases: tuple[CaseRow, ...]

    @property
    def digest(self) -> str:
        """Of everything in it, so that a plot can say what it was made from."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        content = {**asdict(self), "cases": [row.to_dict() for row in self.cases]}
        for written, row in zip(content["cases"], self.cases, strict=True):
            written["id"] = row.case.id
            written["derived"] = _derived(row, self.ceilings)
        return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _derived(row: CaseRow, ceilings: Sequence[Ceiling]) -> dict[str, Any]:
    """What follows from the measured, for readers of the file."""
    return {
        "ratio": {rival: row.ratio(rival) for rival in row.rivals},
        "break_even_calls": {rival: row.break_even_calls(rival) for rival in row.rivals},
        "gflops": {each.peer: row.gflops(each) for each in row.peers},
        "share_of_peak": {each.peer: row.share_of_peak(each, ceilings) for each in row.peers},
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become None."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_run(path: Path) -> Run:
    """The results in a file.

    Raises:
        ResultError: It is another schema, or damaged; names file and key.
    """
    return read(path, Run)


def write_run(path: Path, run: Run) -> None:
    """Puts the results at `path`, whole or not at all."""
    write(path, run.to_json())


def read(path: Path, kind: type[T]) -> T:
    """What a file of this schema holds.

    Raises:
        ResultError: It is another schema, or damaged; names file and key.
    """
    content = data.read_json(path)
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA:
        raise ResultError(f"{path}: holds results of schema {found!r}, and this tool reads {SCHEMA}; measure again")
    for row in content.get("cases", []):
        if isinstance(row, dict):
            row.pop("id", None)
            row.pop("derived", None)
    try:
        return decode(kind, content, "")
    except (TypeError, KeyError, ValueError) as error:
        raise ResultError(f"{path}: {error}") from None


def write(path: Path, text: str) -> None:
    """Puts a file at `path` that everybody may read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.publish(path, text.encode())
    path.chmod(0o644)


def resumed(path: Path, fresh: Run) -> tuple[CaseRow, ...]:
    """The finished cases of an earlier, interrupted run of the same work.

    Raises:
        ResultError: There is a file of another grid, code, machine or number of threads.
    """
    if not path.exists():
        return ()
    found = read_run(path)
    for what, before, now in (
        ("grid", f"{found.grid} {found.grid_digest}", f"{fresh.grid} {fresh.grid_digest}"),
        ("code", found.provenance.code_digest, fresh.provenance.code_digest),
        ("device", found.provenance.device, fresh.provenance.device),
        ("processor", found.provenance.processor, fresh.provenance.processor),
        ("number of threads", found.threads, fresh.threads),
    ):
        if before != now:
            raise ResultError(
                f"{path} holds results of another {what} ({before}, now {now}); "
                "--fresh replaces it, --out FILE leaves it"
            )
    return found.cases


def decode(kind: type[T], value: Any, where: str) -> T:
    """`value`, as JSON gives it, as a dataclass; unknown and missing keys are named."""
    if not isinstance(value, dict):
        raise TypeError(f"{where or 'the file'} must be an object; it is a {type(value).__name__}")
    hints = typing.get_type_hints(kind)
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]  # always a dataclass
    if unknown := value.keys() - names:
        raise ValueError(f"{where or 'the file'} has keys that are not known: {', '.join(sorted(unknown))}")
    return kind(**{name: _decoded(hints[name], each, f"{where}.{name}".strip(".")) for name, each in value.items()})


def _decoded(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _decoded(next(each for each in arguments if each is not type(None)), value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return decode(hint, value, where)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise TypeError(f"{where} must be a list; it is a {type(value).__name__}")
        return tuple(_decoded(arguments[0], each, f"{where}[{index}]") for index, each in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError(f"{where} must be an object; it is a {type(value).__name__}")
        return value
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}, none of {', '.join(map(repr, arguments))}")
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(f"{where} must be a {hint.__name__}; it is {value!r}")
    return value
