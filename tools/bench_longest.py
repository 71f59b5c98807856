"""The longest context of this machine: in memory, and beyond it from files mapped into memory.

    python tools/bench_longest.py --memory-gib 20 --times 4 --folder DIR --json FILE

In memory: `window(64, 64)`, one head, head_dim 64, bf16; q, k, v and a new output under a limit on the process's
data (`RLIMIT_DATA`), which a second process with two per cent more tokens must run into. Beyond: q, k and v are files;
slices of rows are computed in order, and each slice of the output is written over the q it was made from. That process
is held to less data (`--mapped-gib`); what of the files stays in memory is the system's choice. Sampled rows of both
are held to dense attention in fp64.

Each part runs in a process of its own, so that limits and peaks are its alone.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch
from bench.exactness import Verdict, check, worse
from bench.grid import Case, MaskSource
from bench.sheet import Figure, made, measured, write_sheet
from bench.workload import Workload

import sparsec
from sparsec import Problem
from sparsec import masks as m

REACH, HEAD_DIM = 64, 64
ROW_BYTES: Final = HEAD_DIM * 2
# Rows of different tokens that the tensors repeat; a prime number, so that no slice begins where another did.
POOL_ROWS: Final = 250_007
# Queries of a slice beyond memory.
SLICE_ROWS: Final = 1 << 20
_EDGES: Final = 4096
PROTOCOL = (
    "one process for each part; monotonic clock, one call after one that is not counted in memory, one pass beyond it; "
    "peak is the highest resident size of the process, mapped pages included; tensors repeat 250,007 random rows; "
    "sampled rows at both ends and between are compared with dense attention in fp64, under twice the error of a plain "
    "attention of the same dtype plus one rounding unit"
)


def attend_in_order(mask: m.Mask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int = SLICE_ROWS) -> None:
    """Attention of tensors that need not fit into memory; the output replaces q, slice by slice."""
    bound = mask.bind(q.shape[2])
    for first, stop in _slices(bound.q_len, rows):
        # The keys that these queries attend, and no others.
        attended = bound.rows(first, stop)
        low, high = int(attended.start.min()), int(attended.stop.max())
        part = sparsec.compile(bound[first:stop, low:high])
        q[:, :, first:stop] = part(q[:, :, first:stop], k[:, :, low:high], v[:, :, low:high])


def _slices(n: int, rows: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + rows, n)) for first in range(0, n, rows))


# Parts: each a process, which prints one JSON object.


def in_memory(n: int, limit_bytes: int) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    torch.set_grad_enabled(False)
    pool = _pool()
    q, k, v = (torch.empty(1, 1, n, HEAD_DIM, dtype=torch.bfloat16) for _ in range(3))
    for index, tensor in enumerate((q, k, v)):
        _fill(tensor[0, 0], pool[index])
    attention = sparsec.compile(m.window(REACH, REACH), n)
    started = time.perf_counter_ns()
    out = attention(q, k, v)
    first_us = (time.perf_counter_ns() - started) / 1e3
    del out
    started = time.perf_counter_ns()
    out = attention(q, k, v)
    took_us = (time.perf_counter_ns() - started) / 1e3
    verdict = _verdict(n, lambda rows: out[0, 0][rows], pool)
    return _answer(n, took_us, verdict) | {"first_us": first_us, "layout_bytes": attention.plan.layout_bytes}


def beyond_memory(n: int, limit_bytes: int, folder: str) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    torch.set_grad_enabled(False)
    pool = _pool()
    started = time.perf_counter_ns()
    q, k, v = (
        torch.from_file(f"{folder}/{name}", shared=True, size=n * HEAD_DIM, dtype=torch.bfloat16).view(
            1, 1, n, HEAD_DIM
        )
        for name in "qkv"
    )
    for index, name in enumerate("qkv"):
        _write(Path(folder) / name, n, pool[index])
    wrote_us = (time.perf_counter_ns() - started) / 1e3
    started = time.perf_counter_ns()
    attend_in_order(m.window(REACH, REACH), q, k, v)
    took_us = (time.perf_counter_ns() - started) / 1e3
    verdict = _verdict(n, lambda rows: q[0, 0][rows], pool)
    return _answer(n, took_us, verdict) | {"wrote_us": wrote_us}


PARTS = {"in_memory": in_memory, "beyond_memory": beyond_memory}


def _pool() -> torch.Tensor:
    """`[q k v, rows, head_dim]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, POOL_ROWS, HEAD_DIM, generator=generator).bfloat16()


def _fill(tensor: torch.Tensor, pool: torch.Tensor) -> None:
    for first, stop in _slices(len(tensor), len(pool)):
        tensor[first:stop] = pool[: stop - first]


def _write(path: Path, n: int, pool: torch.Tensor) -> None:
    content = memoryview(pool.view(torch.int16).numpy()).cast("B")
    with path.open("r+b") as file:
        for first, stop in _slices(n, len(pool)):
            file.write(content[: (stop - first) * ROW_BYTES])


def _verdict(n: int, out_rows: Any, pool: torch.Tensor) -> Verdict:
    """Of rows at both ends, at the joints of slices and between; the inputs are worked out again, as q may be gone."""
    chance = np.random.default_rng(5)
    joints = np.arange(0, n, SLICE_ROWS)
    near = np.concatenate([joints, joints - 1, np.arange(min(n, 70)), n - 1 - np.arange(min(n, 70))])
    rows = np.unique(np.concatenate([near[near >= 0], chance.integers(0, n, 200)]))
    keys = np.unique(np.clip(rows[:, None] + np.arange(-REACH, REACH + 1), 0, n - 1))
    verdict = Verdict(0.0, 1.0)
    for part in np.array_split(rows, max(1, len(rows) // 64)):
        near_keys = keys[np.searchsorted(keys, part[0] - REACH) : np.searchsorted(keys, part[-1] + REACH, "right")]
        attended = np.abs(part[:, None] - near_keys) <= REACH
        near_keys, attended = near_keys[attended.any(0)], attended[:, attended.any(0)]
        q = pool[0][part % POOL_ROWS][None, None]
        k, v = (pool[index][near_keys % POOL_ROWS][None, None] for index in (1, 2))
        shape = Problem(len(part), len(near_keys), 1, 1, HEAD_DIM, HEAD_DIM, "bf16")
        case = Case("longest", "attention", MaskSource("text", "full()"), dtype="bf16")
        bound = m.from_dense(attended).bind()
        found = _all_rows(Workload(case, bound, shape, q, k, v), out_rows(torch.from_numpy(part)))
        verdict = max(verdict, found, key=lambda each: each.error / each.allowed)
    return verdict


def _all_rows(work: Workload, out: torch.Tensor) -> Verdict:
    """`check` looks at some rows of a mask; here each row is one that was sampled."""
    verdicts = []
    for row in range(work.bound.q_len):
        bound = work.bound[row : row + 1, :]
        single = Workload(
            work.case,
            bound,
            Problem(1, bound.kv_len, 1, 1, HEAD_DIM, HEAD_DIM, "bf16"),
            work.q[:, :, row : row + 1],
            work.k,
            work.v,
        )
        verdicts.append(check(single, out[None, None, row : row + 1], bound))
    return worse(verdicts)


def _answer(n: int, took_us: float, verdict: Verdict) -> dict[str, Any]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "n": n,
        "took_us": took_us,
        "error": verdict.error,
        "allowed": verdict.allowed,
        "peak_bytes": usage.ru_maxrss * 1024,
        "data_bytes": _status_bytes("VmData"),
    }


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def ask(part: str, **arguments: Any) -> dict[str, Any] | str:
    """What a part found, or the last line of what it said when it failed."""
    done = subprocess.run(
        [sys.executable, __file__, "part", part, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
        return "out of memory" if "allocate memory" in last or "MemoryError" in last else last
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def longest(limit_bytes: int) -> tuple[dict[str, Any], str]:
    """The most tokens that run under the limit, within two per cent, and how two per cent more of them end.

    Raises:
        click.ClickException: None run.
    """
    # What the process needs beside the tensors, found on a million tokens.
    small = ask("in_memory", n=1_000_000, limit_bytes=limit_bytes)
    if isinstance(small, str):
        raise click.ClickException(f"a million tokens do not fit into {limit_bytes / 2**30:g} GiB: {small}")
    n = int((limit_bytes - small["data_bytes"]) / (4 * ROW_BYTES + small["layout_bytes"] / 1e6)) + 1_000_000
    for _ in range(4):
        click.echo(f"trying {n:,} tokens in memory", err=True)
        found = ask("in_memory", n=n, limit_bytes=limit_bytes)
        if not isinstance(found, str):
            more = ask("in_memory", n=int(n * 1.02), limit_bytes=limit_bytes)
            if isinstance(more, str):
                return found, more
            n = int(n * 1.02)
        else:
            n = int(n * 0.985)
    raise click.ClickException(f"no length was found that runs where two per cent more does not; the last was {n:,}")


@click.group(invoke_without_command=True)
@click.option("--memory-gib", type=float, default=20.0, show_default=True, help="Limit of the part in memory.")
@click.option("--mapped-gib", type=float, default=2.0, show_default=True, help="Limit of the part beyond memory.")
@click.option("--times", type=float, default=4.0, show_default=True, help="Tokens beyond memory over those in memory.")
@click.option(
    "--folder", type=click.Path(file_okay=False, exists=True), help="Where the mapped files go, and are removed."
)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also writes the results here.")
@click.pass_context
def main(
    context: click.Context, memory_gib: float, mapped_gib: float, times: float, folder: str | None, path: Path | None
) -> None:
    """Finds the longest context in memory, and computes one that is longer than memory."""
    if context.invoked_subcommand is not None:
        return
    limit_bytes = int(memory_gib * 2**30)
    found, refused = longest(limit_bytes)
    shape: dict[str, int | float | str] = {
        "mask": f"window({REACH}, {REACH})",
        "head_dim": HEAD_DIM,
        "heads": 1,
        "dtype": "bf16",
    }
    n = found["n"]
    figures = [
        Figure(
            "longest in memory",
            n,
            "tokens",
            shape,
            error=found["error"],
            allowed=found["allowed"],
            note=f"data of the process held to {memory_gib:g} GiB; 2% more tokens: {refused}",
        ),
        Figure("one call of it", found["took_us"], "us", shape, note=f"the first took {found['first_us'] / 1e6:.3g} s"),
        Figure("peak resident size of it", found["peak_bytes"], "bytes", shape),
    ]
    # The second part may take long, or more than the disk has.
    _kept(path, memory_gib, figures)
    with tempfile.TemporaryDirectory(dir=folder, prefix="sparsec-longest-") as inside:
        long = int(n * times) + 1
        needed, free = 3 * long * ROW_BYTES, shutil.disk_usage(inside).free
        if needed > 0.95 * free:
            raise click.ClickException(
                f"{long:,} tokens need {needed / 2**30:.1f} GiB in {inside}, and {free / 2**30:.1f} GiB are free there"
            )
        click.echo(f"{long:,} tokens from mapped files of {needed / 2**30:.1f} GiB", err=True)
        beyond = ask("beyond_memory", n=long, limit_bytes=int(mapped_gib * 2**30), folder=inside)
        if isinstance(beyond, str):
            raise click.ClickException(f"beyond memory: {beyond}")
    held = (
        f"data of the process held to {mapped_gib:g} GiB; q, k, v and out take {4 * long * ROW_BYTES / 2**30:.1f} GiB"
    )
    figures += [
        Figure(
            "from mapped files",
            long,
            "tokens",
            shape,
            error=beyond["error"],
            allowed=beyond["allowed"],
            base="longest in memory",
            note=f"{held}; out is written over q, files of {needed / 2**30:.1f} GiB",
        ),
        Figure(
            "one pass of it",
            beyond["took_us"],
            "us",
            shape,
            note=f"writing the files before took {beyond['wrote_us'] / 1e6:.3g} s",
        ),
        Figure(
            "peak resident size of it, mapped pages included",
            beyond["peak_bytes"],
            "bytes",
            shape,
            note="the system lets mapped pages stay while there is room for them",
        ),
        Figure("most data of it", beyond["data_bytes"], "bytes", shape, note="private memory at the end"),
    ]
    for figure in figures:
        click.echo(f"{figure.what:48} {measured(figure):>20}  exact: {figure.is_exact}  {figure.note}")
    _kept(path, memory_gib, figures)


def _kept(path: Path | None, memory_gib: float, figures: list[Figure]) -> None:
    if path is not None:
        about = f"The longest context under {memory_gib:g} GiB, and one beyond memory, on a CPU"
        write_sheet(path, made("longest", about, PROTOCOL, torch.get_num_threads(), figures))


@main.command(hidden=True)
@click.argument("name", type=click.Choice(list(PARTS)))
@click.argument("arguments")
def part(name: str, arguments: str) -> None:
    """One part, in this process."""
    # The parts differ in their arguments.
    run: Any = PARTS[name]
    print(json.dumps(run(**json.loads(arguments))))


if __name__ == "__main__":
    main()
