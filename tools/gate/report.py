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
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
from bench.goals import Outcome, outcomes
from bench.grid import Grid, find_grid, load_grid
from bench.results import DEVICE_PROTOCOL, SCHEMA, CaseRow, Provenance, Run, decode
from bench.tables import attention_table, figure_table, limits_text, notes_of

from gate.checks import hard_cases
from gate.record import commit, sources_digest
from gate.timing import GRIDS
from sparsec import data
from sparsec.device import Device

ROOT = Path(__file__).resolve().parents[2]

# What pytest exits with where it has found no test of that mark.
_NOTHING_CHOSEN = 5

Result = dict[str, Any]  # one JSON object of a record
# The record says where and with what; the goals need not know.
NOWHERE = Provenance("", "", False, "", "", "", "", 0, 0, "")


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
    lines += ["", *aimed_lines(records)]
    for record in records:
        lines += ["", f"## {record['label']} ({record['device']})", ""]
        lines += [f"Commit {commit_of(record)}, {record['toolchain']}.", ""]
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


def commit_of(record: Result) -> str:
    """The commit of a record; where it was made without the history, that of the same sources here."""
    return commit() if record["sources"] == sources_digest() and commit() else record["commit"]


def aimed_lines(records: list[Result]) -> Iterator[str]:
    """Every figure that is aimed at on a GPU, and what was measured on each device."""
    yield "## Figures"
    yield ""
    yield "Each is measured by `tools/gpu_gate.py run` with a case of the grids `" + "`, `".join(GRIDS) + "`"
    yield "(`tools/bench/grids/`), every result of it checked; a peer that is not installed has no figure."
    yield ""
    names = [record["label"] for record in records]
    yield "| aim | figure | " + " | ".join(names or ["any GPU"]) + " |"
    yield "|---|---|" + "---|" * max(1, len(names))
    for grid in map(load_grid, map(find_grid, GRIDS)):
        reached = [dict(_values(grid, record)) for record in records]
        for goal in grid.goals:
            cells = [outcome_text(each.get(goal.what)) for each in reached] or [NOT_RUN]
            yield f"| {goal.what} | {limits_text(goal)} | {' | '.join(cells)} |"
    yield ""
    yield "The choice of the planner without records, against the best of what was measured (`tools/eval_cost.py`):"
    yield "; ".join(f"{record['label']}: {_choice(record)}" for record in records) or NOT_RUN
    yield ""
    yield from ("What needs no GPU:", "")
    for path in sorted((ROOT / "benchmarks" / "results" / "scripts").glob("compile-*.json")):
        found = json.loads(path.read_text())
        for aim in found["aims"]:
            limit, value = aim["form"].format(aim["at_most"]), aim["form"].format(aim["value"])
            met = "met" if aim["is_met"] else "missed"
            yield f"- {found['compiler']}, {aim['what']} {value}, ≤ {limit}: {met} (`tools/bench_compile.py`)."


NOT_RUN = "not run"


def _choice(record: Result) -> str:
    found = record["results"].get("tune/choice", {}).get("choice")
    if not found:
        return NOT_RUN
    return "; ".join(f"{aim['what']} {aim['value']:.1%}" for aim in found["aims"] if aim["value"] is not None)


def _values(grid: Grid, record: Result) -> Iterator[tuple[str, Outcome]]:
    rows = [row for key, row in timed_rows(record) if key.split("/")[1] == grid.name]
    run = Run(SCHEMA, grid.name, grid.about, grid.digest, grid.plot, grid.x, DEVICE_PROTOCOL, NOWHERE, 0, (), (), ())
    # A goal of several cases counts once all of them were measured.
    for goal in grid.goals:
        wanted = {case.id for case in grid.cases if any(fnmatchcase(case.id, pattern) for pattern in goal.cases)}
        mine = tuple(row for row in rows if row.case.id in wanted)
        if wanted == {row.case.id for row in mine}:
            for outcome in outcomes(replace(run, goals=(goal,), cases=mine)):
                yield goal.what, outcome


def outcome_text(outcome: Outcome | None) -> str:
    if outcome is None or outcome.value is None:
        return NOT_RUN
    return f"{outcome.value:.4g}, " + ("met" if outcome.is_met else f"missed by {outcome.missed_by:.0%}")


def timed_rows(record: Result) -> Iterator[tuple[str, CaseRow]]:
    """The cases of a record that were measured, with their keys."""
    for key, result in record["results"].items():
        if "row" in result:
            yield key, decode(CaseRow, result["row"], key)


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
    yield from (f"- {name}: nothing was run: {why}" for name, why in record.get("absent", {}).items())
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
    for key, result in results.items():
        if key.startswith("bench/") and "row" not in result:
            yield f"- {key}: {result['status']}: {result.get('error', result.get('why', ''))}"
    for grid in GRIDS:
        rows = [row for key, row in timed_rows(record) if key.split("/")[1] == grid]
        calls = [row for row in rows if row.case.measure == "attention"]
        if calls:
            yield from ("", f"### {load_grid(find_grid(grid)).about}", "", attention_table(calls))
            yield from (line for notes in notes_of(calls) for line in ("", notes))
        figures = [row for row in rows if row.case.measure != "attention"]
        if figures:
            yield from ("", figure_table(figures))
