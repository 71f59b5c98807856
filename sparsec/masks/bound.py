"""A mask with its lengths: what analysis, layout and kernels ask.

This file decides what a bound mask can answer and which questions it refuses. The answers are its normal form's; it
must not know how masks are combined.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError
from sparsec.expr import Expr
from sparsec.masks import derive
from sparsec.masks.arguments import is_int
from sparsec.masks.leaf import Axis, Key, Shape, identity
from sparsec.masks.ranges import IntArray, RowRanges
from sparsec.masks.tilemap import TileMap, TilePatterns

if TYPE_CHECKING:
    import scipy.sparse

    from sparsec.masks.mask import Mask

MAX_DENSE_ELEMENTS = 2**28


@dataclass(frozen=True, eq=False, repr=False)
class BoundMask:
    """A mask with its lengths: what analysis, layout and kernels ask."""

    mask: Mask
    shape: Shape

    @property
    def q_len(self) -> int:
        return self.shape[0]

    @property
    def kv_len(self) -> int:
        return self.shape[1]

    @property
    def n_heads(self) -> int | None:
        return self.mask.n_heads

    @property
    def n_batch(self) -> int | None:
        return self.mask.n_batch

    @property
    def varies_by_head(self) -> bool:
        return self.mask.varies_by_head

    @property
    def varies_by_batch(self) -> bool:
        return self.mask.varies_by_batch

    def select(self, batch: int = 0, head: int = 0) -> BoundMask:
        """The plain mask of one batch element and one query head.

        Raises:
            MaskError: There is no such head or batch element.
        """
        for name, index, count in (("head", head, self.n_heads), ("batch element", batch, self.n_batch)):
            if index < 0 or (count is not None and index >= count):
                raise MaskError(f"{self.mask} has no {name} {index}: it has {count}, counted from 0")
        return BoundMask(self.mask._select(batch, head), self.shape)

    @cached_property
    def nnz(self) -> int:
        """The number of edges, exact."""
        return int(self._body._nnz(self.shape))

    def degrees(self, axis: Axis) -> IntArray:
        """Keys of each query (`"q"`) or queries of each key (`"kv"`): int64."""
        if axis not in ("q", "kv"):
            raise MaskError(f'degrees({axis!r}): the axis is "q" or "kv"')
        degrees = self._body._degrees(self.shape, axis)
        # They tell the number of edges, which some masks could only find by reading all their rows again.
        self.__dict__.setdefault("nnz", int(degrees.sum()))
        return degrees

    def rows(self, start: int = 0, stop: int | None = None) -> RowRanges:
        """The keys of queries `start:stop`."""
        stop = self.q_len if stop is None else stop
        if not 0 <= start <= stop <= self.q_len:
            raise MaskError(f"rows({start}, {stop}) of a mask with q_len = {self.q_len}: give 0 ≤ start ≤ stop ≤ q_len")
        return self._body._rows(self.shape, start, stop)

    def tiles(self, block_q: int, block_kv: int, tile_rows: range | None = None) -> TileMap:
        """The non-empty tiles.

        Args:
            block_q: Queries a tile, a power of two.
            block_kv: Keys a tile, a power of two ≥ 8.
            tile_rows: Only these rows of tiles (a run with step 1); the others come out empty.
        """
        for name, block, least in (("block_q", block_q, 1), ("block_kv", block_kv, 8)):
            if block < least or block & (block - 1):
                raise MaskError(f"tiles: {name} = {block} must be a power of two ≥ {least}")
        n_q_tiles = -(-self.q_len // block_q)
        wanted = range(n_q_tiles) if tile_rows is None else tile_rows
        if wanted and (wanted.step != 1 or wanted[0] < 0 or wanted[-1] >= n_q_tiles):
            raise MaskError(f"tiles: tile_rows = {tile_rows} must be a run within range({n_q_tiles})")
        return self._body._tiles(self.shape, block_q, block_kv, wanted)

    def patterns(self, tile_map: TileMap) -> TilePatterns:
        """What the partial tiles of `tile_map` (one of this mask's) look like."""
        if tile_map.shape != self.shape:
            raise MaskError(f"patterns: the tile map has shape {tile_map.shape}, the mask {self.shape}")
        return self._body._patterns(self.shape, tile_map)

    @property
    def offsets(self) -> RowRanges | None:
        """The attended `kv - q` (one row) where edges depend on nothing else, within `(-q_len, kv_len)`."""
        return self._normal._offsets(self.shape)

    @property
    def predicate(self) -> Expr | None:
        """An expression in `q_idx`, `kv_idx` (`h`, `b`), true on the edges; None for explicit edges."""
        return self.mask._predicate(self.shape)

    @cached_property
    def digest(self) -> str:
        """Names what the mask means at these lengths: equal in every process."""
        return hashlib.sha256(repr((self._identity, self.shape)).encode()).hexdigest()

    @property
    def T(self) -> BoundMask:
        return BoundMask(self.mask.T, (self.kv_len, self.q_len))

    def __getitem__(self, item: object) -> BoundMask:
        """`bound[q0:q1, k0:k1]`: that part of the mask, renumbered from 0."""
        q, kv = slice_pair(item, self.shape, repr(self))
        return BoundMask(self.mask._slice(q, kv, self.shape), (q[1] - q[0], kv[1] - kv[0]))

    def to_csr(self) -> scipy.sparse.csr_array:
        """All edges as a SciPy CSR array of bool, columns sorted."""
        return self._body._to_csr(self.shape)

    def to_dense(self) -> npt.NDArray[np.bool_]:
        """bool `[q_len, kv_len]`, for small masks.

        Raises:
            MaskError: More than 2**28 elements.
        """
        if self.q_len * self.kv_len > MAX_DENSE_ELEMENTS:
            raise MaskError(
                f"to_dense of a {self.q_len} × {self.kv_len} mask: {self.q_len * self.kv_len:,} elements are more than "
                f"{MAX_DENSE_ELEMENTS:,}; take rows(), tiles() or to_csr(), or slice the mask first"
            )
        return derive.to_dense(self._body, self.shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BoundMask):
            return NotImplemented
        return self.shape == other.shape and self._identity == other._identity

    def __hash__(self) -> int:
        return hash((self._identity, self.shape))

    def __repr__(self) -> str:
        return f"{self.mask._postfixed(repr)}.bind({self.q_len}, {self.kv_len})"

    def __str__(self) -> str:
        return f"{self.mask._postfixed(str)}.bind({self.q_len}, {self.kv_len})"

    @cached_property
    def _identity(self) -> Key:
        if self.varies_by_head or self.varies_by_batch:
            return self.mask._canonical
        return identity(self._normal, self.shape)

    @cached_property
    def _body(self) -> Mask:
        """What answers everything: the normal form, made quick to read."""
        return self._normal._lean(self.shape)

    @cached_property
    def _normal(self) -> Mask:
        """The mask's normal form at these lengths."""
        if self.varies_by_head or self.varies_by_batch:
            axis = "head" if self.varies_by_head else "batch element"
            raise MaskError(f"{self} differs by {axis}; ask the mask of one of them: bound.select(batch, head)")
        return self.mask._normal(self.shape, False, False)


def slice_pair(item: object, lengths: tuple[int | None, int | None], text: str) -> tuple[Shape, Shape]:
    """The bounds of `[q0:q1, k0:k1]`, checked."""
    if not (isinstance(item, tuple) and len(item) == 2 and all(isinstance(part, slice) for part in item)):
        raise MaskError(f"{text}[{item!r}]: give two slices, mask[q0:q1, k0:k1]")
    q, kv = (
        _slice_bounds(part, length, name, text) for part, length, name in zip(item, lengths, ("q", "kv"), strict=True)
    )
    return q, kv


def _slice_bounds(part: slice, length: int | None, name: str, text: str) -> Shape:
    if part.step not in (None, 1):
        raise MaskError(f"{text}: the {name} slice has step {part.step}; only runs (step 1) can be sliced")
    start = 0 if part.start is None else part.start
    stop = length if part.stop is None else part.stop
    if stop is None:
        raise MaskError(
            f"{text}: the {name} slice has no stop and the mask no length yet; give the stop, or bind first"
        )
    if not is_int(start) or not is_int(stop):
        raise MaskError(f"{text}: the {name} slice {start!r}:{stop!r} must be of ints")
    if not 0 <= start < stop or (length is not None and stop > length):
        limit = "" if length is None else f" ≤ {length}"
        raise MaskError(f"{text}: the {name} slice {start}:{stop} must satisfy 0 ≤ start < stop{limit}")
    return int(start), int(stop)
