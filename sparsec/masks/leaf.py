"""The leaf protocol: what a mask must state about itself, and what follows when it states no more.

This file decides which questions masks are asked, and the default answers, which are derived from rows (`derive.py`).
It must not know any leaf, nor how masks are combined (`mask.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError
from sparsec.expr import Expr
from sparsec.masks import derive
from sparsec.masks.ranges import IntArray, RowRanges
from sparsec.masks.tilemap import Grid, TileBits, TileMap, TilePatterns

if TYPE_CHECKING:
    import scipy.sparse

    from sparsec.masks.mask import Mask

Shape = tuple[int, int]
Axis = Literal["q", "kv"]
# Nested tuples of names, numbers and array hashes: comparable, hashable, the same in every process.
Key = tuple[Any, ...]


class Leaf:
    """The questions a mask answers about itself; `_rows` is the one it must answer.

    `shape` is always `(q_len, kv_len)` and has passed `_check`. Users meet `Mask`, below which every leaf is.
    """

    # What a leaf may state about itself.
    n_heads: int | None = None
    n_batch: int | None = None
    varies_by_head: bool = False
    varies_by_batch: bool = False
    _depends_on_lengths: bool = False

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        """The keys of queries `start:stop`."""
        raise NotImplementedError

    def _fixed_lengths(self) -> tuple[int | None, int | None]:
        """The lengths this mask knows by itself, None where it takes any."""
        return None, None

    def _check(self, shape: Shape) -> None:
        """Raises MaskError when the mask cannot have this shape; fixed lengths are checked already."""

    def _row_weight(self, shape: Shape) -> float:
        """About how many ranges a row has: sizes the chunks in which rows are visited."""
        return 4.0

    def _nnz(self, shape: Shape) -> int:
        return derive.nnz(self, shape)

    def _nnz_bound(self, shape: Shape) -> int:
        """At most this many edges: cheap, orders the operands of an intersection."""
        return self._nnz(shape)

    def _degrees(self, shape: Shape, axis: Axis) -> IntArray:
        return derive.degrees(self, shape, axis)

    def _union_degrees(self, other: Mask, shape: Shape, axis: Axis) -> IntArray | None:
        """The degrees of the union with another mask, where they are had without its rows."""
        return None

    def _tiles(self, shape: Shape, block_q: int, block_kv: int, tile_rows: range) -> TileMap:
        return derive.tiles(self, Grid(shape, block_q, block_kv), tile_rows)

    def _counts_at(self, grid: Grid, keys: IntArray) -> IntArray:
        """Edges in each tile `keys = tile_row * grid.n_kv_tiles + tile_column` (ascending)."""
        return derive.counts_at(self, grid, keys)

    def _bits_at(self, grid: Grid, keys: IntArray) -> TileBits:
        """The contents of the tiles `keys` (ascending)."""
        return derive.bits_at(self, grid, keys)

    def _to_csr(self, shape: Shape) -> scipy.sparse.csr_array:
        return derive.to_csr(self, shape)

    def _patterns(self, shape: Shape, tile_map: TileMap) -> TilePatterns:
        return derive.patterns(self, tile_map)

    def _offsets(self, shape: Shape) -> RowRanges | None:
        """The attended `kv - q` as one row, for a mask that depends on nothing else."""
        return None

    def _predicate(self, shape: Shape) -> Expr | None:
        """An expression in `q_idx` and `kv_idx` that is true on the edges."""
        return None

    def _transpose(self, shape: Shape | None) -> Mask | None:
        """The mask with queries and keys swapped, `shape` being this mask's; None: through its edges."""
        return None

    def _complement(self, shape: Shape | None) -> Mask | None:
        """The mask of all other pairs when it is again such a leaf."""
        return None

    def _merge(self, other: Mask, op: Literal["and", "or"], shape: Shape | None) -> Mask | None:
        """One leaf that means `self op other`, when there is one."""
        return None

    def _sliced(self, shape: Shape, q: tuple[int, int], kv: tuple[int, int]) -> Mask | None:
        """One leaf that means this mask (of `shape`) restricted to the given queries and keys, renumbered from 0."""
        return None

    def _constant(self, shape: Shape | None) -> bool | None:
        """True for the full mask, False for the empty one, None for any other or where it is dear to know."""
        return None

    def _normal(self, shape: Shape | None, negated: bool, transposed: bool) -> Mask:
        """The normal form of this mask, of its complement or of its transpose.

        With a shape (that of the result) the lengths are put in; without one they stay symbols.
        """
        raise NotImplementedError

    def _key(self) -> Key:
        """What the leaf means, as nested tuples. Only called on normal forms."""
        return self._fields_key

    @cached_property
    def _fields_key(self) -> Key:
        return (type(self).__name__, *(_key_of(getattr(self, f.name)) for f in fields(self)))  # type: ignore[arg-type]

    def _text(self, show: Callable[[object], str]) -> str:
        """Python text of this mask; `show` is `repr` (evaluates back) or `str` (may shorten arrays)."""
        raise NotImplementedError

    def _postfixed(self, show: Callable[[object], str]) -> str:
        """The text, in parentheses where `.T` or `[...]` would not bind to all of it."""
        return show(self)


def identity(normal: Leaf, shape: Shape | None) -> Key:
    """What a normal form means; equal for all full masks, and for all empty ones."""
    constant = normal._constant(shape)
    return normal._key() if constant is None else ("constant", constant)


def call_text(show: Callable[[object], str], name: str, *arguments: object, **options: object) -> str:
    """`name(arguments)`; with `show=str` long arrays are cut short."""
    shown = [_argument_text(show, argument) for argument in arguments]
    shown += [f"{key}={_argument_text(show, value)}" for key, value in options.items()]
    return f"{name}({', '.join(shown)})"


def _argument_text(show: Callable[[object], str], argument: object) -> str:
    if isinstance(argument, Leaf):
        return show(argument)
    if not isinstance(argument, np.ndarray):
        return repr(argument)
    if show is str and argument.size > 8:
        ends = (argument[:3].tolist(), argument[-1:].tolist())
        return f"[{str(ends[0])[1:-1]}, …, {str(ends[1])[1:-1]}]"
    return repr(argument.tolist())


def digest_array(array: npt.NDArray[Any]) -> str:
    """A hash of an array's contents, type and shape."""
    content = np.ascontiguousarray(array)
    head = f"{content.dtype.str}{content.shape}".encode()
    return hashlib.sha256(head + content.tobytes()).hexdigest()


def _key_of(value: object) -> object:
    if isinstance(value, Leaf):
        return value._key()
    if isinstance(value, np.ndarray):
        return digest_array(value)
    if isinstance(value, RowRanges):
        return tuple(digest_array(part) for part in (value.indptr, value.start, value.stop, value.step))
    return value


def common(what: str, counts: Iterable[int | None], mask: Leaf) -> int | None:
    """The one number of `what` that all who state it agree on, or None."""
    known = sorted({count for count in counts if count is not None})
    if len(known) > 1:
        raise MaskError(
            f"{mask} joins masks with {known[0]} and {known[1]} {what}; all of them must have the same number"
        )
    return known[0] if known else None
