"""Whether what the records say is ever slower than the default: both run in turns, mask by mask.

    python tools/eval_tuned.py                                   # the grids cpu_forward and cpu_backward
    python tools/eval_tuned.py cpu_forward --only window --seconds 5 --json FILE

Of each mask two attentions are compiled, one by the cost model alone (`tune="off"`) and one by the records
(`tune="cached"`). Where both plans would run the same launches there is nothing to measure, and the gain is 1.
Otherwise both results are checked against dense attention in fp64, and against each other as a whole; then they take
turns. The gain is the default's median over the tuned one's; its spread, the quartiles of the rounds' own ratios.
Gradients are part of a call where the grid has them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import click
import torch
from bench.grid import Case, GridError, find_grid, load_grid
from bench.protocol import timed_ns
from bench.script import Aim, budget_option, finish, in_time, json_option
from bench.workload import bound_mask, problem

import sparsec
from sparsec.backends.base import Problem
from sparsec.cli.console import out, show, waiting
from sparsec.device import detect_cpu
from sparsec.errors import SparsecError
from sparsec.masks import BoundMask
from sparsec.planner import Plan
from sparsec.report import Column, table
from sparsec.tuning.exactness import Inputs, Oracle, Result, make_inputs
from sparsec.tuning.space import Task

LEAST_GAIN = 0.98
_LEAST_ROUNDS = 7


@dataclass(frozen=True)
class Compared:
    """One mask, by the default and by the records.

    Attributes:
        case: Its name in the grid.
        default: What runs without records.
        tuned: What runs by them.
        source: Where the tuned configuration comes from.
        gain: The default's median over the tuned one's; 1 where both are the same.
        q25: A quarter of the rounds had a smaller gain; None where nothing was measured.
        q75: A quarter had a larger one.
        default_us: Median; None where nothing was measured.
        tuned_us: Likewise.
        rounds: How often each ran.
    """

    case: str
    default: str
    tuned: str
    source: str
    gain: float = 1.0
    q25: float | None = None
    q75: float | None = None
    default_us: float | None = None
    tuned_us: float | None = None
    rounds: int = 0


def compared(case: Case, seconds: float, most_rounds: int) -> Compared:
    """One case, checked and measured.

    Raises:
        SparsecError: It cannot be compiled, or one of the two is wrong.
    """
    bound = bound_mask(case)
    shape = replace(problem(case, bound), needs_grad=case.direction != "forward")
    default, tuned = (_compiled(bound, shape, tune) for tune in ("off", "cached"))
    words = _words(default.plan), _words(tuned.plan)
    row = Compared(case.id, *words, tuned.plan.config_source)
    if words[0] == words[1]:
        return row
    calls = _checked(bound, shape, {"default": default, "tuned": tuned})
    times = _in_turns(calls, seconds, most_rounds)
    ratios = [before / after for before, after in zip(times["default"], times["tuned"], strict=True)]
    q25, _, q75 = statistics.quantiles(ratios, n=4, method="inclusive")
    before, after = (statistics.median(times[name]) for name in ("default", "tuned"))
    return replace(row, gain=before / after, q25=q25, q75=q75, default_us=before, tuned_us=after, rounds=len(ratios))


def _compiled(bound: BoundMask, shape: Problem, tune: str) -> sparsec.Attention:
    return sparsec.compile(
        bound.mask,
        (shape.q_len, shape.kv_len),
        q_heads=shape.q_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        needs_grad=shape.needs_grad,
        tune=tune,
    )


def _words(made: Plan) -> str:
    """Every launch of a plan, forward and backward."""
    launches = [step.launch for group in made.groups for step in group.steps]
    if made.problem.needs_grad:
        launches += [launch for group in made.groups for launch in group.backward_launches]
    return "; ".join(
        f"{launch.template.name} ({launch.config})"
        + (f", {launch.work.ordering.name}" if launch.work.ordering.nbytes else "")
        for launch in launches
    )


def _checked(
    bound: BoundMask, shape: Problem, attentions: dict[str, sparsec.Attention]
) -> dict[str, Callable[[], object]]:
    """A call for each, found exact.

    Raises:
        SparsecError: One is not.
    """
    task = Task(bound, shape, detect_cpu(), direction="backward" if shape.needs_grad else "forward")
    given = make_inputs(task, "cpu")
    oracle = Oracle(task, given)
    calls = {}
    for name, attention in attentions.items():
        calls[name] = _call(attention, given, is_timed=True)
        error = oracle.error(Result(_call(attention, given, is_timed=False)()))
        if error is not None:
            raise SparsecError(f"the {name} ({attention.plan.config_source}) is wrong: {error}")
    return calls


def _call(attention: sparsec.Attention, given: Inputs, *, is_timed: bool) -> Callable[[], dict[str, torch.Tensor]]:
    """A call as a user makes it; the log-sum-exp is asked for where it is checked."""
    d_out, d_lse = given.d_out, given.d_lse
    if d_out is None:
        if is_timed:
            return lambda: {"out": attention(given.q, given.k, given.v)}
        return lambda: dict(zip(("out", "lse"), attention(given.q, given.k, given.v, return_lse=True), strict=True))
    leaves = [each.clone().requires_grad_() for each in (given.q, given.k, given.v)]

    def both() -> dict[str, torch.Tensor]:
        out, lse = attention(*leaves, return_lse=True)
        return dict(zip(("dq", "dk", "dv"), torch.autograd.grad((out, lse), leaves, (d_out, d_lse)), strict=True))

    return both


def _in_turns(calls: dict[str, Callable[[], object]], seconds: float, most_rounds: int) -> dict[str, list[float]]:
    """Microseconds of each round; every round begins with the other one."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, spent_us = list(calls), 0.0
    for number in range(most_rounds):
        if number >= _LEAST_ROUNDS and spent_us > seconds * 1e6:
            break
        for name in names if number % 2 else reversed(names):
            times[name].append(timed_ns(calls[name]) / 1e3)
            spent_us += times[name][-1]
    return times


def _cases(grids: tuple[str, ...], only: tuple[str, ...]) -> Iterator[Case]:
    for name in grids:
        for case in load_grid(find_grid(name)).cases:
            if case.measure == "attention" and (not only or any(fnmatchcase(case.id, f"*{each}*") for each in only)):
                yield case


@click.command(help=__doc__)
@click.argument("grids", nargs=-1)
@click.option("--only", multiple=True, metavar="PATTERN", help="Only cases whose name has this in it.")
@click.option("--seconds", default=2.0, show_default=True, help="Of calls of the two together, for each mask.")
@click.option("--rounds", type=click.IntRange(_LEAST_ROUNDS), default=41, show_default=True, help="At most.")
@budget_option
@json_option
def main(
    grids: tuple[str, ...], only: tuple[str, ...], seconds: float, rounds: int, budget: float, path: Path | None
) -> None:
    found: list[Compared] = []
    left_out: list[Case] = []
    try:
        cases = list(_cases(grids or ("cpu_forward", "cpu_backward"), only))
        with waiting("comparing"):
            for case in in_time(cases, budget, left_out):
                found.append(compared(case, seconds, rounds))
                click.echo(f"{case.id}: {found[-1].gain:.3f}×", err=True)
    except (GridError, SparsecError) as error:
        raise click.ClickException(str(error)) from error
    if not found:
        raise click.ClickException("no case of these grids is attention that was asked for")
    _show(found)
    gains = [each.gain for each in found]
    mean = math.exp(sum(map(math.log, gains)) / len(gains))
    n_other = sum(bool(each.rounds) for each in found)
    click.echo(f"{n_other} of {len(found)} masks run something else than the default; mean gain {mean:.3f}×")
    aims = [Aim("tuned over default, the worst mask:", min(gains), at_least=LEAST_GAIN, form="{:.3f}×")]
    for case in left_out:
        click.echo(f"left out, as there was no time: {case.id}")
    results = {"mean_gain": mean, "best_gain": max(gains), "cases": [asdict(each) for each in found]}
    finish(aims, results | {"left_out": [case.id for case in left_out]}, path)


def _show(found: list[Compared]) -> None:
    columns = [Column("mask"), *(Column(name, "right") for name in ("default", "tuned", "gain", "half of the rounds"))]
    columns += [Column("tuned to"), Column("by")]
    rows = [
        (
            each.case,
            "" if each.default_us is None else f"{each.default_us / 1e3:.2f} ms",
            "" if each.tuned_us is None else f"{each.tuned_us / 1e3:.2f} ms",
            f"{each.gain:.3f}×",
            "" if each.q25 is None or each.q75 is None else f"{each.q25:.3f} to {each.q75:.3f}",
            each.tuned if each.rounds else "the default",
            each.source,
        )
        for each in found
    ]
    console = out()
    show(console, table(columns, rows, console))


if __name__ == "__main__":
    main()
