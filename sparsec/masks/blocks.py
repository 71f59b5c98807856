"""Masks of whole blocks: any mask over blocks, seen at the scale of tokens.

This file decides how a mask over blocks becomes one over tokens; which mask it is, it need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparsec.errors import MaskError
from sparsec.expr import Expr, Var
from sparsec.masks import ranges
from sparsec.masks.arguments import checked_int
from sparsec.masks.explicit import from_dense, from_pairs, from_sparse, is_sparse
from sparsec.masks.mask import Mask, Named, Shape, call_text
from sparsec.masks.random import checked_seed, random_edges
from sparsec.masks.ranges import IntArray, RowRanges, expand
from sparsec.masks.runs import RunMask
from sparsec.masks.varying import per_head


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(RunMask):
    """The pairs whose blocks are a pair of `over`."""

    over: Mask
    block: int

    def _text(self, show: Callable[[object], str]) -> str:
        return call_text(show, "blocks", self.over, self.block)

    def _over_shape(self, shape: Shape) -> Shape:
        return -(-shape[0] // self.block), -(-shape[1] // self.block)

    @property
    def _depends_on_lengths(self) -> bool:  # type: ignore[override]
        return self.over._depends_on_lengths

    def _check(self, shape: Shape) -> None:
        over_shape = self._over_shape(shape)
        for name, known, found, length in zip(
            ("q_len", "kv_len"), self.over._fixed_lengths(), over_shape, shape, strict=True
        ):
            if known is not None and known != found:
                raise MaskError(
                    f"{self}: {known} blocks of {self.block} do not fit {name} = {length}, which has {found}; "
                    f"bind it to at most {known * self.block} and more than {(known - 1) * self.block} tokens"
                )
        self.over._check(over_shape)

    def _operands(self) -> tuple[Mask, ...]:
        return (self.over,)

    def _with_operands(self, operands: tuple[Mask, ...]) -> Mask:
        return Blocks(operands[0], self.block)

    def _normal(self, shape: Shape | None, negated: bool, transposed: bool) -> Mask:
        over_shape = None if shape is None else self._over_shape(shape)
        return Blocks(self.over._normal(over_shape, negated, transposed), self.block)

    def _lean(self, shape: Shape) -> Mask:
        return Blocks(self.over._lean(self._over_shape(shape)), self.block)

    def _transpose(self, shape: Shape | None) -> Mask | None:
        return self._normal(None if shape is None else (shape[1], shape[0]), False, True)

    def _complement(self, shape: Shape | None) -> Mask | None:
        return self._normal(shape, True, False)

    def _merge(self, other: Mask, op: Literal["and", "or"], shape: Shape | None) -> Mask | None:
        if not isinstance(other, Blocks) or other.block != self.block:
            return None
        over = self.over & other.over if op == "and" else self.over | other.over
        return Blocks(over, self.block)._normal(shape, False, False)

    def _constant(self, shape: Shape | None) -> bool | None:
        return self.over._constant(None if shape is None else self._over_shape(shape))

    def _row_weight(self, shape: Shape) -> float:
        return self.over._row_weight(self._over_shape(shape))

    def _run_weight(self, shape: Shape) -> float:
        return self._row_weight(shape) / self.block

    def _nnz_bound(self, shape: Shape) -> int:
        return self.over._nnz_bound(self._over_shape(shape)) * self.block**2

    def _runs(self, shape: Shape, start: int, stop: int) -> tuple[IntArray, RowRanges]:
        first, last = start // self.block, -(-stop // self.block)
        bounds = np.clip(np.arange(first, last + 1, dtype=np.int64) * self.block, start, stop)
        rows = self.over._rows(self._over_shape(shape), first, last)
        row, begin, end = ranges.row_of_range(rows), rows.start, rows.stop
        if not (rows.step == 1).all():
            # Blocks of a progression do not touch: each is a range of its own.
            item, nth = expand(np.where(rows.step == 1, 1, ranges.lengths(rows)))
            row, begin = row[item], begin[item] + nth * rows.step[item]
            end = np.where(rows.step[item] == 1, rows.stop[item], begin + 1)
        end = np.minimum(end * self.block, shape[1])
        return bounds, ranges.from_rows(rows.n_rows, row, begin * self.block, end)

    def _predicate(self, shape: Shape) -> Expr | None:
        inner = self.over._predicate(self._over_shape(shape))
        if inner is None:
            return None
        return inner.substitute({name: Var(name) // self.block for name in ("q_idx", "kv_idx")})


def blocks(block_mask: object, block: int) -> Mask:
    """Whole blocks: queries of block `i` attend keys of block `j` where the block mask says so.

    Args:
        block_mask: bool `[n_q_blocks, n_kv_blocks]`, a SciPy sparse array of that shape, for each query block the list
            of its key blocks (square then), or any mask over blocks.
        block: Tokens a block; the last may be shorter.
    """
    size = checked_block(block, "blocks")
    if isinstance(block_mask, Mask):
        if block_mask.varies_by_head or block_mask.varies_by_batch:
            raise MaskError(
                "blocks: the mask over blocks varies; give each head or batch element its own: per_head([blocks(…), …])"
            )
        return Blocks(block_mask, size)
    if is_sparse(block_mask):
        return Blocks(from_sparse(block_mask), size)
    if isinstance(block_mask, np.ndarray):
        return Blocks(from_dense(block_mask), size)
    if isinstance(block_mask, Sequence) and not isinstance(block_mask, str) and len(block_mask):
        first = block_mask[0]
        if len(first) and isinstance(first[0], (bool, np.bool_)):
            return Blocks(from_dense(np.asarray(block_mask)), size)
        row = np.repeat(np.arange(len(block_mask)), [len(part) for part in block_mask])
        column = np.array([key for part in block_mask for key in part], dtype=np.int64)
        return Blocks(from_pairs(row, column, (len(block_mask), len(block_mask)), "blocks"), size)
    raise MaskError(
        f"blocks: the block mask is a {type(block_mask).__name__}; give a bool array [n_q_blocks, n_kv_blocks], a "
        "SciPy sparse array, a list of key blocks for each query block, or a mask over blocks"
    )


def random_blocks(count: int, block: int, seed: int | Sequence[int], *, avoiding: Mask | None = None) -> Mask:
    """`count` different random key blocks for each query block.

    Args:
        count: Key blocks of each query block.
        block: Tokens a block.
        seed: One seed, or one for each query head: the mask then differs by head.
        avoiding: A mask over blocks; draw among the blocks it leaves.
    """
    size = checked_block(block, "random_blocks")
    if not isinstance(seed, (int, np.integer)):
        return per_head([random_blocks(count, block, each, avoiding=avoiding) for each in seed])
    options = "" if avoiding is None else f", avoiding={avoiding!r}"
    over = random_edges(count, checked_seed(seed, "random_blocks"), avoiding=avoiding)
    return Named(Blocks(over, size), f"random_blocks({int(count)}, {size}, {int(seed)}{options})")


def checked_block(block: int, name: str) -> int:
    return checked_int(block, name, "block", most=2**31)
