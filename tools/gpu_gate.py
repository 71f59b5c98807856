#!/usr/bin/env python3
"""Verifies, tests and times the GPU kernels on the machine at hand, and writes down what was seen.

    tools/gpu_gate.py run [--budget-s 1500] [--part verify ...]
    tools/gpu_gate.py report

`run` needs a GPU. It does the most valuable things first, each part within a share of the budget, writes every result
as it comes, and goes on where it was when started again at the same commit with the same toolchain. `report` makes
GPU.md from those records and from the list of what the tests lower. This file decides what is worth knowing of a GPU;
it claims nothing that was not run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from sparsec import data
from sparsec import masks as m
from sparsec.backends import reference
from sparsec.backends.base import BACKENDS, DTYPES, Launch, Problem, backend
from sparsec.device import Device, detect_gpu
from sparsec.masks.mask import Mask
from sparsec.planner.works import build_work
from sparsec.template import KERNEL_FILES, Template, templates

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "gpu"
TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DIRECTIONS = ("forward", "backward")

Result = dict[str, Any]  # one JSON object of a record


@dataclass(frozen=True)
class Case:
    """One hard case: a mask and a problem small enough for the fp64 reference."""

    name: str
    mask: Mask
    problem: Problem
    scale: float | None = None


def hard_cases() -> list[Case]:
    """Most telling first: everything at once, then what each thing breaks on."""
    rng = np.random.default_rng(7)
    dense = rng.random((211, 307)) < 0.08
    dense[3:170, 10:200] = True
    dense[5] = dense[64] = False
    dense[17] = dense[166] = True
    dense[:, 100] = False
    everything = m.from_dense(dense)
    degrees = [3, 900, 0, 1, 7, 2, 899, 64, 5, 0, 31]
    rows = [np.sort(rng.choice(1000, n, replace=False)) for n in degrees]
    long_rows = m.from_csr(np.cumsum([0, *degrees]), np.concatenate(rows), 1000)
    grouped = Problem(211, 307, 8, 2, 40, 24, batch=2)
    return [
        Case("everything", everything, grouped),
        Case("everything-d128", everything, replace(grouped, head_dim=128, v_dim=128)),
        Case("everything-d256", everything, Problem(211, 307, 2, 1, 256, 256)),
        Case("long-rows", long_rows, Problem(len(degrees), 1000, 2, 2, 64, 64)),
        Case("window", m.window(100, 3), Problem(777, 777, 4, 1, 64, 64)),
        Case("dilated", m.dilated(200, 7), Problem(500, 600, 1, 1, 80, 80)),
        Case("full-ragged", m.full(), Problem(130, 331, 1, 1, 64, 1)),
        Case("empty", ~m.full(), Problem(65, 70, 1, 1, 16, 16)),
        Case("one-dim", m.random_edges(9, 1), Problem(200, 300, 1, 1, 1, 256)),
        Case("negative-scale", everything, grouped, scale=-0.3),
    ]


# What a record holds.


class Record:
    """Results of one device at one commit with one toolchain; written whole, by rename, after every result."""

    def __init__(self, device: Device) -> None:
        import torch

        self.path = RESULTS / f"{device.key}.json"
        names = dict.fromkeys(name for _, name in own_kernels(device))
        self.about = {
            "device": device.key,
            "label": torch.cuda.get_device_name(),
            "arch": device.arch,
            "commit": commit(),
            "toolchain": ", ".join([*(backend(name).toolchain() for name in names), f"torch {torch.__version__}"]),
        }
        kept = json.loads(self.path.read_text()) if self.path.is_file() else {}
        is_same = all(kept.get(key) == value for key, value in self.about.items())
        self.results: dict[str, Result] = kept["results"] if is_same else {}

    def is_done(self, key: str) -> bool:
        return self.results.get(key, {}).get("status") == "passed"

    def write(self, key: str, result: Result) -> None:
        self.results[key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.about, "results": self.results}, indent=1) + "\n"
        beside = self.path.with_suffix(".tmp")
        beside.write_text(text)
        os.replace(beside, self.path)


def commit() -> str:
    """The commit that is checked out; "+" says that files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


# Part "verify": every template, dtype and direction on the hard cases.


def own_kernels(device: Device) -> list[tuple[Template, str]]:
    """Every template with every GPU back end that has kernels for it and runs here."""
    return [
        (each, name)
        for name in BACKENDS
        if device.kind != "cpu" and backend(name).serves(device)
        for each in templates().values()
        if name in KERNEL_FILES and name in each.backends() and backend(name).missing(device) is None
    ]


def launch_of(each: Template, name: str, case: Case, dtype: str, device: Device) -> Launch:
    problem = replace(case.problem, dtype=dtype)
    bound = case.mask.bind(problem.q_len, problem.kv_len)
    config = each.default(name)
    work = build_work(each, config, bound, problem, device, heads=problem.q_heads)
    heads, batch = tuple(range(problem.q_heads)), tuple(range(problem.batch))
    scale = problem.head_dim**-0.5 if case.scale is None else case.scale
    return Launch(each, name, config, problem, device, work, heads, batch, scale)


def verifications(device: Device) -> Iterator[tuple[str, Callable[[], None]]]:
    """`(key, check)`; a check raises where something is wrong."""
    for case in hard_cases():
        for direction in DIRECTIONS:
            for each, name in own_kernels(device):
                for dtype in reversed(DTYPES):
                    key = f"verify/{each.name}/{name}/{dtype}/{direction}/{case.name}"
                    yield (
                        key,
                        lambda e=each, n=name, c=case, t=dtype, d=direction: verify(launch_of(e, n, c, t, device), d),
                    )


def verify(launch: Launch, direction: str) -> None:
    """Holds one launch to the fp64 reference, with outputs full of NaN before."""
    import torch

    p = launch.problem
    dtype = getattr(torch, TORCH_NAMES[p.dtype])
    generator = torch.Generator().manual_seed(11)

    def random(heads: int, length: int, dim: int) -> Any:  # a tensor
        # Coarse values: products and their sums are exact in fp32, so that errors are the kernel's own.
        drawn = torch.randn(p.batch, heads, length, dim, generator=generator)
        return drawn.mul(8).round().div(8).to(dtype)

    q, k, v = (
        random(p.q_heads, p.q_len, p.head_dim),
        random(p.kv_heads, p.kv_len, p.head_dim),
        random(p.kv_heads, p.kv_len, p.v_dim),
    )
    out = torch.full((p.batch, p.q_heads, p.q_len, p.v_dim), float("nan"), dtype=dtype)
    lse = torch.full(out.shape[:3], float("nan"))
    d_out = random(p.q_heads, p.q_len, p.v_dim)
    d_lse = torch.randn(lse.shape, generator=generator)
    group, bound, scale = p.q_heads // p.kv_heads, launch.work.bound, launch.scale
    on = [tensor.cuda() for tensor in (q, k, v)]
    if direction == "forward":
        device_out, device_lse = out.cuda(), lse.cuda()
        backend(launch.backend).lower(launch)(*on, device_out, device_lse)
        out, lse = device_out.cpu(), device_lse.cpu()
    else:
        reference.ReferenceKernel(launch)(q, k, v, out, lse)
        dq, dk, dv = torch.full_like(on[0], float("nan")), torch.zeros(k.shape).cuda(), torch.zeros(v.shape).cuda()
        kernel = backend(launch.backend).lower_backward(launch)
        kernel(*on, out.cuda(), lse.cuda(), d_out.cuda(), d_lse.cuda(), dq, dk, dv)
        dq, dk, dv = dq.cpu(), dk.cpu(), dv.cpu()
    for b, kv_head in np.ndindex(p.batch, p.kv_heads):
        sums, limits = [0.0, 0.0], [1e-6, 1e-6]
        for h in range(kv_head * group, (kv_head + 1) * group):
            heads = tuple(t.double().numpy() for t in (q[b, h], k[b, kv_head], v[b, kv_head]))
            where = f"head {h} of batch element {b}"
            if direction == "forward":
                wanted = reference.attention(*heads, bound, scale)
                allowed = reference.tolerances(*heads, bound, scale, p.dtype)
                hold(f"out of {where}", out[b, h], wanted[0], allowed[0])
                hold(f"lse of {where}", lse[b, h], wanted[1], allowed[1])
                continue
            above = d_out[b, h].double().numpy(), d_lse[b, h].double().numpy()
            wanted = reference.gradients(*heads, bound, scale, *above)
            allowed = reference.gradient_tolerances(*heads, bound, scale, *above, p.dtype)
            hold(f"dq of {where}", dq[b, h], wanted[0], allowed[0])
            sums = [total + more for total, more in zip(sums, wanted[1:], strict=True)]
            limits = [total + more for total, more in zip(limits, allowed[1:], strict=True)]
        if direction == "backward":
            hold(f"dk of key head {kv_head}", dk[b, kv_head], sums[0], limits[0])
            hold(f"dv of key head {kv_head}", dv[b, kv_head], sums[1], limits[1])


def hold(what: str, tensor: Any, expected: Any, allowed: float) -> None:
    """Raises where a tensor is further off than allowed, or not a number."""
    got = tensor.double().numpy()
    same = got == expected
    error = float(np.where(same, 0.0, np.abs(got - np.where(same, 0.0, expected))).max(initial=0.0))
    if not error <= allowed:
        raise AssertionError(f"{what} is off by {error:.3g}, and {allowed:.3g} is allowed")


# Part "offsets": addresses beyond 2^31 elements.


def far_offsets(device: Device) -> Iterator[tuple[str, Callable[[], None]]]:
    kernels = own_kernels(device)
    for each, name in kernels:
        for dtype in ("bf16", "fp16"):
            key = f"offsets/{each.name}/{name}/{dtype}/forward/far-rows"
            yield key, lambda e=each, n=name, t=dtype: far_rows(e, n, t, device)
    for each, name in kernels:
        if each.layout != "hybrid":
            key = f"offsets/{each.name}/{name}/bf16/forward/17-million-tokens"
            yield key, lambda e=each, n=name: many_tokens(e, n, device)


def far_rows(each: Template, name: str, dtype: str, device: Device) -> None:
    """A few rows, heads and batch elements that lie 2^28 elements apart and more."""
    import torch

    apart = 2**28
    case = Case("far-rows", m.from_dense(np.tri(5, 5, dtype=bool)), Problem(5, 5, 2, 2, 8, 8, batch=2))
    launch = launch_of(each, name, case, dtype, device)
    storage = torch.empty(20 * apart, dtype=getattr(torch, TORCH_NAMES[dtype]), device="cuda")
    generator = torch.Generator().manual_seed(3)
    near = [torch.randn(2, 2, 5, 8, generator=generator).to(storage.dtype) for _ in range(4)]
    views = []
    for number, tensor in enumerate(near):
        view = storage.as_strided(tensor.shape, (10 * apart, 5 * apart, apart, 1), 64 * number)
        view.copy_(tensor)
        views.append(view)
    lse = torch.full((2, 2, 5), float("nan"), device="cuda")
    backend(launch.backend).lower(launch)(*views, lse)
    for b, h in np.ndindex(2, 2):
        heads = tuple(t[b, h].double().numpy() for t in near[:3])
        wanted = reference.attention(*heads, launch.work.bound, launch.scale)
        allowed = reference.tolerances(*heads, launch.work.bound, launch.scale, dtype)
        hold("out", views[3][b, h].cpu(), wanted[0], allowed[0])
        hold("lse", lse[b, h].cpu(), wanted[1], allowed[1])


def many_tokens(each: Template, name: str, device: Device) -> None:
    """One head of 17 million tokens of 128 dimensions: 2.2 · 10^9 elements a tensor. Rows at both ends are checked."""
    import torch

    length, dim, reach = 17_000_000, 128, 40
    case = Case("many", m.window(reach, reach), Problem(length, length, 1, 1, dim, dim))
    launch = launch_of(each, name, case, "bf16", device)
    q, k, v = (torch.randn(1, 1, length, dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    out = torch.full_like(q, float("nan"))
    lse = torch.full((1, 1, length), float("nan"), device="cuda")
    backend(launch.backend).lower(launch)(q, k, v, out, lse)
    assert not torch.isnan(lse).any()
    for first in (0, 2**31 // dim - 100, length - 200):
        piece = slice(first, first + 200)
        heads = tuple(t[0, 0, piece].double().cpu().numpy() for t in (q, k, v))
        bound = m.window(reach, reach).bind(200)
        wanted = reference.attention(*heads, bound, launch.scale)
        allowed = reference.tolerances(*heads, bound, launch.scale, "bf16")
        # Rows whose keys all lie in the piece.
        inner = slice(0 if first == 0 else reach, 200 if first + 200 == length else 200 - reach)
        hold(f"out from row {first} on", out[0, 0, piece][inner].cpu(), wanted[0][inner], allowed[0])
        hold(f"lse from row {first} on", lse[0, 0, piece][inner].cpu(), wanted[1][inner], allowed[1])


# Part "bench": a small table, against torch's own.


def bench_cases() -> Iterator[tuple[str, Mask, Problem]]:
    wide = Problem(32_768, 32_768, 64, 8, 128, 128, "bf16")
    plain = Problem(32_768, 32_768, 16, 16, 128, 128, "bf16")
    yield "window-1023-gqa8", m.window(1023, 0), wide
    yield "causal", m.causal(), plain
    yield "bigbird", m.bigbird(64, 3, 2, 3, 0), plain
    yield "dilated", m.dilated(2048, 16), plain
    graph = ROOT / "data" / "debian_depends.npz"
    for found in (graph, *sorted(ROOT.parent.glob("shared/data/debian_depends.npz"))):
        if found.is_file():
            mask = m.load(found)
            length = mask.bind(None).q_len
            yield "debian-graph", mask, Problem(length, length, 8, 8, 64, 64, "fp16")
            return


def benchmarks(device: Device) -> Iterator[tuple[str, Callable[[], Result]]]:
    for name, mask, problem in bench_cases():
        for each, server in own_kernels(device):
            key = f"bench/{name}/{each.name} on {server}"
            yield key, lambda e=each, s=server, n=name, a=mask, p=problem: time_own(e, s, Case(n, a, p), device)
        yield f"bench/{name}/flex_attention", lambda a=mask, p=problem: time_flex(a, p)
        if name == "causal":
            yield f"bench/{name}/sdpa", lambda p=problem: time_sdpa(p)


def bench_inputs(p: Problem) -> tuple[Any, Any, Any]:
    import torch

    dtype = getattr(torch, TORCH_NAMES[p.dtype])
    shapes = ((p.q_heads, p.q_len, p.head_dim), (p.kv_heads, p.kv_len, p.head_dim), (p.kv_heads, p.kv_len, p.v_dim))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, *shape, dtype=dtype, device="cuda") for shape in shapes)
    return q, k, v


def time_own(each: Template, name: str, case: Case, device: Device) -> Result:
    import torch

    p = case.problem
    launch = launch_of(each, name, case, p.dtype, device)
    kernel = backend(launch.backend).lower(launch)
    q, k, v = bench_inputs(p)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device="cuda")
    kernel(q, k, v, out, lse)
    check_rows(q, k, v, out, launch)
    timed = median_us(lambda: kernel(q, k, v, out, lse))
    return timed | {"tflops": p.flops(launch.work.bound.nnz) / timed["us"] * 1e-6, "config": str(launch.config)}


def check_rows(q: Any, k: Any, v: Any, out: Any, launch: Launch) -> None:
    """Holds a few rows to the reference: a timed kernel is an exact one."""
    bound = launch.work.bound
    rows = np.unique(np.linspace(0, bound.q_len - 1, 24).astype(int))
    kv = (launch.problem.q_heads - 1) // (launch.problem.q_heads // launch.problem.kv_heads)
    heads = tuple(t.double().cpu().numpy() for t in (q[0, -1], k[0, kv], v[0, kv]))
    wanted, _ = reference.attention(*heads, bound, launch.scale, rows)
    got = out[0, -1].double().cpu().numpy()[rows]
    limit = 8 * reference.unit_roundoff(launch.problem.dtype) * max(1.0, float(np.abs(wanted).max()))
    error = float(np.abs(got - wanted).max())
    if not error <= limit:
        raise AssertionError(f"a timed row is off by {error:.3g}, and {limit:.3g} is allowed")


def time_flex(mask: Mask, p: Problem) -> Result:
    """FlexAttention, compiled with max-autotune; where the mask has no predicate it is not a peer."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    predicate = {
        "window(1023, 0)": lambda b, h, q, kv: (q >= kv) & (q - kv <= 1023),
        "causal()": lambda b, h, q, kv: q >= kv,
        "dilated(2048, 16)": lambda b, h, q, kv: ((q - kv).abs() <= 2048) & ((q - kv) % 16 == 0),
    }.get(str(mask))
    if predicate is None:
        return {"status": "skipped", "why": f"no predicate is written for {mask}"}
    block_mask = create_block_mask(predicate, None, None, p.q_len, p.kv_len, device="cuda")
    compiled = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs", dynamic=False)
    q, k, v = bench_inputs(p)
    grouped = p.q_heads != p.kv_heads
    timed = median_us(lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped))
    return timed | {"tflops": p.flops(mask.bind(p.q_len, p.kv_len).nnz) / timed["us"] * 1e-6}


def time_sdpa(p: Problem) -> Result:
    import torch

    q, k, v = bench_inputs(p)
    attend = torch.nn.functional.scaled_dot_product_attention
    timed = median_us(lambda: attend(q, k, v, is_causal=True))
    return timed | {"tflops": p.flops(p.q_len * (p.q_len + 1) // 2) / timed["us"] * 1e-6}


def median_us(call: Callable[[], object], repeats: int = 30) -> Result:
    """Median and spread of device time, microseconds, each with a cold L2."""
    import torch

    for _ in range(3):
        call()
    flushed = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        flushed.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    low, _, high = statistics.quantiles(times, n=4)
    return {"us": statistics.median(times), "spread_us": high - low}


# Part "tests": what pytest marks `gpu`.


def gpu_tests(device: Device) -> Iterator[tuple[str, Callable[[], Result]]]:
    def run_pytest() -> Result:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x", "--no-header", "tests"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
        last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-300:]]
        if done.returncode:
            raise AssertionError(f"pytest -m gpu: {last[0]}")
        return {"summary": last[0]}

    yield "tests/pytest-m-gpu", run_pytest


# Part "sanitize": memory errors and races, under a tool that not every machine has.


def sanitized(device: Device) -> Iterator[tuple[str, Callable[[], Result]]]:
    for each, name in own_kernels(device):
        if name != "cuda":
            continue
        for direction in DIRECTIONS:
            for tool in ("memcheck", "racecheck", "synccheck"):
                key = f"verify/{each.name}/{name}/bf16/{direction}/long-rows"
                yield f"sanitize/{each.name}/{name}/{direction}/{tool}", lambda t=tool, k=key: sanitize(t, k)


def sanitize(tool: str, key: str) -> Result:
    if shutil.which("compute-sanitizer") is None:
        return {"status": "skipped", "why": "compute-sanitizer is not on the PATH"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "once", key]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise AssertionError(f"compute-sanitizer --tool {tool}: {(done.stdout + done.stderr)[-1500:]}")
    return {}


# Part, its tasks, and the share of the budget it may take.
PARTS: dict[str, tuple[Callable[[Device], Iterator[tuple[str, Callable[[], Any]]]], float]] = {
    "verify": (verifications, 0.4),
    "offsets": (far_offsets, 0.15),
    "bench": (benchmarks, 0.25),
    "tests": (gpu_tests, 0.15),
    "sanitize": (sanitized, 0.05),
}


@click.group()
def main() -> None:
    """Verifies, tests and times the GPU kernels on the machine at hand."""


@main.command()
@click.option("--budget-s", default=1500.0, show_default=True, help="Seconds for everything.")
@click.option("--part", "parts", multiple=True, type=click.Choice([*PARTS]), help="Only this part.")
def run(budget_s: float, parts: tuple[str, ...]) -> None:
    """Runs what is not recorded yet; started again, it goes on."""
    device = detect_gpu()
    record = Record(device)
    wanted = parts or tuple(PARTS)
    total_share = sum(PARTS[name][1] for name in wanted)
    left_over = 0.0
    for name in wanted:
        tasks, share = PARTS[name]
        until = time.monotonic() + budget_s * share / total_share + left_over
        for key, task in tasks(device):
            if record.is_done(key):
                continue
            if time.monotonic() > until:
                click.echo(f"{name}: out of time; start again to go on", err=True)
                break
            started = time.monotonic()
            result = outcome(task)
            record.write(key, result | {"seconds": round(time.monotonic() - started, 2)})
            click.echo(f"{result['status']:8} {key} {result.get('error', '')}", err=True)
        left_over = max(0.0, until - time.monotonic())
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for result in record.results.values():
        counts[result["status"]] += 1
    click.echo(json.dumps({**record.about, **counts, "record": str(record.path.relative_to(ROOT))}))
    if counts["failed"]:
        raise SystemExit(1)


@main.command()
@click.argument("key")
def once(key: str) -> None:
    """Runs one verification, for a tool that watches it."""
    device = detect_gpu()
    dict(verifications(device))[key]()


def outcome(task: Callable[[], Any]) -> Result:
    """What came of a task; a failure is a result, and the others go on."""
    try:
        found = task()
    except Exception as error:  # a kernel may fail in any way; whatever it is, it is recorded
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
    return {"status": "passed", **(found or {})}


@main.command()
def report() -> None:
    """Makes GPU.md from the records and from what the tests lower."""
    (ROOT / "GPU.md").write_text(gpu_md())


def gpu_md() -> str:
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    lines = [
        "# What has been run on GPUs",
        "",
        "Made by `tools/gpu_gate.py report` from the records in `benchmarks/gpu/`; not edited by hand.",
        "*Verified*: equal to dense attention in fp64 on all hard cases of `tools/gpu_gate.py`, on that device at that",
        "commit. *Lowered*: compiled to a binary for that architecture by the tests, and not run there.",
        "",
        "| template | back end | direction | dtype | architecture | state |",
        "|---|---|---|---|---|---|",
    ]
    rows = dict(lowered_rows())
    for record in records:
        rows |= dict(verified_rows(record))
    lines += [f"| {' | '.join(key)} | {state} |" for key, state in sorted(rows.items())]
    if not records:
        lines += ["", "No GPU has run any of these kernels yet: there is no record."]
    for record in records:
        lines += ["", f"## {record['label']} ({record['device']})", ""]
        lines += [f"Commit {record['commit']}, {record['toolchain']}.", ""]
        lines += [*measured_lines(record)]
    return "\n".join(lines) + "\n"


def lowered_rows() -> Iterator[tuple[tuple[str, ...], str]]:
    """What the lowering tests compile, by the ids pytest collects."""
    arches = {device.name: device.arch for device in all_devices()}
    pattern = r"\[(\w+)-((?:nvidia|amd)-[\w-]+?|sm_\d+)-(fp32|fp16|bf16)-(forward|backward)-d\d+"
    for server in ("triton", "cuda"):
        target = f"tests/kernels/test_{server}_lowering.py"
        command = [sys.executable, "-m", "pytest", "--collect-only", target, "-k", "test_the_default_does_not_spill"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if found.returncode or "test_the_default_does_not_spill" not in found.stdout:
            raise click.ClickException(f"{target} could not be collected (is {server} installed?):\n{found.stdout}")
        for name, gpu, dtype, direction in re.findall(pattern, found.stdout):
            yield (name, server, direction, dtype, arches.get(gpu, gpu)), "lowered"


def all_devices() -> Iterator[Device]:
    from sparsec.device import device

    for name in data.read_yaml(ROOT / "sparsec" / "devices.yaml"):
        yield device(name)


def verified_rows(record: Result) -> Iterator[tuple[tuple[str, ...], str]]:
    cases = len(hard_cases())
    by_row: dict[tuple[str, ...], list[str]] = {}
    for key, result in record["results"].items():
        part, *rest = key.split("/")
        if part == "verify":
            name, server, dtype, direction, _ = rest
            by_row.setdefault((name, server, direction, dtype, record["arch"]), []).append(result["status"])
    for row, statuses in by_row.items():
        passed = statuses.count("passed")
        if "failed" in statuses:
            state = f"**failed** {statuses.count('failed')} of {len(statuses)} cases on {record['label']}"
        elif passed == cases:
            state = f"verified on {record['label']} at {record['commit']}"
        else:
            state = f"{passed} of {cases} cases verified on {record['label']} at {record['commit']}"
        yield row, state


def measured_lines(record: Result) -> Iterator[str]:
    results = record["results"]
    for key, result in results.items():
        if not key.startswith(("verify/", "bench/")):
            yield f"- {key}: {result['status']} {result.get('summary', result.get('error', ''))}".rstrip()
    timed = {key: result for key, result in results.items() if key.startswith("bench/")}
    if timed:
        yield ""
        yield "| case | who | µs (spread) | TFLOP/s useful |"
        yield "|---|---|---|---|"
    for key, result in timed.items():
        _, case, who = key.split("/")
        if "us" in result:
            yield f"| {case} | {who} | {result['us']:.0f} ({result['spread_us']:.0f}) | {result['tflops']:.0f} |"
        else:
            yield f"| {case} | {who} | {result['status']}: {result.get('why', result.get('error', ''))} | |"


if __name__ == "__main__":
    main()
