"""Masks that are true where an expression is: FlexAttention predicates and block masks.

A predicate that uses positions only through `kv - q` becomes a set of offsets. Of any other, rows are found by descent:
the expression is bounded over boxes of queries and keys, boxes where it is certainly false are dropped, boxes where it
is certainly true are taken whole, and the rest is split until it is small enough to evaluate, so that the work follows
the outline of the mask and not its area. This file decides that search; what can be said is in `sparsec.expr`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError
from sparsec.expr import VARIABLES, Const, Expr, Table, Var, apply, linear_form, offset_form, trace_mask_mod
from sparsec.expr.captured import Captured, to_numpy
from sparsec.expr.parse import parse_expr
from sparsec.masks import ranges
from sparsec.masks.mask import Key, Mask, Shape, digest_array
from sparsec.masks.ranges import IntArray, RowRanges, expand
from sparsec.masks.toeplitz import Toeplitz

# Boxes of at most this many pairs are evaluated pair by pair.
_LEAF_PAIRS = 64
# Boxes bounded in one go, and pairs evaluated in one go: a few tens of megabytes.
_BATCH_BOXES = 1 << 16
_BATCH_PAIRS = 1 << 21
_BATCH_OFFSETS = 1 << 20
# Sets of at most this many intervals of offsets are written into a predicate they are joined with.
_LONGEST_PREDICATE = 4


@dataclass(frozen=True, slots=True)
class _Boxes:
    """Boxes of pairs, each from its first corner up to, not including, its ends.

    Attributes:
        q: First query of each box: int64 `[n]`, as are the others.
        q_end: One past its last query.
        kv: First key.
        kv_end: One past the last key.
        sides: Powers of two that no box exceeds in queries, in keys.
    """

    q: IntArray
    q_end: IntArray
    kv: IntArray
    kv_end: IntArray
    sides: tuple[int, int]

    def __len__(self) -> int:
        return len(self.q)

    def take(self, chosen: npt.NDArray[np.bool_] | slice) -> _Boxes:
        return _Boxes(self.q[chosen], self.q_end[chosen], self.kv[chosen], self.kv_end[chosen], self.sides)

    def split(self) -> _Boxes:
        """Every box cut in half along its longer side, or both if they are equal."""
        q_side, kv_side = self.sides
        halves_q, halves_kv = q_side >= kv_side, kv_side >= q_side
        half_q, half_kv = q_side // 2 if halves_q else q_side, kv_side // 2 if halves_kv else kv_side
        parts = [
            _Boxes(
                self.q + i * half_q,
                np.minimum(self.q_end, self.q + (i + 1) * half_q),
                self.kv + j * half_kv,
                np.minimum(self.kv_end, self.kv + (j + 1) * half_kv),
                (half_q, half_kv),
            )
            for i in range(1 + halves_q)
            for j in range(1 + halves_kv)
        ]
        q, q_end, kv, kv_end = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("q", "q_end", "kv", "kv_end")
        )
        joined = _Boxes(q, q_end, kv, kv_end, (half_q, half_kv))
        return joined.take((joined.q < joined.q_end) & (joined.kv < joined.kv_end))


def _power_of_two(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()


def _covering(start: int, stop: int, kv_len: int) -> _Boxes:
    """Queries `start:stop` with all keys, as boxes that splitting keeps aligned to powers of two."""
    side, kv_side = _power_of_two(stop - start), _power_of_two(kv_len)
    corners = np.arange(start // side * side, stop, side, dtype=np.int64)
    boxes = _Boxes(corners, corners + side, np.zeros_like(corners), np.full_like(corners, kv_len), (side, kv_side))
    return boxes


def _descend(expr: Expr, boxes: _Boxes, start: int, stop: int) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
    """`(query, first key, end key)` of disjoint intervals that make up the pairs of `boxes` where `expr` is true.

    Only queries in `start:stop` are looked at.
    """
    stack = [boxes]
    while stack:
        boxes = stack.pop()
        if len(boxes) > _BATCH_BOXES:
            stack += [boxes.take(slice(at, at + _BATCH_BOXES)) for at in range(0, len(boxes), _BATCH_BOXES)]
            continue
        boxes = boxes.take((boxes.q < stop) & (boxes.q_end > start))
        if not len(boxes):
            continue
        first, last = np.maximum(boxes.q, start), np.minimum(boxes.q_end, stop)
        certain, possible = expr.bounds(q_idx=(first, last - 1), kv_idx=(boxes.kv, boxes.kv_end - 1))
        certain, possible = (np.broadcast_to(known, len(boxes)) for known in (certain, possible))
        if certain.any():
            box, nth = expand((last - first)[certain])
            yield first[certain][box] + nth, boxes.kv[certain][box], boxes.kv_end[certain][box]
        undecided = boxes.take(possible & ~certain)
        if not len(undecided):
            continue
        if boxes.sides[0] * boxes.sides[1] > _LEAF_PAIRS:
            stack.append(undecided.split())
            continue
        batch = max(1, _BATCH_PAIRS // _LEAF_PAIRS)
        for at in range(0, len(undecided), batch):
            yield _evaluated(expr, undecided.take(slice(at, at + batch)), start, stop)


def _evaluated(expr: Expr, boxes: _Boxes, start: int, stop: int) -> tuple[IntArray, IntArray, IntArray]:
    """The intervals of small boxes, by evaluating every pair."""
    q = boxes.q[:, None, None] + np.arange(boxes.sides[0], dtype=np.int64)[:, None]
    kv = boxes.kv[:, None, None] + np.arange(boxes.sides[1], dtype=np.int64)
    inside = (q < np.minimum(boxes.q_end, stop)[:, None, None]) & (q >= start) & (kv < boxes.kv_end[:, None, None])
    held = expr.evaluate(q_idx=q, kv_idx=kv) & inside
    # An interval begins where a pair is held and the one before is not, and ends the other way round.
    walls = np.zeros((*held.shape[:2], 1), np.bool_)
    change = np.diff(np.concatenate((walls, held, walls), axis=2).view(np.int8), axis=2)
    box, row, begin = np.nonzero(change == 1)
    end = np.nonzero(change == -1)[2]
    return boxes.q[box] + row, boxes.kv[box] + begin, boxes.kv[box] + end


def _rows_from(n_rows: int, start: int, intervals: list[tuple[IntArray, IntArray, IntArray]]) -> RowRanges:
    if not intervals:
        return ranges.empty(n_rows)
    query, begin, end = (np.concatenate(column) for column in zip(*intervals, strict=True))
    rows = ranges.from_rows(n_rows, query - start, begin, end)
    # Mostly single keys: they may be equally spaced.
    if rows.nnz <= 2 * len(rows.start):
        rows = ranges.from_edges(n_rows, *ranges.to_edges(rows))
    return rows


def _is_short(mask: Toeplitz) -> bool:
    return len(mask.offsets.start) <= _LONGEST_PREDICATE and bool((mask.offsets.step == 1).all())


def _offset_ranges(expr: Expr, shape: Shape) -> RowRanges:
    """The offsets in `(-q_len, kv_len)` where `expr`, an offset form, is true."""
    found = []
    for at in range(1 - shape[0], shape[1], _BATCH_OFFSETS):
        offsets = np.arange(at, min(at + _BATCH_OFFSETS, shape[1]), dtype=np.int64)
        held = np.broadcast_to(expr.evaluate(q_idx=0, kv_idx=offsets), offsets.shape)
        found.append(offsets[held])
    offsets = np.concatenate(found)
    return ranges.from_edges(1, np.zeros_like(offsets), offsets)


def _check_tables(expr: Expr, shape: Shape) -> None:
    """Raises MaskError where a position plus a constant indexes an array that ends before the positions do."""
    lengths = dict(zip(("q_idx", "kv_idx"), shape, strict=True))
    for node in expr.walk():
        if not isinstance(node, Table):
            continue
        for index, size in zip(node.args, node.captured.shape, strict=True):
            form = linear_form(index)
            if form is None or len(form[0]) != 1 or next(iter(form[0])) not in lengths:
                continue
            ((name, factor),), constant = form[0].items(), form[1]
            ends = sorted((constant, factor * (lengths[name] - 1) + constant))
            if ends[1] >= size or ends[0] < -size:
                raise MaskError(
                    f"{node} is asked for indices {ends[0]} to {ends[1]} at {name.removesuffix('_idx')}_len = "
                    f"{lengths[name]}, and {node.captured.name!r} has {size} entries; give it one for every position."
                )


@dataclass(frozen=True, eq=False, repr=False)
class Predicate(Mask):
    """The pairs where an expression of b, h, q_idx and kv_idx is true.

    Attributes:
        expr: A bool expression, simplified.
    """

    expr: Expr

    @property
    def varies_by_head(self) -> bool:  # type: ignore[override]
        return "h" in self.expr.variables()

    @property
    def varies_by_batch(self) -> bool:  # type: ignore[override]
        return "b" in self.expr.variables()

    def _text(self, show: Callable[[object], str]) -> str:
        return f"from_expression({_arguments(self.expr, show)})"

    def _key(self) -> Key:
        return ("Predicate", self.expr.digest)

    def _check(self, shape: Shape) -> None:
        _check_tables(self.expr, shape)

    def _select(self, batch: int, head: int) -> Mask:
        return Predicate(self.expr.substitute({"b": batch, "h": head}).simplify())

    def _normal(self, shape: Shape | None, negated: bool, transposed: bool) -> Mask:
        expr = self.expr
        if transposed:
            expr = _transposed(expr)
        if negated:
            expr = (~expr).simplify()
        offsets = offset_form(expr) if shape is not None else None
        if shape is None or offsets is None or offsets.variables() - {"kv_idx"}:
            return Predicate(expr)
        mask = Toeplitz(str(Predicate(expr)), _offset_ranges(offsets, shape))
        return mask._normal(shape, False, False)

    def _complement(self, shape: Shape | None) -> Mask | None:
        return self._normal(shape, True, False)

    def _transpose(self, shape: Shape | None) -> Mask | None:
        return self._normal(shape and (shape[1], shape[0]), False, True)

    def _merge(self, other: Mask, op: Literal["and", "or"], shape: Shape | None) -> Mask | None:
        if isinstance(other, Toeplitz):
            # One descent through both is never more than the descent through this one alone.
            other_expr = other._predicate(shape) if op == "and" and shape and _is_short(other) else None
            other = other if other_expr is None else Predicate(other_expr)
        if not isinstance(other, Predicate):
            return None
        return Predicate(apply(op, self.expr, other.expr).simplify())._normal(shape, False, False)

    def _sliced(self, shape: Shape, q: tuple[int, int], kv: tuple[int, int]) -> Mask | None:
        moved = self.expr.substitute({"q_idx": Var("q_idx") + q[0], "kv_idx": Var("kv_idx") + kv[0]})
        return Predicate(moved.simplify())._normal((q[1] - q[0], kv[1] - kv[0]), False, False)

    def _constant(self, shape: Shape | None) -> bool | None:
        return bool(self.expr.value) if isinstance(self.expr, Const) else None

    def _predicate(self, shape: Shape) -> Expr | None:
        return self.expr

    def _row_weight(self, shape: Shape) -> float:
        return 16.0

    def _nnz_bound(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        if stop == start:
            return ranges.empty(0)
        boxes = _covering(start, stop, shape[1])
        return _rows_from(stop - start, start, list(_descend(self.expr, boxes, start, stop)))


def _transposed(expr: Expr) -> Expr:
    return expr.substitute({"q_idx": Var("kv_idx"), "kv_idx": Var("q_idx")}).simplify()


def _arguments(expr: Expr, show: Callable[[object], str]) -> str:
    """The arguments of `from_expression` that make `expr` again; arrays of one name are told apart."""
    names: dict[str, Captured] = {}
    renamed: dict[Captured, Captured] = {}
    for captured in expr.tables():
        name, number = captured.name, 1
        if not name.isidentifier():
            name = "table"
        base = name
        while name in names or name in ("text", *VARIABLES):
            number += 1
            name = f"{base}_{number}"
        names[name] = renamed[captured] = Captured(captured.array, name)
    shown = expr.replace(lambda node: Table(renamed[node.captured], node.args) if isinstance(node, Table) else None)
    arrays = (f"{name}={_array_text(captured.array, show)}" for name, captured in names.items())
    return ", ".join((repr(str(shown)), *arrays))


def _array_text(array: npt.NDArray[Any], show: Callable[[object], str]) -> str:
    if show is str and array.size > 8:
        return f"[… {'×'.join(map(str, array.shape))} …]"
    return repr(array.tolist())


@dataclass(frozen=True, eq=False, repr=False)
class PredicateBlocks(Mask):
    """Whole blocks, and of other blocks the pairs where an expression is true.

    Attributes:
        shape: The lengths.
        block: Queries and keys of a block.
        indptr: int64 `[n_block_rows + 1]`.
        indices: int64 `[n_blocks]`, block columns, ascending within a block row.
        is_full: bool `[n_blocks]`.
        expr: A bool expression that decides in the blocks that are not full.
    """

    shape: Shape
    block: tuple[int, int]
    indptr: IntArray
    indices: IntArray
    is_full: npt.NDArray[np.bool_]
    expr: Expr

    @property
    def varies_by_head(self) -> bool:  # type: ignore[override]
        return "h" in self.expr.variables()

    @property
    def varies_by_batch(self) -> bool:  # type: ignore[override]
        return "b" in self.expr.variables()

    def _text(self, show: Callable[[object], str]) -> str:
        # Written as a predicate that looks its blocks up.
        row = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        block_q, block_kv = Var("q_idx") // self.block[0], Var("kv_idx") // self.block[1]
        looked_up: list[Expr] = []
        for name, chosen in (("full", self.is_full), ("partial", ~self.is_full)):
            listed = np.zeros((len(self.indptr) - 1, -(-self.shape[1] // self.block[1])), np.bool_)
            listed[row[chosen], self.indices[chosen]] = True
            looked_up.append(Table(Captured(listed, name), (block_q, block_kv)))
        whole = Predicate(looked_up[0] | (looked_up[1] & self.expr))
        return f"{whole._text(show)}.bind({self.shape[0]}, {self.shape[1]}).mask"

    def _key(self) -> Key:
        arrays = (digest_array(array) for array in (self.indptr, self.indices, self.is_full))
        return ("PredicateBlocks", self.shape, self.block, *arrays, self.expr.digest)

    def _fixed_lengths(self) -> tuple[int | None, int | None]:
        return self.shape

    def _check(self, shape: Shape) -> None:
        _check_tables(self.expr, shape)

    def _select(self, batch: int, head: int) -> Mask:
        return replace(self, expr=self.expr.substitute({"b": batch, "h": head}).simplify())

    def _transpose(self, shape: Shape | None) -> Mask | None:
        row = np.repeat(np.arange(len(self.indptr) - 1, dtype=np.int64), np.diff(self.indptr))
        order = np.lexsort((row, self.indices))
        return PredicateBlocks(
            (self.shape[1], self.shape[0]),
            (self.block[1], self.block[0]),
            _indptr(self.indices, -(-self.shape[1] // self.block[1])),
            row[order],
            self.is_full[order],
            _transposed(self.expr),
        )

    def _nnz_bound(self, shape: Shape) -> int:
        return len(self.indices) * self.block[0] * self.block[1]

    def _row_weight(self, shape: Shape) -> float:
        return max(4.0, len(self.indices) / max(1, len(self.indptr) - 1))

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        if stop == start:
            return ranges.empty(0)
        (block_q, block_kv), (q_len, kv_len) = self.block, shape
        first, last = start // block_q, -(-stop // block_q)
        chosen = slice(self.indptr[first], self.indptr[last])
        q = np.repeat(np.arange(first, last, dtype=np.int64), np.diff(self.indptr[first : last + 1])) * block_q
        kv = self.indices[chosen] * block_kv
        sides = (_power_of_two(block_q), _power_of_two(block_kv))
        boxes = _Boxes(q, np.minimum(q + block_q, q_len), kv, np.minimum(kv + block_kv, kv_len), sides)
        is_full = self.is_full[chosen]
        intervals = [
            *_descend(Const(True), boxes.take(is_full), start, stop),
            *_descend(self.expr, boxes.take(~is_full), start, stop),
        ]
        return _rows_from(stop - start, start, intervals)


def from_mask_mod(mask_mod: Callable[..., Any]) -> Mask:
    """The pairs where FlexAttention's predicate `mask_mod(b, h, q_idx, kv_idx)` is true.

    It is called once, with symbols; arrays it captures are copied. One that uses `h` or `b` gives a mask that differs
    by head or batch element.

    Raises:
        MaskError: The predicate cannot be traced; the message names the file and line.
    """
    return Predicate(trace_mask_mod(mask_mod))


def from_expression(text: str, **tables: npt.ArrayLike) -> Mask:
    """The pairs where an expression such as `"q_idx - kv_idx <= 255"` is true.

    Args:
        text: A bool expression in Python's grammar over `b`, `h`, `q_idx`, `kv_idx`.
        tables: Arrays it indexes, by name: `from_expression("doc[q_idx] == doc[kv_idx]", doc=[0, 0, 1])`.

    Raises:
        MaskError: The text is not a bool expression of positions.
    """
    expr = parse_expr(text, tables)
    if expr.kind != "bool" or "score" in expr.variables():
        raise MaskError(f"from_expression({text!r}): it is {expr.kind}; give a bool expression of b, h, q_idx, kv_idx.")
    return Predicate(expr.simplify())


def from_block_mask(block_mask: Any) -> Mask:  # torch is not imported here
    """The pairs of FlexAttention's `BlockMask`: full blocks whole, and of partial ones where its `mask_mod` is true.

    Block masks with several heads or batch elements become `per_head` and `per_batch`.

    Raises:
        MaskError: Not a block mask, or its `mask_mod` cannot be traced.
    """
    needed = ("kv_num_blocks", "kv_indices", "BLOCK_SIZE", "mask_mod")
    missing = [name for name in needed if not hasattr(block_mask, name)]
    if missing:
        raise MaskError(
            f"from_block_mask expects a torch.nn.attention.flex_attention.BlockMask; found {type(block_mask).__name__} "
            f"without {', '.join(missing)}."
        )
    partial = _block_lists(block_mask.kv_num_blocks, block_mask.kv_indices)
    full_counts = getattr(block_mask, "full_kv_num_blocks", None)
    full = None if full_counts is None else _block_lists(full_counts, block_mask.full_kv_indices)
    expr = Const(True) if block_mask.mask_mod is None else trace_mask_mod(block_mask.mask_mod)
    block = (int(block_mask.BLOCK_SIZE[0]), int(block_mask.BLOCK_SIZE[1]))
    counts, indices = partial
    n_batch, n_heads, n_rows = counts.shape
    lengths = getattr(block_mask, "seq_lengths", None) or (n_rows * block[0], indices.shape[-1] * block[1])
    shape = (int(lengths[0]), int(lengths[1]))

    def leaf(batch: int, head: int) -> Mask:
        rows, columns = _listed(counts[batch, head], indices[batch, head])
        full_rows = full_columns = np.zeros(0, np.int64)
        if full is not None:
            full_rows, full_columns = _listed(full[0][batch, head], full[1][batch, head])
        width = -(-shape[1] // block[1])
        full_keys = np.unique(full_rows * width + full_columns)
        keys = np.union1d(full_keys, rows * width + columns)
        inside = keys // width < -(-shape[0] // block[0])
        keys = keys[inside]
        fixed: dict[str, Expr | int] = {**({"b": batch} if n_batch > 1 else {}), **({"h": head} if n_heads > 1 else {})}
        return PredicateBlocks(
            shape,
            block,
            _indptr(keys // width, -(-shape[0] // block[0])),
            keys % width,
            np.isin(keys, full_keys),
            expr.substitute(fixed).simplify(),
        )

    from sparsec.masks.varying import per_batch, per_head

    elements = []
    for batch in range(n_batch):
        heads = [leaf(batch, head) for head in range(n_heads)]
        elements.append(per_head(heads) if n_heads > 1 else heads[0])
    return per_batch(elements) if n_batch > 1 else elements[0]


def _indptr(row: IntArray, n_rows: int) -> IntArray:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(np.bincount(row, minlength=n_rows))))


def _block_lists(counts: Any, indices: Any) -> tuple[IntArray, IntArray]:  # torch tensors
    """Counts `[batch, heads, block_rows]` and indices `[batch, heads, block_rows, most]` on the host."""
    count_array, index_array = to_numpy(counts).astype(np.int64), to_numpy(indices).astype(np.int64)
    while count_array.ndim < 3:
        count_array, index_array = count_array[None], index_array[None]
    return count_array, index_array


def _listed(counts: IntArray, indices: IntArray) -> tuple[IntArray, IntArray]:
    """Row and column of every block: row `i` lists its first `counts[i]` indices."""
    rows, nth = expand(counts)
    return rows, indices[rows, nth]
