"""Masks as immutable expressions.

This file decides how masks are combined: the operators, the nodes they build, and the normal form that equality, hash
and digest speak about. It must not know any particular leaf: those are one file each beside it, and fulfil the protocol
of `leaf.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import and_, or_
from typing import Literal

import numpy as np

from sparsec.errors import MaskError
from sparsec.expr import Expr, Var
from sparsec.masks import derive, ranges
from sparsec.masks.arguments import checked_int
from sparsec.masks.bound import BoundMask, slice_pair
from sparsec.masks.leaf import Axis, Key, Leaf, Shape, call_text, common, digest_array, identity
from sparsec.masks.ranges import IntArray, RowRanges
from sparsec.masks.tilemap import Grid, TileBits, TileMap

__all__ = [
    "And",
    "Axis",
    "BoundMask",
    "Key",
    "Mask",
    "Named",
    "Not",
    "Or",
    "Shape",
    "Slice",
    "Transpose",
    "call_text",
    "common",
    "complement_of",
    "digest_array",
    "transpose_of",
]

# A mask, whether its complement is meant, and whether its transpose is.
Term = tuple["Mask", bool, bool]


class Mask(Leaf):
    """Which query attends which key, before the lengths are known.

    A leaf is a frozen dataclass below this class; `_rows` is its one obligation, everything else has a default that is
    derived from it. Methods with a leading underscore are the leaf protocol. `shape` is always `(q_len, kv_len)` and
    has passed `_check`.
    """

    def _lean(self, shape: Shape) -> Mask:
        """A normal form that means the same and is quicker to read."""
        operands = self._operands()
        return self._with_operands(tuple(operand._lean(shape) for operand in operands)) if operands else self

    def _operands(self) -> tuple[Mask, ...]:
        return ()

    def _with_operands(self, operands: tuple[Mask, ...]) -> Mask:
        return self

    def _select(self, batch: int, head: int) -> Mask:
        """The mask of one batch element and one query head."""
        operands = self._operands()
        return self._with_operands(tuple(operand._select(batch, head) for operand in operands)) if operands else self

    def _normal(self, shape: Shape | None, negated: bool, transposed: bool) -> Mask:
        """The normal form: flat, sorted `And` and `Or` over leaves, their transposes and their complements.

        With a shape (that of the result) the lengths are put in; without one they stay symbols.
        """
        leaf: Mask = self
        if transposed:
            leaf = transpose_of(self, _swapped(shape))
        if negated:
            leaf = complement_of(leaf, shape)
        return leaf

    def _terms(self, kind: type[_Junction], negated: bool, transposed: bool) -> Iterator[Term]:
        """The operands of this mask seen as a `kind` of others; itself where it is none."""
        yield self, negated, transposed

    def bind(self, q_len: int | None = None, kv_len: int | None = None) -> BoundMask:
        """This mask with its lengths fixed.

        Args:
            q_len: Number of queries; may be left out where the mask knows it.
            kv_len: Number of keys; `q_len`, or what the mask knows, when left out.

        Raises:
            MaskError: The lengths do not fit the mask.
        """
        return BoundMask(self, self._bound_shape(q_len, kv_len))

    def __and__(self, other: object) -> Mask:
        return And((self, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: object) -> Mask:
        return Or((self, other)) if isinstance(other, Mask) else NotImplemented

    def __sub__(self, other: object) -> Mask:
        return And((self, Not(other))) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Not(self)

    @property
    def T(self) -> Mask:
        return Transpose(self)

    def __getitem__(self, item: object) -> Mask:
        """`mask[q0:q1, k0:k1]`: a part of the mask, renumbered from 0.

        Raises:
            MaskError: A step other than 1, an open end where no length is known, or a mask whose edges depend on the
                lengths (bind it first).
        """
        fixed = self._fixed_lengths()
        if self._depends_on_lengths and None in fixed:
            raise MaskError(
                f"cannot slice {self}: its edges depend on the lengths, which are not known yet; "
                "bind it first: mask.bind(q_len, kv_len)[q0:q1, k0:k1]"
            )
        q, kv = slice_pair(item, fixed, str(self))
        return self._slice(q, kv, (fixed[0] or q[1], fixed[1] or kv[1]))

    def _slice(self, q: tuple[int, int], kv: tuple[int, int], within: Shape) -> Mask:
        return Slice(self, q, kv, within)

    def __eq__(self, other: object) -> bool:
        return self._canonical == other._canonical if isinstance(other, Mask) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._canonical)

    def __bool__(self) -> bool:
        raise MaskError(
            f"the mask {self} has no truth value: combine masks with & | ~ and -, not with `and`, `or` and `not`"
        )

    def __repr__(self) -> str:
        return self._text(repr)

    def __str__(self) -> str:
        return self._text(str)

    @cached_property
    def _canonical(self) -> Key:
        heads, batch = self.n_heads, self.n_batch
        if heads is None and batch is None:
            try:
                lengths: Key = self._fixed_lengths()
            except MaskError:
                lengths = ("disagree",)
            return (*lengths, *identity(self._normal(None, False, False), None))
        members = [self._select(b, h)._canonical for b in range(batch or 1) for h in range(heads or 1)]
        if all(member == members[0] for member in members):
            members = members[:1]
        return ("varying", batch, heads, *members)

    def _bound_shape(self, q_len: int | None, kv_len: int | None) -> Shape:
        known_q, known_kv = self._fixed_lengths()
        q_len = known_q if q_len is None else checked_int(q_len, "bind", "q_len")
        if kv_len is None:
            kv_len = known_kv if known_kv is not None else q_len
        kv_len = None if kv_len is None else checked_int(kv_len, "bind", "kv_len")
        if q_len is None or kv_len is None:
            raise MaskError(f"{self} does not know its length: give one, as seq_len or by mask.bind(q_len, kv_len)")
        for name, known, given in (("q_len", known_q, q_len), ("kv_len", known_kv, kv_len)):
            if known is not None and known != given:
                raise MaskError(
                    f"{self} has {name} = {known} and cannot be bound to {name} = {given}; "
                    f"bind it to {known}, or slice the mask"
                )
        self._check((q_len, kv_len))
        return q_len, kv_len


@dataclass(frozen=True, eq=False, repr=False)
class _Junction(Mask):
    """What `And` and `Or` share."""

    operands: tuple[Mask, ...]

    def _operands(self) -> tuple[Mask, ...]:
        return self.operands

    def _with_operands(self, operands: tuple[Mask, ...]) -> Mask:
        return type(self)(operands)

    @property
    def n_heads(self) -> int | None:  # type: ignore[override]
        return common("heads", (m.n_heads for m in self.operands), self)

    @property
    def n_batch(self) -> int | None:  # type: ignore[override]
        return common("batch elements", (m.n_batch for m in self.operands), self)

    @property
    def varies_by_head(self) -> bool:  # type: ignore[override]
        return any(m.varies_by_head for m in self.operands)

    @property
    def varies_by_batch(self) -> bool:  # type: ignore[override]
        return any(m.varies_by_batch for m in self.operands)

    @property
    def _depends_on_lengths(self) -> bool:  # type: ignore[override]
        return any(m._depends_on_lengths for m in self.operands)

    def _fixed_lengths(self) -> tuple[int | None, int | None]:
        pairs = [m._fixed_lengths() for m in self.operands]
        return (
            common("queries", (pair[0] for pair in pairs), self),
            common("keys", (pair[1] for pair in pairs), self),
        )

    def _check(self, shape: Shape) -> None:
        for operand in self.operands:
            operand._check(shape)

    def _row_weight(self, shape: Shape) -> float:
        return sum(operand._row_weight(shape) for operand in self.operands)

    def _normal(self, shape: Shape | None, negated: bool, transposed: bool) -> Mask:
        kind = self._kind(negated)
        flat: list[Mask] = []
        for term, term_negated, term_transposed in self._terms(kind, negated, transposed):
            normal = term._normal(shape, term_negated, term_transposed)
            flat.extend(normal.operands if isinstance(normal, kind) else (normal,))
        return _joined(kind, flat, shape)

    def _terms(self, kind: type[_Junction], negated: bool, transposed: bool) -> Iterator[Term]:
        if self._kind(negated) is not kind:
            yield self, negated, transposed
            return
        for operand in self.operands:
            yield from operand._terms(kind, negated, transposed)

    def _postfixed(self, show: Callable[[object], str]) -> str:
        return f"({show(self)})"

    def _kind(self, negated: bool) -> type[_Junction]:
        """`And` or `Or`, as De Morgan has it."""
        return And if isinstance(self, And) is not negated else Or

    def _key(self) -> Key:
        return (type(self).__name__, *(operand._key() for operand in self.operands))


def _joined(kind: type[_Junction], operands: Iterable[Mask], shape: Shape | None) -> Mask:
    """`kind` over normal operands: without repeats, merged where two are one leaf, absorbed, sorted."""
    op: Literal["and", "or"] = "and" if kind is And else "or"
    kept = list(_by_key(operands).values())
    # Leaves of one class first, so that what merges with what does not hang on the order they were written in.
    for same_class in (True, False):
        waiting, kept = kept, []
        for operand in waiting:
            for i, other in enumerate(kept):
                if same_class and type(other) is not type(operand):
                    continue
                if (merged := _merged(other, operand, op, shape)) is not None:
                    kept[i] = merged
                    break
            else:
                kept.append(operand)
    absorbing = kind is Or
    for operand in kept:
        if operand._constant(shape) is absorbing:
            return operand
    survivors = [operand for operand in kept if operand._constant(shape) is None]
    if not survivors:
        return kept[0]
    survivors = list(_by_key(survivors).values())
    return survivors[0] if len(survivors) == 1 else kind(tuple(survivors))


def _by_key(masks: Iterable[Mask]) -> dict[Key, Mask]:
    """The masks sorted by what they mean, without repeats."""
    found = {mask._key(): mask for mask in masks}
    return dict(sorted(found.items(), key=lambda item: repr(item[0])))


def _merged(a: Mask, b: Mask, op: Literal["and", "or"], shape: Shape | None) -> Mask | None:
    found = a._merge(b, op, shape)
    return b._merge(a, op, shape) if found is None else found


@dataclass(frozen=True, eq=False, repr=False)
class And(_Junction):
    """Pairs in every operand."""

    def _text(self, show: Callable[[object], str]) -> str:
        return " & ".join(f"({show(m)})" if isinstance(m, Or) else show(m) for m in self.operands)

    def _parts(self) -> tuple[list[Mask], list[Mask]]:
        """Operands that are kept to, and those whose complement is."""
        wanted = [m for m in self.operands if not isinstance(m, Not)]
        unwanted = [m.operand for m in self.operands if isinstance(m, Not)]
        return wanted, unwanted

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        wanted, unwanted = self._parts()
        if not wanted:
            return ranges.complement(_union_rows(unwanted, shape, start, stop), shape[1])
        rows = reduce(ranges.intersect, (m._rows(shape, start, stop) for m in wanted))
        return ranges.difference(rows, _union_rows(unwanted, shape, start, stop)) if unwanted else rows

    def _nnz_bound(self, shape: Shape) -> int:
        return min(m._nnz_bound(shape) for m in self.operands)

    def _tiles(self, shape: Shape, block_q: int, block_kv: int, tile_rows: range) -> TileMap:
        return derive.and_tiles(self, Grid(shape, block_q, block_kv), tile_rows, *self._parts())

    def _counts_at(self, grid: Grid, keys: IntArray) -> IntArray:
        return derive.and_counts_at(self, grid, keys, *self._parts())

    def _bits_at(self, grid: Grid, keys: IntArray) -> TileBits:
        return derive.combined_bits_at(self.operands, grid, keys, np.bitwise_and)

    def _predicate(self, shape: Shape) -> Expr | None:
        parts = [p for m in self.operands if (p := m._predicate(shape)) is not None]
        return reduce(and_, parts) if len(parts) == len(self.operands) else None


@dataclass(frozen=True, eq=False, repr=False)
class Or(_Junction):
    """Pairs in any operand."""

    def _text(self, show: Callable[[object], str]) -> str:
        return " | ".join(show(m) for m in self.operands)

    @cached_property
    def _complemented(self) -> Mask | None:
        """What is left out, where an operand is a complement (the rows are then long, and what is left out short)."""
        if not any(isinstance(m, Not) for m in self.operands):
            return None
        return And(tuple(m.operand if isinstance(m, Not) else Not(m) for m in self.operands))

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        if self._complemented is not None:
            return ranges.complement(self._complemented._rows(shape, start, stop), shape[1])
        return _union_rows(self.operands, shape, start, stop)

    def _nnz_bound(self, shape: Shape) -> int:
        return min(shape[0] * shape[1], sum(m._nnz_bound(shape) for m in self.operands))

    def _degrees(self, shape: Shape, axis: Axis) -> IntArray:
        for i, operand in enumerate(self.operands):
            others = self.operands[:i] + self.operands[i + 1 :]
            rest = others[0] if len(others) == 1 else Or(others)
            degrees = operand._union_degrees(rest, shape, axis)
            if degrees is not None:
                return degrees
        return super()._degrees(shape, axis)

    def _tiles(self, shape: Shape, block_q: int, block_kv: int, tile_rows: range) -> TileMap:
        grid = Grid(shape, block_q, block_kv)
        if self._complemented is not None:
            return derive.complement_tiles(self._complemented, grid, tile_rows)
        return derive.or_tiles(self, grid, tile_rows, self.operands)

    def _counts_at(self, grid: Grid, keys: IntArray) -> IntArray:
        if self._complemented is not None:
            return grid.areas(keys) - self._complemented._counts_at(grid, keys)
        return derive.or_counts_at(self, grid, keys, self.operands)

    def _bits_at(self, grid: Grid, keys: IntArray) -> TileBits:
        return derive.combined_bits_at(self.operands, grid, keys, np.bitwise_or)

    def _predicate(self, shape: Shape) -> Expr | None:
        parts = [p for m in self.operands if (p := m._predicate(shape)) is not None]
        return reduce(or_, parts) if len(parts) == len(self.operands) else None


@dataclass(frozen=True, eq=False, repr=False)
class _Wrapper(Mask):
    """What masks of one operand share."""

    operand: Mask

    def _operands(self) -> tuple[Mask, ...]:
        return (self.operand,)

    def _with_operands(self, operands: tuple[Mask, ...]) -> Mask:
        return replace(self, operand=operands[0])

    @property
    def n_heads(self) -> int | None:  # type: ignore[override]
        return self.operand.n_heads

    @property
    def n_batch(self) -> int | None:  # type: ignore[override]
        return self.operand.n_batch

    @property
    def varies_by_head(self) -> bool:  # type: ignore[override]
        return self.operand.varies_by_head

    @property
    def varies_by_batch(self) -> bool:  # type: ignore[override]
        return self.operand.varies_by_batch

    @property
    def _depends_on_lengths(self) -> bool:  # type: ignore[override]
        return self.operand._depends_on_lengths

    def _fixed_lengths(self) -> tuple[int | None, int | None]:
        return self.operand._fixed_lengths()

    def _check(self, shape: Shape) -> None:
        self.operand._check(shape)

    def _row_weight(self, shape: Shape) -> float:
        return self.operand._row_weight(shape)


class Not(_Wrapper):
    """Pairs not in the operand."""

    def _postfixed(self, show: Callable[[object], str]) -> str:
        return f"({show(self)})"

    def _text(self, show: Callable[[object], str]) -> str:
        return f"~({show(self.operand)})" if isinstance(self.operand, _Junction) else f"~{show(self.operand)}"

    def _normal(self, shape: Shape | None, negated: bool, transposed: bool) -> Mask:
        return self.operand._normal(shape, not negated, transposed)

    def _terms(self, kind: type[_Junction], negated: bool, transposed: bool) -> Iterator[Term]:
        return self.operand._terms(kind, not negated, transposed)

    def _complement(self, shape: Shape | None) -> Mask | None:
        return self.operand

    def _constant(self, shape: Shape | None) -> bool | None:
        inner = self.operand._constant(shape)
        return None if inner is None else not inner

    def _key(self) -> Key:
        return ("Not", self.operand._key())

    def _lean(self, shape: Shape) -> Mask:
        inner = self.operand._lean(shape)
        return inner.operand if isinstance(inner, Not) else Not(inner)

    def _row_weight(self, shape: Shape) -> float:
        return self.operand._row_weight(shape) + 1

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        return ranges.complement(self.operand._rows(shape, start, stop), shape[1])

    def _nnz(self, shape: Shape) -> int:
        return shape[0] * shape[1] - self.operand._nnz(shape)

    def _nnz_bound(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def _degrees(self, shape: Shape, axis: Axis) -> IntArray:
        return shape[axis == "q"] - self.operand._degrees(shape, axis)

    def _tiles(self, shape: Shape, block_q: int, block_kv: int, tile_rows: range) -> TileMap:
        return derive.complement_tiles(self.operand, Grid(shape, block_q, block_kv), tile_rows)

    def _counts_at(self, grid: Grid, keys: IntArray) -> IntArray:
        return grid.areas(keys) - self.operand._counts_at(grid, keys)

    def _bits_at(self, grid: Grid, keys: IntArray) -> TileBits:
        return derive.complement_bits_at(self.operand, grid, keys)

    def _predicate(self, shape: Shape) -> Expr | None:
        inner = self.operand._predicate(shape)
        return None if inner is None else ~inner


class Transpose(_Wrapper):
    """The operand with queries and keys swapped."""

    def _lean(self, shape: Shape) -> Mask:
        return Transpose(self.operand._lean((shape[1], shape[0])))

    def _text(self, show: Callable[[object], str]) -> str:
        return f"{self.operand._postfixed(show)}.T"

    def _fixed_lengths(self) -> tuple[int | None, int | None]:
        q_len, kv_len = self.operand._fixed_lengths()
        return kv_len, q_len

    def _check(self, shape: Shape) -> None:
        self.operand._check((shape[1], shape[0]))

    def _normal(self, shape: Shape | None, negated: bool, transposed: bool) -> Mask:
        return self.operand._normal(shape, negated, not transposed)

    def _terms(self, kind: type[_Junction], negated: bool, transposed: bool) -> Iterator[Term]:
        return self.operand._terms(kind, negated, not transposed)

    def _transpose(self, shape: Shape | None) -> Mask | None:
        return self.operand

    def _key(self) -> Key:
        return ("Transpose", self.operand._key())

    def _row_weight(self, shape: Shape) -> float:
        return self._nnz(shape) / max(1, shape[0])

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        return ranges.take_rows(self._transposed_rows(shape), start, stop)

    def _transposed_rows(self, shape: Shape) -> RowRanges:
        """All rows, computed once for each shape from the operand's edges."""
        cache: dict[Shape, RowRanges] = self.__dict__.setdefault("_rows_by_shape", {})
        if shape not in cache:
            cache[shape] = derive.transposed_rows(self.operand, (shape[1], shape[0]))
        return cache[shape]

    def _nnz(self, shape: Shape) -> int:
        return self.operand._nnz((shape[1], shape[0]))

    def _nnz_bound(self, shape: Shape) -> int:
        return self.operand._nnz_bound((shape[1], shape[0]))

    def _degrees(self, shape: Shape, axis: Axis) -> IntArray:
        return self.operand._degrees((shape[1], shape[0]), "kv" if axis == "q" else "q")

    def _predicate(self, shape: Shape) -> Expr | None:
        inner = self.operand._predicate((shape[1], shape[0]))
        if inner is None:
            return None
        return inner.substitute({"q_idx": Var("kv_idx"), "kv_idx": Var("q_idx")})


@dataclass(frozen=True, eq=False, repr=False)
class Named(_Wrapper):
    """A composition that is written as the call which makes it."""

    text: str

    def _text(self, show: Callable[[object], str]) -> str:
        return self.text

    def _select(self, batch: int, head: int) -> Mask:
        chosen = self.operand._select(batch, head)
        return self if chosen is self.operand or not (self.varies_by_head or self.varies_by_batch) else chosen

    def _normal(self, shape: Shape | None, negated: bool, transposed: bool) -> Mask:
        return self.operand._normal(shape, negated, transposed)

    def _terms(self, kind: type[_Junction], negated: bool, transposed: bool) -> Iterator[Term]:
        return self.operand._terms(kind, negated, transposed)

    def _predicate(self, shape: Shape) -> Expr | None:
        return self.operand._predicate(shape)


@dataclass(frozen=True, eq=False, repr=False)
class Slice(_Wrapper):
    """Queries `q[0]:q[1]` and keys `kv[0]:kv[1]` of the operand bound to `within`, renumbered from 0."""

    q: tuple[int, int]
    kv: tuple[int, int]
    within: Shape

    def _text(self, show: Callable[[object], str]) -> str:
        part = f"[{self.q[0]}:{self.q[1]}, {self.kv[0]}:{self.kv[1]}]"
        inner = self.operand._postfixed(show)
        open_lengths = (self.q[1], self.kv[1])
        known = self.operand._fixed_lengths()
        implied = (known[0] or open_lengths[0], known[1] or open_lengths[1])
        if implied == self.within and not self.operand._depends_on_lengths:
            return inner + part
        return f"{inner}.bind({self.within[0]}, {self.within[1]}){part}.mask"

    @property
    def _depends_on_lengths(self) -> bool:  # type: ignore[override]
        return False

    def _fixed_lengths(self) -> tuple[int | None, int | None]:
        return self.q[1] - self.q[0], self.kv[1] - self.kv[0]

    def _check(self, shape: Shape) -> None:
        self.operand._check(self.within)

    def _normal(self, shape: Shape | None, negated: bool, transposed: bool) -> Mask:
        inner = self.operand._normal(self.within, False, False)
        part = inner._sliced(self.within, self.q, self.kv)
        leaf: Mask = Slice(inner, self.q, self.kv, self.within) if part is None else part
        own_shape = (self.q[1] - self.q[0], self.kv[1] - self.kv[0])
        if transposed:
            leaf = transpose_of(leaf, own_shape)
            own_shape = (own_shape[1], own_shape[0])
        if negated:
            leaf = complement_of(leaf, own_shape)
        return leaf

    def _key(self) -> Key:
        return ("Slice", self.operand._key(), self.q, self.kv, self.within)

    def _lean(self, shape: Shape) -> Mask:
        return replace(self, operand=self.operand._lean(self.within))

    def _row_weight(self, shape: Shape) -> float:
        return self.operand._row_weight(self.within)

    def _nnz_bound(self, shape: Shape) -> int:
        return min(shape[0] * shape[1], self.operand._nnz_bound(self.within))

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        rows = self.operand._rows(self.within, self.q[0] + start, self.q[0] + stop)
        return ranges.shift(ranges.clip(rows, self.kv[0], self.kv[1]), -self.kv[0])

    def _whole(self, block_q: int, block_kv: int) -> Grid | None:
        """The operand's tiles, where those of the slice are some of them: whole rows of tiles."""
        is_whole = (
            self.q[0] % block_q == 0
            and (self.q[1] % block_q == 0 or self.q[1] == self.within[0])
            and self.kv == (0, self.within[1])
        )
        return Grid(self.within, block_q, block_kv) if is_whole else None

    def _tiles(self, shape: Shape, block_q: int, block_kv: int, tile_rows: range) -> TileMap:
        if self._whole(block_q, block_kv) is None:
            return super()._tiles(shape, block_q, block_kv, tile_rows)
        first = self.q[0] // block_q
        part = self.operand._tiles(
            self.within, block_q, block_kv, range(first + tile_rows.start, first + tile_rows.stop)
        )
        n_rows = -(-shape[0] // block_q)
        return replace(part, shape=shape, indptr=part.indptr[first : first + n_rows + 1])

    def _counts_at(self, grid: Grid, keys: IntArray) -> IntArray:
        whole = self._whole(grid.block_q, grid.block_kv)
        if whole is None:
            return super()._counts_at(grid, keys)
        return self.operand._counts_at(whole, keys + self.q[0] // grid.block_q * grid.n_kv_tiles)

    def _bits_at(self, grid: Grid, keys: IntArray) -> TileBits:
        whole = self._whole(grid.block_q, grid.block_kv)
        if whole is None:
            return super()._bits_at(grid, keys)
        return self.operand._bits_at(whole, keys + self.q[0] // grid.block_q * grid.n_kv_tiles)

    def _predicate(self, shape: Shape) -> Expr | None:
        inner = self.operand._predicate(self.within)
        if inner is None:
            return None
        return inner.substitute({"q_idx": Var("q_idx") + self.q[0], "kv_idx": Var("kv_idx") + self.kv[0]})


def transpose_of(leaf: Mask, shape: Shape | None) -> Mask:
    """The transpose of a leaf of `shape`: a leaf again where it can be one."""
    transposed = leaf._transpose(shape)
    return Transpose(leaf) if transposed is None else transposed


def complement_of(leaf: Mask, shape: Shape | None) -> Mask:
    """The complement of a leaf of `shape`: a leaf again where it can be one."""
    complement = leaf._complement(shape)
    return Not(leaf) if complement is None else complement


def _swapped(shape: Shape | None) -> Shape | None:
    return None if shape is None else (shape[1], shape[0])


def _union_rows(masks: Sequence[Mask], shape: Shape, start: int, stop: int) -> RowRanges:
    return reduce(ranges.union, (m._rows(shape, start, stop) for m in masks))
