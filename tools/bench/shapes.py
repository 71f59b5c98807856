"""Masks as other packages name them: a band, documents one after the other, whole blocks, slices.

This file decides when a mask is exactly one of those; where it is not, a package that knows nothing else cannot be
asked for it. It must not know any package's arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from sparsec import masks

if TYPE_CHECKING:
    from sparsec.masks import BoundMask
    from sparsec.masks.tilemap import TileMap

# Largest first: fewer blocks, and those are what kernels like.
_BLOCKS: Final = (128, 64, 32, 16)

Kind = Literal["full", "causal", "inverse", "both"]


@dataclass(frozen=True, slots=True)
class Band:
    """Each query attends from `left` keys before its own to `right` after it; None where that side has no end."""

    left: int | None
    right: int | None

    @property
    def is_full(self) -> bool:
        return self.left is None and self.right is None


@dataclass(frozen=True, slots=True)
class Slice:
    """Queries `q_start:q_stop` with keys `kv_start:kv_stop`.

    Attributes:
        kind: `full`: all of them. `causal`: up to the diagonal that ends in the last corner. `inverse`: from the
            diagonal that begins in the first corner on. `both`: between those two.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    kind: Kind


def band(bound: BoundMask) -> Band | None:
    """The band that a mask is; None where it is none, or where it matters at which corner a package begins."""
    if bound.varies_by_head or bound.varies_by_batch:
        return None
    offsets = bound.offsets
    if offsets is None or len(offsets.start) != 1 or offsets.step[0] != 1:
        return None
    first, last = int(offsets.start[0]), int(offsets.stop[0]) - 1
    left = -first if first > 1 - bound.q_len else None
    right = last if last < bound.kv_len - 1 else None
    # Packages disagree on what it means that a query does not attend its own key, if they allow it.
    if (left is not None and left < 0) or (right is not None and right < 0):
        return None
    found = Band(left, right)
    return found if found.is_full or bound.q_len == bound.kv_len else None


@dataclass(frozen=True, slots=True)
class Documents:
    """Sequences one after the other, each of which attends itself: all of it, or what came before."""

    lengths: tuple[int, ...]
    is_causal: bool


def documents(bound: BoundMask) -> Documents | None:
    if bound.varies_by_head or bound.varies_by_batch or bound.q_len != bound.kv_len:
        return None
    lengths = []
    by_key = bound.T
    start = 0
    while start < bound.q_len:
        # Who attends the first key of a document: all of it, causal or not.
        queries = by_key.rows(start, start + 1)
        if len(queries.start) != 1 or queries.start[0] != start:
            return None
        lengths.append(int(queries.stop[0]) - start)
        start += lengths[-1]
    whole = masks.documents(lengths)
    for mask, is_causal in ((whole, False), (whole & masks.causal(), True)):
        if _are_equal(bound, mask.bind(*bound.shape)):
            return Documents(tuple(lengths), is_causal)
    return None


def _are_equal(bound: BoundMask, other: BoundMask) -> bool:
    """Whether two masks have the same edges, however they were written."""
    if bound == other:
        return True
    if bound.nnz != other.nnz:
        return False
    ours, theirs = ((each.indptr, each.start, each.stop, each.step) for each in (bound.rows(), other.rows()))
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def whole_blocks(bound: BoundMask) -> TileMap | None:
    """The largest square blocks that a mask consists of; None where there are none, or its lengths are no multiples."""
    if bound.varies_by_head or bound.varies_by_batch:
        return None
    for block in _BLOCKS:
        if bound.q_len % block or bound.kv_len % block:
            continue
        tiles = bound.tiles(block, block)
        if tiles.is_full.all():
            return tiles
    return None


def slices(bound: BoundMask) -> list[Slice] | None:
    """Slices that hold each edge once; None where the mask is no band, no documents and no whole blocks."""
    found = band(bound)
    if found is not None:
        return _band_slices(found, bound.q_len, bound.kv_len)
    packed = documents(bound)
    if packed is not None:
        kind: Kind = "causal" if packed.is_causal else "full"
        ends = np.cumsum(packed.lengths).tolist()
        starts = [0, *ends[:-1]]
        return [Slice(start, end, start, end, kind) for start, end in zip(starts, ends, strict=True)]
    tiles = whole_blocks(bound)
    return None if tiles is None else list(_block_slices(tiles))


def _band_slices(found: Band, q_len: int, kv_len: int) -> list[Slice] | None:
    left, right = found.left, found.right
    if left is None and right is None:
        return [Slice(0, q_len, 0, kv_len, "full")]
    length = q_len
    if left is None:
        assert right is not None
        pieces = [Slice(0, length - right, 0, length, "causal"), Slice(length - right, length, 0, length, "full")]
    elif right is None:
        pieces = [Slice(0, left, 0, length, "full"), Slice(left, length, 0, length, "inverse")]
    elif left + right > length:
        # Some queries are cut at both ends, and no slice of one kind says so.
        return None
    else:
        pieces = [
            Slice(0, left, 0, left + right, "causal"),
            Slice(left, length - right, 0, length, "both"),
            Slice(length - right, length, length - right - left, length, "inverse"),
        ]
    return [each for each in pieces if each.q_stop > each.q_start]


def _block_slices(tiles: TileMap) -> Iterator[Slice]:
    """Neighbouring blocks of a row as one slice."""
    block = tiles.block_q
    for row in range(len(tiles.indptr) - 1):
        columns = tiles.indices[tiles.indptr[row] : tiles.indptr[row + 1]].astype(np.int64)
        if not len(columns):
            continue
        for run in np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1):
            yield Slice(row * block, (row + 1) * block, int(run[0]) * block, (int(run[-1]) + 1) * block, "full")
