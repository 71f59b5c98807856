"""A Triton kernel that reads rows picked by number and adds them up: what fetching alone takes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_rows(rows, picked, sums, n, DIM: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Each program adds up `BLOCK · STEPS` of the picked rows `[n_rows, DIM]`, and writes one row of fp32 sums."""
    lanes, columns = tl.arange(0, BLOCK), tl.arange(0, DIM)
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK, DIM), tl.float32)
    for step in range(STEPS):
        place = (program * STEPS + step) * BLOCK + lanes
        is_there = place < n
        row = tl.load(picked + place, mask=is_there, other=0).to(tl.int64)
        values = tl.load(rows + row[:, None] * DIM + columns[None, :], mask=is_there[:, None], other=0.0)
        total += values.to(tl.float32)
    tl.store(sums + program * DIM + columns, tl.sum(total, 0))
