"""How long a question to a large record base takes: reading it, asking it, and asking an empty one.

    python tools/bench_lookup.py --records 100000

The records are made up: random timings of every configuration of `block_sparse` on random masks, spread over kernels as
a fleet's would be. Questions are about other masks, so that each is answered by its nearest neighbour.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click
from bench.script import Aim, finish, json_option

from sparsec import data
from sparsec.analysis.signatures import MaskSignature
from sparsec.records import RecordBase, RecordKey, TuningRecord, Workload
from sparsec.template import template

_KERNELS = tuple(itertools.product(("forward", "backward"), ("fp32", "bf16"), (32, 64, 80, 96, 128), (1, 4)))
_DEVICE = "cpu-x86-64-avx512-2c"
_TOOLCHAIN = "g++ 12"


@click.command()
@click.option("--records", "n_records", type=click.IntRange(min=1), default=100_000, show_default=True)
@click.option("--questions", "n_questions", type=click.IntRange(min=1), default=2_000, show_default=True)
@json_option
def bench(n_records: int, n_questions: int, path: Path | None) -> None:
    """Says how long lookups take."""
    keys = [_key(*kernel) for kernel in _KERNELS]
    chance = random.Random(0)
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"{_DEVICE}.jsonl"
        file.write_bytes(b"".join(itertools.islice(_lines(keys, chance), n_records)))
        base, empty = RecordBase([], Path(folder)), RecordBase([], Path(folder) / "none")
        click.echo(f"{n_records:,} records of {len(keys)} kernels, {file.stat().st_size / 1e6:.0f} MB")
        first_ms = _us(lambda: _ask(base, keys[0], chance)) / 1e3
        click.echo(f"first question, the file read: {first_ms:.1f} ms")
        for key in keys:
            _ask(base, key, chance)
        warm = _told("warm", [_us(lambda: _ask(base, chance.choice(keys), chance)) for _ in range(n_questions)])
        none = _told("empty", [_us(lambda: empty.knows(_DEVICE)) for _ in range(n_questions)])
    aims = [
        Aim(f"a warm question to {n_records:,} records, the median:", warm.median_us, at_most=1e3, form="{:.0f} µs")
    ]
    times = {"first_ms": first_ms, "warm": asdict(warm), "empty": asdict(none)}
    finish(aims, {"records": n_records, "questions": n_questions, **times}, path)


def _key(direction: str, dtype: str, head_dim: int, group: int) -> RecordKey:
    source = template("block_sparse").digest_of("cpu")
    return RecordKey(_DEVICE, "block_sparse", source, "cpu", direction, dtype, head_dim, head_dim, group)


def _lines(keys: list[RecordKey], chance: random.Random) -> Iterator[bytes]:
    for key in itertools.cycle(keys):
        workload = _workload(chance)
        for config in template("block_sparse").configs("cpu"):
            timings = tuple(chance.uniform(50.0, 100.0) for _ in range(10))
            yield data.json_line(TuningRecord(key, workload, config, timings, toolchain=_TOOLCHAIN).to_json()) + b"\n"


def _workload(chance: random.Random) -> Workload:
    octave = chance.randint(3, 14)
    mask = MaskSignature(
        octave, octave + chance.randint(0, 3), chance.randint(0, 5), chance.randint(3, 14), -chance.randint(0, 10)
    )
    return Workload(mask, 4096, 4096, 4, 1, chance.randint(10**3, 10**9))


def _ask(base: RecordBase, key: RecordKey, chance: random.Random) -> None:
    base.lookup(key, _workload(chance), toolchain=_TOOLCHAIN)


def _us(act: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    act()
    return (time.perf_counter_ns() - started) / 1e3


@dataclass(frozen=True)
class _Times:
    """Of many questions."""

    median_us: float
    within_us: float


def _told(name: str, times_us: list[float]) -> _Times:
    """The median, and what 99 % of the questions stay within."""
    ordered = sorted(times_us)
    found = _Times(median(ordered), ordered[max(len(ordered) * 99 // 100 - 1, 0)])
    click.echo(f"{name}: median {found.median_us:.0f} µs, 99 % within {found.within_us:.0f} µs")
    return found


if __name__ == "__main__":
    bench()
