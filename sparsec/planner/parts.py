"""Masks taken apart: heads with masks of their own, heavy rows, the part of a union that residue classes make dense.

This file decides which heads and batch elements are planned together, when a mask has parts, and what they are; each
pair of parts is disjoint and together the mask. It must not know whether running them apart pays.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

import numpy as np
import numpy.typing as npt

from sparsec.analysis import MaskProfile
from sparsec.backends.base import Problem
from sparsec.layout import Ordering
from sparsec.masks import from_csr, full, ranges
from sparsec.masks.mask import BoundMask, Mask, Named, Or
from sparsec.masks.structured import Tokens

# Lanes of the narrowest block of queries: heavy rows alone in such a block waste the others.
_LANES = 16
# Rows apart must hold this share of all tile work to be worth a second launch.
_MIN_SHARE = 0.05
_MAX_HEAVY_EDGES = 1 << 27


def heavy_rows_apart(bound: BoundMask, profile: MaskProfile) -> tuple[BoundMask, BoundMask, Ordering] | None:
    """`(rest, heavy, order)` where packing the heavy rows together saves tile work.

    `rest` has every query, the heavy ones without keys; `heavy` has only those, in position space of `order`.
    """
    rows = np.array(profile.q.heavy, np.int64)
    if not len(rows) or len(rows) < profile.q.n_heavy:
        return None
    blocks_in_place = len(np.unique(rows // _LANES))
    blocks_saved = blocks_in_place - -(-len(rows) // _LANES)
    if blocks_saved * bound.kv_len < _MIN_SHARE * profile.fill(_LANES).n_tiles * _LANES:
        return None
    parts = rows_apart(bound, rows)
    return None if parts is None else (*parts, Ordering("heavy rows together", rows.astype(np.int32), None))


def rows_apart(bound: BoundMask, rows: npt.NDArray[np.int64]) -> tuple[BoundMask, BoundMask] | None:
    """`(rest, rows)`: every query, these without keys; and these alone. None where their edges are too many to list."""
    alone = _selected(bound, rows)
    if alone is None:
        return None
    one_row = ranges.from_csr(np.array([0, len(rows)]), rows)
    none = ranges.from_csr(np.array([0, 0]), rows[:0])
    return (bound.mask - Tokens(one_row, none, False, "")).bind(*bound.shape), alone


def _selected(bound: BoundMask, rows: npt.NDArray[np.int64]) -> BoundMask | None:
    """Only the queries `rows`; None where their edges are too many to list."""
    parts = [bound.rows(int(row), int(row) + 1) for row in rows]
    nnz = sum(part.nnz for part in parts)
    if nnz == len(rows) * bound.kv_len:
        return full().bind(len(rows), bound.kv_len)
    if nnz > _MAX_HEAVY_EDGES:
        return None
    chosen = ranges.concatenate(parts)
    indptr = np.concatenate(([0], np.cumsum([part.nnz for part in parts])))
    return from_csr(indptr, ranges.to_edges(chosen)[1], bound.kv_len).bind(len(rows), bound.kv_len)


def residue_part(bound: BoundMask) -> tuple[BoundMask, BoundMask, int] | None:
    """`(progressing, rest, period)` for a union one part of which attends only at multiples of a period > 1."""
    mask = bound.mask
    while isinstance(mask, Named):
        mask = mask.operand
    if not isinstance(mask, Or) or bound.offsets is not None:
        return None
    periods = [(operand, _period(operand, bound)) for operand in mask.operands]
    progressing = [(operand, period) for operand, period in periods if period > 1]
    if not progressing or len(progressing) == len(periods):
        return None
    period = progressing[0][1]
    chosen: list[Mask] = [operand for operand, each in progressing if each % period == 0]
    part = reduce(or_, chosen)
    return part.bind(*bound.shape), (mask - part).bind(*bound.shape), period


def _period(mask: Mask, bound: BoundMask) -> int:
    """The greatest common divisor of a translation-invariant mask's offsets; 1 for any other mask."""
    offsets = mask.bind(*bound.shape).offsets
    if offsets is None or not len(offsets.start):
        return 1
    several = offsets.stop - offsets.start > 1
    return int(np.gcd.reduce(np.concatenate((offsets.start, offsets.step[several]))))


def distinct_masks(bound: BoundMask, problem: Problem) -> list[tuple[BoundMask, tuple[int, ...], tuple[int, ...]]]:
    """`(mask, heads, batch elements)` for as few launches as the masks allow."""
    heads, batch = tuple(range(problem.q_heads)), tuple(range(problem.batch))
    if not bound.varies_by_head and not bound.varies_by_batch:
        return [(bound, heads, batch)]
    masks: dict[str, BoundMask] = {}
    heads_of: dict[tuple[int, str], list[int]] = {}
    for b in batch if bound.varies_by_batch else batch[:1]:
        for h in heads if bound.varies_by_head else heads[:1]:
            chosen = bound.select(b, h)
            masks.setdefault(chosen.digest, chosen)
            heads_of.setdefault((b, chosen.digest), []).append(h)
    batch_of: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for (b, digest), members in heads_of.items():
        batch_of.setdefault((digest, tuple(members)), []).append(b)
    return [
        (
            masks[digest],
            members if bound.varies_by_head else heads,
            tuple(elements) if bound.varies_by_batch else batch,
        )
        for (digest, members), elements in batch_of.items()
    ]
