"""Random masks that are recomputed, never stored.

A row's keys are the first few of a permutation of all keys, and the permutation is a function of seed, row and
position: any row can be had at any time, in any process. This file decides that function; changing it changes every
random mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError
from sparsec.masks import ranges
from sparsec.masks.arguments import checked_int
from sparsec.masks.mask import Axis, Mask, Shape, call_text
from sparsec.masks.ranges import IntArray, RowRanges

UIntArray = npt.NDArray[np.uint64]
# Rounds of the Feistel network: each mixes one half of the position into the other.
ROUNDS = 6
POSITIONS_A_CHUNK = 2**20


@dataclass(frozen=True, eq=False, repr=False)
class RandomEdges(Mask):
    """`degree` keys a row, all different, none of them in `avoiding`."""

    degree: int
    seed: int
    avoiding: Mask | None = None

    def _text(self, show: Callable[[object], str]) -> str:
        options = {} if self.avoiding is None else {"avoiding": self.avoiding}
        return call_text(show, "random_edges", self.degree, self.seed, **options)

    _depends_on_lengths = True

    def _check(self, shape: Shape) -> None:
        if self.degree > shape[1]:
            raise MaskError(f"{self}: a row cannot have {self.degree} different keys of {shape[1]}; ask for fewer")

    def _normal(self, shape: Shape | None, negated: bool, transposed: bool) -> Mask:
        own_shape = None if shape is None else (shape[1], shape[0]) if transposed else shape
        avoiding = None if self.avoiding is None else self.avoiding._normal(own_shape, False, False)
        return Mask._normal(RandomEdges(self.degree, self.seed, avoiding), shape, negated, transposed)

    def _row_weight(self, shape: Shape) -> float:
        return float(self.degree + 1)

    def _nnz_bound(self, shape: Shape) -> int:
        return self.degree * shape[0]

    def _nnz(self, shape: Shape) -> int:
        return super()._nnz(shape) if self.avoiding is not None else self.degree * shape[0]

    def _degrees(self, shape: Shape, axis: Axis) -> IntArray:
        if axis == "q" and self.avoiding is None:
            return np.full(shape[0], self.degree, np.int64)
        return super()._degrees(shape, axis)

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        if not self.degree:
            return ranges.empty(stop - start)
        q = np.arange(start, stop, dtype=np.int64)
        if self.avoiding is None:
            keys = permuted(self.seed, q, self.degree, shape[1])
            return _sorted_rows(keys)
        return self._rows_avoiding(self.avoiding._rows(shape, start, stop), shape, q)

    def _rows_avoiding(self, avoided: RowRanges, shape: Shape, q: IntArray) -> RowRanges:
        n_avoided = ranges.degrees(avoided)
        n_wanted = np.minimum(self.degree, shape[1] - n_avoided)
        # A row with few keys left takes them all; the others find enough among their first degree + avoided keys.
        takes_all = n_wanted < self.degree
        found = [ranges.complement(ranges.pick_rows(avoided, np.flatnonzero(takes_all)), shape[1])]
        order = [np.flatnonzero(takes_all)]
        choosing = np.flatnonzero(~takes_all)
        depth = self.degree + int(n_avoided[choosing].max(initial=0))
        step = max(1, POSITIONS_A_CHUNK // depth)
        for begin in range(0, len(choosing), step):
            some = choosing[begin : begin + step]
            keys = permuted(self.seed, q[some], depth, shape[1])
            row = np.repeat(np.arange(len(some), dtype=np.int64), depth)
            is_free = ~ranges.contains(ranges.pick_rows(avoided, some), row, keys.reshape(-1)).reshape(keys.shape)
            chosen = is_free & (np.cumsum(is_free, axis=1) <= self.degree)
            found.append(_sorted_rows(keys[chosen].reshape(len(some), self.degree)))
            order.append(some)
        place = np.argsort(np.concatenate(order))
        return ranges.pick_rows(ranges.concatenate(found), place)


def _sorted_rows(keys: IntArray) -> RowRanges:
    keys = np.sort(keys, axis=1)
    row = np.repeat(np.arange(len(keys), dtype=np.int64), keys.shape[1])
    flat = keys.reshape(-1)
    return ranges.from_rows(len(keys), row, flat, flat + 1, is_sorted=True)


def permuted(seed: int, row: IntArray, count: int, length: int) -> IntArray:
    """int64 `[len(row), count]`: the first `count` entries of each row's own permutation of `range(length)`.

    An alternating Feistel network on a grid `a × b ≥ length`; positions outside walk on until they are inside.
    """
    a = isqrt(length - 1) + 1
    b = -(-length // a)
    with np.errstate(over="ignore"):
        keys = [_mix(_mix(_seed_word(seed) + np.uint64(i)) ^ row.astype(np.uint64))[:, None] for i in range(ROUNDS)]
    position = np.broadcast_to(np.arange(count, dtype=np.int64), (len(row), count)).copy()
    result = _walk(position, keys, a, b)
    outside = np.nonzero(result >= length)
    while len(outside[0]):
        walked = _walk(result[outside], [key[outside[0], 0] for key in keys], a, b)
        result[outside] = walked
        still = walked >= length
        outside = (outside[0][still], outside[1][still])
    return result


def _walk(position: IntArray, keys: list[UIntArray], a: int, b: int) -> IntArray:
    x, y = (part.astype(np.uint64) for part in np.divmod(position, b))
    with np.errstate(over="ignore"):
        for i, key in enumerate(keys):
            if i % 2 == 0:
                x = (x + _mix(y ^ key) % np.uint64(a)) % np.uint64(a)
            else:
                y = (y + _mix(x ^ key) % np.uint64(b)) % np.uint64(b)
    return x.astype(np.int64) * b + y.astype(np.int64)


def _mix(x: UIntArray | np.uint64) -> UIntArray:
    """Source: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    z = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _seed_word(seed: int) -> np.uint64:
    return np.uint64(seed % 2**64)


def random_edges(degree: int, seed: int, *, avoiding: Mask | None = None) -> Mask:
    """`degree` different keys a row, drawn evenly; the same in every process, and stored nowhere.

    Args:
        degree: Keys of each query.
        seed: Any int below 2**64.
        avoiding: Draw among the keys this mask leaves; a row that has fewer takes them all.
    """
    degree = checked_int(degree, "random_edges", "degree", least=0, most=2**31)
    return RandomEdges(degree, checked_seed(seed, "random_edges"), avoiding)


def checked_seed(seed: object, name: str) -> int:
    return checked_int(seed, name, "seed", least=0, most=2**64 - 1)
