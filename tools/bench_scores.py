"""What score modifiers cost: a window with and without them, interleaved, forward alone and with the backward pass.

    python tools/bench_scores.py [--tokens 16384] [--json FILE]

This file decides which modifiers are compared; it must not know how they are computed. Outputs and gradients of q, k
and v are held to dense attention in fp64 on sampled rows; with sinks, which are a key of zeros that all attend, the
output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from bench.exactness import Verdict, check, worse
from bench.gradients import GradientCheck
from bench.grid import Case, Effort, MaskSource
from bench.protocol import interleaved
from bench.sheet import Figure, made, measured, timed, write_sheet
from bench.workload import Workload, make_workload

import sparsec
from sparsec import masks, score
from sparsec.score import as_score_mod

HEADS, HEAD_DIM, REACH = 4, 64, 255
PROTOCOL = (
    "monotonic clock, two calls of each not counted, then all in turn; median and quartiles; block_sparse for all; "
    "rows (the fullest, the emptiest, the ends, random ones) of the first and last head are compared with dense "
    "attention in fp64, gradients likewise, under twice the error of a plain attention of the same dtype plus one "
    "rounding unit"
)


def modifiers(trains: bool) -> dict[str, score.ScoreMod | None]:
    """By name; where gradients are measured, the captured tensors receive some."""
    torch.manual_seed(1)
    slopes = torch.tensor([2.0 ** -(h + 1) for h in range(HEADS)], requires_grad=trains)
    table = torch.randn(HEADS, 2 * REACH + 1, requires_grad=trains)
    return {
        "plain": None,
        "soft-cap": score.soft_cap(30.0),
        "ALiBi": score.alibi(slopes),
        "relative bias": score.relative_bias(table),
        "sinks": score.sinks(torch.zeros(HEADS, requires_grad=trains)),
    }


def figures(dtype: Any, direction: Any, tokens: int, effort: Effort) -> list[Figure]:
    """Every modifier, by turns."""
    source = MaskSource("text", f"window({REACH}, {REACH})")
    case = Case("scores", "attention", source, tokens, HEADS, head_dim=HEAD_DIM, dtype=dtype, direction=direction)
    work = make_workload(case)
    calls: dict[str, Callable[[], Any]] = {}
    verdicts = {}
    for name, modifier in modifiers(work.needs_grad).items():
        attention = sparsec.compile(work.bound, score_mod=modifier, template="block_sparse")
        wanted = [work.q, work.k, work.v, *(() if modifier is None else (t.original for t in modifier.arguments))]

        def call(attention: sparsec.Attention = attention, wanted: list[torch.Tensor] = wanted) -> Any:
            out = attention(work.q, work.k, work.v)
            return (out, *torch.autograd.grad(out, wanted, work.d_out)) if work.needs_grad else (out,)

        calls[name] = call
        verdicts[name] = _verdict(work, modifier, call())
    timings = interleaved(calls, effort, lambda *_: None)
    shape = {"mask": source.text, "tokens": tokens, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": dtype}
    shape["direction"] = direction.replace("_", " + ")
    found = []
    for name, timing in timings.items():
        note = "checked: the output" if name == "sinks" and work.needs_grad else ""
        figure = timed(name, timing, shape, "" if name == "plain" else "plain", note)
        found.append(replace(figure, error=verdicts[name].error, allowed=verdicts[name].allowed))
    return found


def _verdict(work: Workload, modifier: score.ScoreMod | None, returned: tuple[torch.Tensor, ...]) -> Verdict:
    out, *gradients = (tensor.detach() for tensor in returned)
    if modifier is not None and modifier.sinks is not None:
        # A sink of 0 is one more key and value of zeros, attended by every query.
        zeros = work.k.new_zeros(*work.k.shape[:2], 1, HEAD_DIM)
        n = work.bound.kv_len
        bound = (masks.window(REACH, REACH) - ~masks.prefix(n) | ~masks.prefix(n)).bind(n, n + 1)
        problem = replace(work.problem, kv_len=n + 1)
        k, v = (torch.cat((tensor.detach(), zeros), 2) for tensor in (work.k, work.v))
        return check(Workload(work.case, bound, problem, work.q.detach(), k, v), out, bound)
    modified = replace(work, score=None if modifier is None else as_score_mod(modifier))
    verdicts = [check(modified, out, work.bound)]
    if gradients:
        verdicts.append(GradientCheck(modified)(tuple(gradients[:3]), work.bound))
    return worse(verdicts)


@click.command()
@click.option("--tokens", type=click.IntRange(min=2 * REACH), default=16_384, show_default=True)
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Of calls, for each.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also writes the results here.")
def main(tokens: int, seconds: float, path: Path | None) -> None:
    """Times score modifiers."""
    found = []
    for dtype in ("fp32", "bf16"):
        for direction in ("forward", "forward_backward"):
            for figure in figures(dtype, direction, tokens, Effort(seconds, min_repeats=5, max_repeats=21)):
                found.append(figure)
                click.echo(f"{dtype} {direction:17} {figure.what:14} {measured(figure)}, exact: {figure.is_exact}")
    if path is not None:
        about = f"Score modifiers on window({REACH}, {REACH}), on a CPU"
        write_sheet(path, made("scores", about, PROTOCOL, torch.get_num_threads(), found))


if __name__ == "__main__":
    main()
