"""How well square tiles fit a translation-invariant mask, in closed form.

This file decides how edges in tiles are counted from offsets alone, ragged edges included; nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsec.masks import ranges
from sparsec.masks.ranges import IntArray, RowRanges

# Tile sizes whose fill is told.
FILL_BLOCKS = (16, 32, 64, 128)

# Above this many progressions the counts come from one running sum over all offsets instead of one formula each.
_FEW_PROGRESSIONS = 32


@dataclass(frozen=True, slots=True)
class TileFill:
    """Non-empty `block × block` tiles of a mask.

    Attributes:
        block: Tokens a side.
        n_tiles: Non-empty tiles.
        n_full: Tiles whose every pair inside the mask's shape is an edge.
        fill: Edges over the area of the non-empty tiles, 0 … 1: the share of useful work on matrix units.
    """

    block: int
    n_tiles: int
    n_full: int
    fill: float


def toeplitz_fill(shape: tuple[int, int], offsets: RowRanges, block: int) -> TileFill:
    """The tiles of the mask of `shape` whose edges are the pairs with `kv - q` among `offsets`."""
    q_len, kv_len = shape
    inner_q, inner_kv = q_len // block, kv_len // block
    corners = _Corners(shape, offsets)
    n_tiles = n_full = edges = 0

    def count(edges_of_tile: IntArray, area: int, times: IntArray | int) -> None:
        nonlocal n_tiles, n_full, edges
        n_tiles += int(((edges_of_tile > 0) * times).sum())
        n_full += int(((edges_of_tile == area) * times).sum())
        edges += int((edges_of_tile * times).sum())

    if inner_q and inner_kv:
        # All whole tiles on one diagonal of tiles are alike.
        diagonal = np.arange(1 - inner_q, inner_kv, dtype=np.int64)
        alike = np.minimum(inner_q, inner_kv - diagonal) - np.maximum(0, -diagonal)
        at_corner = corners(np.arange(-inner_q, inner_kv + 1, dtype=np.int64) * block)
        count(at_corner[2:] - 2 * at_corner[1:-1] + at_corner[:-2], block * block, alike)
    ragged_q, ragged_kv = q_len - inner_q * block, kv_len - inner_kv * block
    if ragged_q:
        edge = np.arange(inner_kv + 1, dtype=np.int64) * block
        bottom = corners(edge - inner_q * block) - corners(edge - q_len)
        count(np.diff(bottom), ragged_q * block, 1)
    if ragged_kv:
        edge = np.arange(inner_q + 1, dtype=np.int64) * block
        right = corners(kv_len - edge) - corners(inner_kv * block - edge)
        count(-np.diff(right), ragged_kv * block, 1)
    if ragged_q and ragged_kv:
        q, kv = np.array([inner_q * block, q_len]), np.array([inner_kv * block, kv_len])
        corner = corners((kv[:, None] - q[None, :]).ravel())
        count(corner[2:3] - corner[3:4] - corner[0:1] + corner[1:2], ragged_q * ragged_kv, 1)
    return TileFill(block, n_tiles, n_full, edges / max(n_tiles * block * block, 1))


class _Corners:
    """The sum of `max(0, t - d)` over the offsets `d`, for any `t`.

    The edges of a rectangle `q0:q1 × kv0:kv1` are `S(kv1 - q0) - S(kv1 - q1) - S(kv0 - q0) + S(kv0 - q1)`: for one
    offset each term counts the queries for which the diagonal has passed that corner.
    """

    def __init__(self, shape: tuple[int, int], offsets: RowRanges) -> None:
        self._offsets = offsets
        self._table: IntArray | None = None
        self._lowest = -shape[0]
        if len(offsets.start) > _FEW_PROGRESSIONS:
            table = np.zeros(shape[0] + shape[1] + 1, np.int64)
            for start, stop, step in zip(offsets.start, offsets.stop, offsets.step, strict=True):
                table[start + 1 - self._lowest : stop + 1 - self._lowest : step] += 1
            self._table = np.cumsum(np.cumsum(table))

    def __call__(self, t: IntArray) -> IntArray:
        if self._table is not None:
            table: IntArray = self._table[t - self._lowest]
            return table
        total = np.zeros(len(t), np.int64)
        offsets = self._offsets
        lengths = ranges.lengths(offsets)
        for start, step, length in zip(offsets.start, offsets.step, lengths, strict=True):
            passed = (-((start - t) // step)).clip(0, length)
            total += passed * (t - start) - step * (passed * (passed - 1) // 2)
        return total
