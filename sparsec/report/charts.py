"""The figures of the page's charts.

This file decides what is counted and over which rows. It must not know how it is drawn.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sparsec.masks import BoundMask, ranges
from sparsec.planner import Group, Plan
from sparsec.planner.ceiling import ceiling

Json = dict[str, Any]  # Any: JSON values have no common type

_MOST_POINTS: Final = 160
# Distances are counted over so many stretches of so many rows.
_STRETCHES, _STRETCH_ROWS = 64, 64
_CHUNK_ROWS: Final = 1024


def degrees(bound: BoundMask) -> Json:
    """For keys a query, and queries a key: the share of tokens with at least so many."""
    told = {}
    for name, axis in (("keys a query", "q"), ("queries a key", "kv")):
        ascending = np.sort(bound.degrees("q" if axis == "q" else "kv"))
        values, first = np.unique(ascending, return_index=True)
        share = 1.0 - first / len(ascending)
        kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), _MOST_POINTS)).astype(int))
        told[name] = {"x": values[kept].tolist(), "y": [float(f"{each:.5g}") for each in share[kept]]}
    return told


def locality(group: Group) -> Json:
    """The share of the edges by their distance from the diagonal, in powers of two.

    Of a long mask from rows evenly spread, and from heavy rows by themselves: there are few of them with many edges.
    """
    bound = group.bound
    counted: npt.NDArray[np.float64] = np.zeros(max(bound.shape).bit_length() + 1)
    if bound.q_len <= _STRETCHES * _STRETCH_ROWS:
        n_rows = bound.q_len
        counted += _distances(bound, np.arange(bound.q_len))
    else:
        firsts = np.unique(np.linspace(0, bound.q_len - _STRETCH_ROWS, _STRETCHES).astype(np.int64))
        heavy = np.array(group.profile.q.heavy, np.int64)
        sampled = np.setdiff1d((firsts[:, None] + np.arange(_STRETCH_ROWS)).ravel(), heavy)
        n_rows = len(sampled)
        counted += _distances(bound, sampled) * ((bound.q_len - group.profile.q.n_heavy) / max(n_rows, 1))
        if len(heavy):
            some = heavy[np.unique(np.linspace(0, len(heavy) - 1, min(len(heavy), _STRETCHES)).astype(np.int64))]
            counted += _distances(bound, some) * (group.profile.q.n_heavy / len(some))
    total = max(counted.sum(), 1.0)
    last = int(np.flatnonzero(counted).max(initial=0)) + 1
    labels = ["0", *(_power(i - 1) for i in range(1, last))]
    return {"x": labels, "y": (counted[:last] / total).tolist(), "rows": n_rows, "isAll": n_rows == bound.q_len}


def _distances(bound: BoundMask, wanted: ranges.IntArray) -> npt.NDArray[np.float64]:
    """Edges of some rows, ascending, by distance: 0, 1, up to 3, up to 7 and so on."""
    counted: npt.NDArray[np.float64] = np.zeros(max(bound.shape).bit_length() + 1)
    breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
    for stretch in np.split(wanted, breaks):
        for first in range(0, len(stretch), _CHUNK_ROWS):
            part = stretch[first : first + _CHUNK_ROWS]
            if not len(part):
                continue
            rows = bound.rows(int(part[0]), int(part[-1]) + 1)
            centre = np.repeat(part, np.diff(rows.indptr)) * bound.kv_len // bound.q_len
            before = np.zeros(len(rows.start), np.int64)
            for bucket in range(len(counted)):
                reach = (1 << bucket) - 1
                within = _keys_within(rows, centre - reach, centre + reach + 1)
                counted[bucket] += (within - before).sum()
                before = within
    return counted


def _power(exponent: int) -> str:
    """1, 2, 4 … 512, 1k … 1M."""
    for letter, shift in (("M", 20), ("k", 10)):
        if exponent >= shift:
            return f"{1 << (exponent - shift):,}{letter}"
    return str(1 << exponent)


def _keys_within(rows: ranges.RowRanges, low: ranges.IntArray, high: ranges.IntArray) -> ranges.IntArray:
    """Keys of each progression in `low … high - 1`."""
    first = -((rows.start - np.maximum(low, rows.start)) // rows.step)
    last = -((rows.start - np.minimum(high, rows.stop)) // rows.step)
    counted: ranges.IntArray = np.maximum(last - first, 0)
    return counted


def roofline(made: Plan, group: Group) -> Json:
    """The device's ceilings, and every candidate below them."""
    roof = ceiling(made)
    flops = group.estimate.flops
    tensor_bytes = made.problem.tensor_bytes
    points = [("this plan", tensor_bytes + group.layout_bytes, group.us)]
    points += [(str(each), tensor_bytes + each.layout_bytes, each.us) for each in group.alternatives]
    return {
        "flopsPerS": roof.flops_per_s,
        "vectorFlopsPerS": made.device.vector_flops,
        "bytesPerS": roof.bytes_per_s,
        "points": [{"name": name, "x": flops / n_bytes, "y": flops / us * 1e6} for name, n_bytes, us in points],
    }
