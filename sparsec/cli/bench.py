"""`sparsec bench`: a plan's candidates and the other ways to compute the same, timed here and now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

import click

from sparsec.cli.arguments import read_mask
from sparsec.cli.console import bar, out, show, waiting
from sparsec.cli.planning import Asked, count, planning_options

if TYPE_CHECKING:
    import torch

    from sparsec.backends.base import Problem
    from sparsec.cli.bench_peers import Contestant
    from sparsec.cli.demo_cases import Tensors
    from sparsec.cli.demo_measure import Error, Oracle, Timing
    from sparsec.device import Device
    from sparsec.planner import Plan

_MEMORY_SHARE: Final = 0.25
# Of what `--json` prints: `sparsec/report/BENCH.md`.
_SCHEMA: Final = 1
_EXAMPLES: Final = """\b
Examples:
  sparsec bench 'window(255, 0) | global_tokens(16)' --seq-len 16384 --heads 8
  sparsec bench graph.npz --heads 8 --dtype bf16 --json
"""


@dataclass(frozen=True, slots=True)
class _Line:
    """One contestant and how it did; `reason` says why it was not run."""

    name: str
    is_ours: bool
    is_other_mask: bool
    estimate_us: float | None
    timing: Timing | None
    error: Error | None
    ready_s: float
    reason: str = ""


@click.command(short_help="A mask timed here, beside what else there is.", epilog=_EXAMPLES)
@click.argument("mask")
@planning_options
@count("--rounds", "How often each has its turn; 5 by default.", 100)
@click.option("--no-peers", is_flag=True, help="Time only sparsec's own candidates.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
@click.pass_context
def bench(context: click.Context, /, mask: str, **options: Any) -> None:  # Any: click's options
    """Times MASK on this machine: the plan, its rivals, and torch's ways to compute the same.

    Every answer is checked against an fp64 reference in the same run; estimates stand beside what was measured.
    """
    asked = Asked(**{field.name: options[field.name] for field in fields(Asked)})
    _check(asked)
    bound = asked.bound(read_mask(mask))
    _check_size(asked.problem(bound), asked.device)
    with waiting("planning"):
        made = asked.plan(bound)
    lines = _measured(made, asked, options["rounds"] or 5, with_peers=not options["no_peers"])
    if options["is_json"]:
        from sparsec.report import json_text

        click.echo(json_text(_document(made, lines)))
    else:
        _show(made, lines)
    if not all(line.error.is_exact for line in lines if line.is_ours and line.error is not None):
        click.echo("Error: an answer of sparsec is not exact; see the table above", err=True)
        context.exit(1)


def _check(asked: Asked) -> None:
    if len(asked.devices) > 1 or asked.device.name != "cpu":
        names = "several devices" if len(asked.devices) > 1 else asked.device.name
        raise click.UsageError(
            f"bench times what is here, and was asked for {names}: `sparsec explain --device NAME` says what to expect"
        )
    if asked.needs_grad:
        raise click.UsageError("bench times the forward pass; leave out --needs-grad")


def _check_size(problem: Problem, device: Device) -> None:
    from sparsec.planner.words import size

    # Tensors, expanded for peers, and an output each.
    wanted, held = 3 * problem.tensor_bytes, device.memory_bytes
    if wanted > 0.8 * held:
        raise click.UsageError(
            f"the tensors would take {size(wanted)} and this machine has {size(held)}: ask for fewer tokens or heads"
        )


def _measured(made: Plan, asked: Asked, rounds: int, *, with_peers: bool) -> list[_Line]:
    import torch

    from sparsec.cli.bench_peers import contestants, tensors
    from sparsec.cli.demo_measure import timings

    given = tensors(made.problem)
    found = contestants(made, asked, given, int(made.device.memory_bytes * _MEMORY_SHARE), with_peers=with_peers)
    lines: dict[str, _Line] = {}
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    first: dict[str, float] = {}
    oracles: dict[str, Oracle] = {}
    with bar() as progress, torch.no_grad():
        task = progress.add_task("benchmark", total=len(found) * (2 + rounds))

        def advance() -> None:
            progress.advance(task)

        for each in found:
            progress.update(task, description=each.name)
            lines[each.name] = _tried(each, given, oracles, runs, first)
            advance()
        progress.update(task, description="timing, in turn")
        times = timings(runs, first, rounds, advance)
    return [replace(line, timing=times.get(name)) for name, line in lines.items()]


def _tried(
    each: Contestant, given: Tensors, oracles: dict[str, Any], runs: dict[str, Any], first: dict[str, float]
) -> _Line:
    """Makes a contestant ready, runs it once and checks its answer; what refuses says why."""
    from sparsec.cli.bench_peers import RefusedError
    from sparsec.cli.demo_measure import Oracle, first_run
    from sparsec.errors import SparsecError

    started = time.perf_counter()
    is_other_mask = each.bound.digest != each.asked_digest
    try:
        run = each.prepare()
        answer, seconds = first_run(run)
    except (RefusedError, SparsecError) as refusal:
        reason = str(refusal).splitlines()[0]
        return _Line(each.name, each.is_ours, is_other_mask, each.estimate_us, None, None, 0.0, reason)
    ready_s = time.perf_counter() - started
    # The first run may compile; the second is as all later ones.
    first[each.name] = first_run(run)[1] if seconds < 3.0 else seconds
    runs[each.name] = run
    oracle = oracles.get(each.bound.digest)
    if oracle is None:
        oracle = oracles[each.bound.digest] = Oracle(given, each.bound, each.dtype, 0)
        oracle.prepare(lambda: None)
    return _Line(each.name, each.is_ours, is_other_mask, each.estimate_us, None, oracle.compare(answer), ready_s)


def _show(made: Plan, lines: list[_Line]) -> None:
    from sparsec.planner.words import duration, rate
    from sparsec.report import Column, table

    console = out()
    ours = lines[0].timing
    show(console, f"{made.mask.mask}, {made.problem.q_len:,} × {made.problem.kv_len:,} tokens, {made.problem.dtype}")
    columns = [
        Column("what"),
        Column("estimate", "right"),
        Column("measured", "right"),
        Column("spread", "right"),
        Column("takes", "right"),
        Column("error", "right"),
    ]
    rows = []
    for line in lines:
        if line.timing is None or line.error is None or ours is None:
            continue
        star = " *" if line.is_other_mask else ""
        rows.append(
            [
                line.name + star,
                "–" if line.estimate_us is None else duration(line.estimate_us),
                duration(line.timing.median * 1e6),
                f"{line.timing.spread:.0%}",
                f"{line.timing.median / ours.median:.2f}×",
                f"{line.error.largest:.1e}" + ("" if line.error.is_exact else " WRONG"),
            ]
        )
    show(console, table(columns, rows, console))
    if any(line.is_other_mask for line in lines):
        show(console, "* all pairs: another result, for comparison")
    for line in lines:
        if line.reason:
            show(console, f"{line.name}: not run, {line.reason}")
    if ours is not None:
        useful = rate(made.estimate.flops / ours.median * 1e-9)
        show(console, f"the plan: {useful} of useful work; {_paid_back(made, lines)}")


def _paid_back(made: Plan, lines: list[_Line]) -> str:
    """After how many calls planning and compiling have been earned back."""
    from sparsec.planner.words import duration

    text = f"planned in {duration(made.planning_us)}, ready in {duration(lines[0].ready_s * 1e6)}"
    calls = _break_even(made, lines)
    if calls is None:
        return text
    name, number = calls
    return f"{text}: paid back after {number:,} {'call' if number == 1 else 'calls'} beside {name}"


def _break_even(made: Plan, lines: list[_Line]) -> tuple[str, int] | None:
    """The quickest peer that computes this mask exactly, and the number of calls; None where we save nothing."""
    peers = [
        line
        for line in lines
        if not line.is_ours and not line.is_other_mask and line.timing and line.error and line.error.is_exact
    ]
    ours = lines[0].timing
    best = min(peers, key=lambda line: line.timing.median if line.timing else 0.0, default=None)
    if ours is None or best is None or best.timing is None or best.timing.median <= ours.median:
        return None
    spent_s = made.planning_us * 1e-6 + lines[0].ready_s - best.ready_s
    return best.name, max(1, -int(-spent_s // (best.timing.median - ours.median)))


def _document(made: Plan, lines: list[_Line]) -> dict[str, Any]:  # Any: JSON values
    calls = _break_even(made, lines)
    return {
        "schema": _SCHEMA,
        "plan": made.to_dict(),
        "contestants": [
            {
                "name": line.name,
                "is_ours": line.is_ours,
                "is_other_mask": line.is_other_mask,
                "estimate_us": line.estimate_us,
                "timings_us": [] if line.timing is None else [round(s * 1e6, 2) for s in line.timing.seconds],
                "error": None if line.error is None else line.error.largest,
                "allowed_error": None if line.error is None else line.error.allowed,
                "ready_us": round(line.ready_s * 1e6, 1),
                "reason": line.reason,
            }
            for line in lines
        ],
        "break_even": None if calls is None else {"peer": calls[0], "calls": calls[1]},
    }
