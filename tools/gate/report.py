"""GPU.md: what was verified where, and what is only lowered; from records and from what the tests lower.

This file decides the words. It claims nothing that was not run.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from gate.checks import hard_cases
from sparsec import data
from sparsec.device import Device

ROOT = Path(__file__).resolve().parents[2]

# What pytest exits with where it has found no test of that mark.
_NOTHING_CHOSEN = 5

Result = dict[str, Any]  # one JSON object of a record


def gpu_md(results: Path) -> str:
    """The page, from the records in a folder and the ids of the tests that lower."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    lines = [
        "# What has been run on GPUs",
        "",
        "Made by `tools/gpu_gate.py report` from the records in `benchmarks/gpu/`; not edited by hand.",
        "*Verified*: equal to dense attention in fp64 on all hard cases of `tools/gpu_gate.py`, on that device at that",
        "commit. *Lowered*: compiled to a binary for that architecture, and not run there: by `make test`, or by the",
        "longer `make spread`.",
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
    """What the lowering tests compile, and which command runs them, by the ids pytest collects."""
    arches = {device.name: device.arch for device in all_devices()}
    pattern = r"\[(\w+)-((?:nvidia|amd)-[\w-]+?|sm_\d+)-(fp32|fp16|bf16)-(forward|backward)-d\d+"
    commands = (("spread", "make spread"), ("not spread", "make test"))
    for server, (marked, maker) in itertools.product(("triton", "cuda"), commands):
        target = f"tests/kernels/test_{server}_lowering.py"
        chosen = ["-m", marked, "-k", "test_the_default_does_not_spill"]
        command = [sys.executable, "-m", "pytest", "--collect-only", target, *chosen]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if found.returncode == _NOTHING_CHOSEN:
            continue
        if found.returncode or "test_the_default_does_not_spill" not in found.stdout:
            raise click.ClickException(f"{target} could not be collected (is {server} installed?):\n{found.stdout}")
        for name, gpu, dtype, direction in re.findall(pattern, found.stdout):
            yield (name, server, direction, dtype, arches.get(gpu, gpu)), f"lowered by `{maker}`"


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


def summary(record: Result) -> Iterator[str]:
    """What a run has shown, for whoever watches it: failures in full, the rest counted, times at the end."""
    for key, result in record["results"].items():
        if result["status"] == "failed":
            yield f"FAILED {key}: {result['error']}"
    rows = sorted(verified_rows(record))
    yield from (f"{' '.join(key)}: {state}" for key, state in rows)
    yield from measured_lines(record)


def measured_lines(record: Result) -> Iterator[str]:
    results = record["results"]
    others: dict[str, list[str]] = {}
    for key in results:
        if not key.startswith(("verify/", "bench/")):
            others.setdefault(key.partition("/")[0], []).append(key)
    for part, keys in others.items():
        passed = sum(results[key]["status"] == "passed" for key in keys)
        yield f"- {part}: {passed} of {len(keys)} passed"
        for key in keys:
            told = results[key].get("summary") or results[key].get("why") or results[key].get("error")
            if told:
                yield f"  - {key}: {results[key]['status']}: {told}"
    timed = {key: result for key, result in results.items() if key.startswith("bench/")}
    if timed:
        yield ""
        yield "| case | who | µs (spread) | TFLOP/s useful | TB/s of K and V rows by edge |"
        yield "|---|---|---|---|---|"
    for key, result in timed.items():
        _, case, who = key.split("/")
        if "us" in result:
            rates = f"{result['tflops']:.1f} | {result['edge_tb_s']:.2f}"
            yield f"| {case} | {who} | {result['us']:.0f} ({result['spread_us']:.0f}) | {rates} |"
        else:
            yield f"| {case} | {who} | {result['status']}: {result.get('why', result.get('error', ''))} | | |"
