"""What score modifiers cost: a window with and without them, interleaved, forward alone and with the backward pass.

    python tools/bench_scores.py [--tokens 16384] [--repeats 21] [--json FILE]

Every kernel has passed its check against the reference before it is timed. This file decides which modifiers are
compared; it must not know how they are computed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from bench.provenance import provenance

import sparsec
from sparsec import masks, score
from sparsec.device import detect_cpu

HEADS, HEAD_DIM, REACH = 4, 64, 255
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Timed = dict[tuple[str, str, str], float]


def modifiers(trains: bool) -> dict[str, score.ScoreMod | None]:
    """By name; where gradients are measured, the captured tensors receive some."""
    slopes = torch.tensor([2.0 ** -(h + 1) for h in range(HEADS)], requires_grad=trains)
    table = torch.randn(HEADS, 2 * REACH + 1, requires_grad=trains)
    return {
        "plain": None,
        "soft-cap": score.soft_cap(30.0),
        "ALiBi": score.alibi(slopes),
        "relative bias": score.relative_bias(table),
        "sinks": score.sinks(torch.zeros(HEADS, requires_grad=trains)),
    }


def calls(dtype: str, tokens: int, trains: bool) -> dict[str, Callable[[], object]]:
    """A call for each modifier, warmed up."""
    leaves = [torch.randn(1, HEADS, tokens, HEAD_DIM).to(DTYPES[dtype]).requires_grad_(trains) for _ in range(3)]
    above = torch.randn(1, HEADS, tokens, HEAD_DIM).to(DTYPES[dtype])
    made: dict[str, Callable[[], object]] = {}
    for name, modifier in modifiers(trains).items():
        attention = sparsec.compile(masks.window(REACH, REACH), tokens, score_mod=modifier, template="block_sparse")
        wanted = [*leaves, *(() if modifier is None else (t.original for t in modifier.arguments))]

        def both(attention: sparsec.Attention = attention, wanted: list[torch.Tensor] = wanted) -> object:
            return torch.autograd.grad(attention(*leaves), wanted, above)

        def forward(attention: sparsec.Attention = attention) -> object:
            return attention(*leaves)

        made[name] = both if trains else forward
        made[name]()
    return made


def measure(tokens: int, repeats: int) -> Timed:
    """Median milliseconds by dtype, direction and modifier; the modifiers take turns."""
    found: Timed = {}
    for dtype in DTYPES:
        for direction in ("forward", "forward + backward"):
            turns = calls(dtype, tokens, trains=direction != "forward")
            taken: dict[str, list[float]] = {name: [] for name in turns}
            for _ in range(repeats):
                for name, call in turns.items():
                    started = time.perf_counter()
                    call()
                    taken[name].append((time.perf_counter() - started) * 1e3)
            found.update({(dtype, direction, name): statistics.median(times) for name, times in taken.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.tokens, options.repeats)
    print(
        f"{detect_cpu().name}, {torch.get_num_threads()} threads, window({REACH}, {REACH}), {options.tokens:,} tokens\n"
    )
    print("| dtype | direction | modifier | ms | × plain |\n| --- | --- | --- | ---: | ---: |")
    for (dtype, direction, name), ms in found.items():
        print(f"| {dtype} | {direction} | {name} | {ms:.2f} | {ms / found[dtype, direction, 'plain']:.2f} |")
    if options.json:
        figures = {" / ".join(key): ms for key, ms in found.items()}
        options.json.write_text(json.dumps({"provenance": asdict(provenance()), "ms": figures}, indent=1))


if __name__ == "__main__":
    main()
