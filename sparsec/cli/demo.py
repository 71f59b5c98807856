"""`sparsec demo`: published masks and a real graph, planned, run, checked, and timed beside what else there is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from sparsec.cli.console import bar, out, show, write

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.text import Text

    from sparsec.backends.base import Dtype
    from sparsec.cli.demo_cases import Case
    from sparsec.cli.demo_measure import Error, Timing
    from sparsec.planner import Plan

_OURS: Final = "sparsec"
_LENGTHS: Final = (4096, 16_384)
_ROUNDS: Final = 3
_QUICK_ROUNDS: Final = 2
# Share of the machine's memory that a peer may take.
_MEMORY_SHARE: Final = 0.25
# Queries up to which the masks are drawn, and every row of every head is checked.
_SMALL: Final = 4096


@dataclass(frozen=True, slots=True)
class _Line:
    """One way to compute a case: what it took, how exact it was; or why it was not run."""

    name: str
    short_name: str
    timing: Timing | None
    error: Error | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Result:
    """A case in one dtype, our own line first."""

    case: Case
    dtype: Dtype
    plan: Plan
    compile_s: float
    lines: tuple[_Line, ...]

    @property
    def is_exact(self) -> bool:
        error = self.lines[0].error
        return error is not None and error.is_exact


@click.command(short_help="Published masks and a graph: planned, checked, timed.")
@click.option(
    "--quick", is_flag=True, help="Only 4,096 tokens and the graph, fewer runs, and only sampled rows checked."
)
@click.pass_context
def demo(context: click.Context, quick: bool) -> None:
    """Runs BigBird's and Longformer's masks and a graph of packages, and shows what it took.

    Each is planned, checked against an fp64 reference, and timed beside torch's own attention; the graph also beside
    gather/scatter and torch.sparse. Two to three minutes on two cores; --quick, half a minute.
    """
    from sparsec.cli.demo_cases import cases

    console = out()
    _introduce(console)
    chosen = cases(_LENGTHS[:1] if quick else _LENGTHS)
    n_runs = sum(len(case.dtypes) for case in chosen)
    results: list[_Result] = []
    for case in chosen:
        _introduce_case(console, case)
        previous: Plan | None = None
        for dtype in case.dtypes:
            with bar() as progress:
                watched = _Watched(progress, f"{len(results) + 1} of {n_runs}: {case.title}, {dtype}")
                result = _measured(case, dtype, watched, is_quick=quick)
            write(_plan_words(result, previous))
            _show_result(console, result)
            previous = result.plan
            results.append(result)
    _show_summary(console, results)
    if not all(result.is_exact for result in results):
        click.echo("Error: sparsec's answer is not exact; see the tables above", err=True)
        context.exit(1)


class _Watched:
    """A task of a progress bar."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title
        self._task: TaskID = progress.add_task(title, total=None)

    def expect(self, steps: int) -> None:
        self._progress.update(self._task, total=steps)

    def say(self, what: str) -> None:
        self._progress.update(self._task, description=f"{self._title}: {what}")

    def advance(self) -> None:
        self._progress.advance(self._task)


def _introduce(console: Console) -> None:
    import torch

    from sparsec.device import detect_cpu

    device = detect_cpu()
    show(console, f"{device.label}, {device.isa}, {torch.get_num_threads()} threads, torch {torch.__version__}.")
    show(console, "Kernels are compiled here at their first use, and kept: a second demo starts at once.")


def _introduce_case(console: Console, case: Case) -> None:
    from sparsec.report import picture

    show(console, "")
    console.rule(f"[bold]{case.title}, {case.seq_len:,} tokens", align="left")
    show(console, f"{case.about}\n")
    if case.seq_len <= _SMALL:
        drawn = picture(case.mask.bind(case.seq_len), 64)
        show(console, f"{drawn}\n")


def _measured(case: Case, dtype: Dtype, watched: _Watched, *, is_quick: bool) -> _Result:
    import torch

    import sparsec
    from sparsec.cli.demo_cases import HEAD_DIM, Absent, Peer, peers, tensors
    from sparsec.cli.demo_measure import Oracle, first_run, timings
    from sparsec.device import detect_cpu

    given = tensors(case, dtype)
    watched.say("compiling")
    bound = case.mask.bind(case.seq_len)
    started = time.perf_counter()
    attention = sparsec.compile(bound, q_heads=case.heads, head_dim=HEAD_DIM, dtype=dtype, device="cpu")
    compile_s = time.perf_counter() - started

    found = list(peers(case, bound, dtype, given, int(detect_cpu().memory_bytes * _MEMORY_SHARE)))
    present = [peer for peer in found if not isinstance(peer, Absent)]
    is_whole = case.seq_len <= _SMALL and dtype == case.dtypes[0] and not is_quick
    whole_heads = case.heads if is_whole else 0
    rounds = _QUICK_ROUNDS if is_quick else _ROUNDS
    oracles = {
        bound.digest: Oracle(given, bound, dtype, whole_heads),
        **{peer.bound.digest: Oracle(given, peer.bound, dtype, 0) for peer in present if peer.bound != bound},
    }
    watched.expect(len(oracles) * case.heads + (1 + rounds) * (1 + len(present)))
    watched.say("the fp64 reference")
    for oracle in oracles.values():
        oracle.prepare(watched.advance)

    runs: dict[str, Callable[[], Any]] = {}
    errors: dict[str, Error] = {}
    first: dict[str, float] = {}

    def run_ours() -> torch.Tensor:
        answer = attention(*given)
        assert isinstance(answer, torch.Tensor), "a log-sum-exp was not asked for"
        return answer

    ours = Peer(_OURS, _OURS, lambda: run_ours, bound)
    with torch.no_grad():
        for one in (ours, *present):
            watched.say(one.short_name)
            runs[one.name] = one.prepare()
            answer, first[one.name] = first_run(runs[one.name])
            errors[one.name] = oracles[one.bound.digest].compare(answer)
            watched.advance()
        watched.say("timing, in turn")
        times = timings(runs, first, rounds, watched.advance)
    lines = []
    for peer in (ours, *found):
        if isinstance(peer, Absent):
            lines.append(_Line(peer.name, peer.short_name, None, None, peer.reason))
        else:
            lines.append(_Line(peer.name, peer.short_name, times[peer.name], errors[peer.name]))
    return _Result(case, dtype, attention.plan, compile_s, tuple(lines))


def _plan_words(result: _Result, previous: Plan | None) -> str:
    """The plan; in a later dtype that runs the same launches, only that."""
    from sparsec.planner.words import duration

    launches = [(step.launch.template.name, step.launch.config) for step in result.plan.steps]
    if previous is None or launches != [(step.launch.template.name, step.launch.config) for step in previous.steps]:
        return str(result.plan)
    return f"{result.dtype}: the same launches, estimated {duration(result.plan.estimate.us)}"


def _show_result(console: Console, result: _Result) -> None:
    from sparsec.planner.words import duration
    from sparsec.report import Column, table

    columns = [
        Column(f"{result.case.title}, {result.case.seq_len:,}, {result.dtype}"),
        Column("median", "right"),
        Column("spread", "right"),
        Column("takes", "right"),
        Column("error", "right"),
    ]
    ours = result.lines[0].timing
    assert ours is not None, "our own run is always timed"
    rows: list[list[str | Text]] = []
    absent = []
    for line in result.lines:
        if line.timing is None or line.error is None:
            absent.append(f"{line.name}: not run, {line.reason}")
            continue
        rows.append(
            [
                line.name,
                duration(line.timing.median * 1e6),
                f"{line.timing.spread:.0%}",
                f"{line.timing.median / ours.median:.2f}×",
                _error_words(line.error),
            ]
        )
    show(console, table(columns, rows, console))
    for text in absent:
        show(console, text)
    error = result.lines[0].error
    assert error is not None, "our own answer is always checked"
    useful = result.plan.problem.flops(result.plan.mask.nnz) / ours.median * 1e-9
    show(
        console,
        f"{len(ours.seconds)} runs of sparsec, {useful:,.0f} GFLOP/s of useful work; {error.rows:,} rows checked, "
        f"errors up to {error.allowed:.1e} allowed; ready in {duration(result.compile_s * 1e6)}",
    )


def _error_words(error: Error) -> Text:
    from rich.text import Text

    if error.is_exact:
        return Text(f"{error.largest:.1e}", "green")
    return Text(f"{error.largest:.1e} WRONG", "bold red")


def _show_summary(console: Console, results: list[_Result]) -> None:
    from sparsec.planner.words import duration
    from sparsec.report import Column, table

    show(console, "")
    console.rule("[bold]in short", align="left")
    rows = []
    for result in results:
        ours = result.lines[0].timing
        assert ours is not None, "our own run is always timed"
        for line in result.lines[1:]:
            if line.timing is not None:
                title = f"{result.case.title}, {result.case.seq_len:,}, {result.dtype}"
                rows.append(
                    (title, duration(ours.median * 1e6), f"{line.timing.median / ours.median:.1f}×", line.short_name)
                )
    columns = [Column("case"), Column("sparsec", "right"), Column("takes", "right"), Column("the other")]
    show(console, table(columns, rows, console))
    words = (
        "Times are medians of runs taken in turn; the spread is slowest less fastest, over the median. Errors are the "
        "largest differences from fp64 attention; allowed is what rounding explains in that dtype."
    )
    show(console, words)
