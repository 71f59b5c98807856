"""Random masks that are recomputed, never stored.

A row's keys are the first few of a permutation of all keys, and the permutation is a function of seed, row and
position: any row can be had at any time, in any process. This file decides that function; changing it changes every
random mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError
from sparsec.masks import derive, ranges
from sparsec.masks.ahead import in_order
from sparsec.masks.arguments import checked_int
from sparsec.masks.mask import Axis, Mask, Shape, call_text
from sparsec.masks.ranges import IntArray, RowRanges

if TYPE_CHECKING:
    import scipy.sparse

UIntArray = npt.NDArray[np.uint64]
Keys = npt.NDArray[np.signedinteger[Any]]
# Rounds of the Feistel network: each mixes one half of the position into the other.
ROUNDS = 6
POSITIONS_A_CHUNK = 2**20
KEYS_A_CHUNK = 2**18
# Positions walked together: what they need stays in a core's second-level cache.
WALKED_AT_ONCE = 2**14


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
        if self.avoiding is not None:
            return super()._degrees(shape, axis)
        if axis == "q":
            return np.full(shape[0], self.degree, np.int64)
        degrees = np.zeros(shape[1], np.int64)
        for _, keys in self._drawn(shape):
            np.add.at(degrees, keys.reshape(-1), 1)
        return degrees

    def _to_csr(self, shape: Shape) -> scipy.sparse.csr_array:
        if self.avoiding is not None:
            return super()._to_csr(shape)
        columns = np.empty(self.degree * shape[0], derive.index_type(self.degree * shape[0], shape[1]))
        for start, keys in self._drawn(shape, lambda keys: np.sort(keys.astype(columns.dtype), axis=1)):
            columns[start * self.degree : start * self.degree + keys.size] = keys.reshape(-1)
        return derive.csr_of(np.arange(shape[0] + 1, dtype=np.int64) * self.degree, columns, shape)

    def _drawn(self, shape: Shape, then: Callable[[IntArray], Keys] = np.asarray) -> Iterator[tuple[int, Keys]]:
        """The keys of all rows, a bounded number at a time: `(first row, then(keys))`, in no order within a row."""
        step = max(1, KEYS_A_CHUNK // max(self.degree, 1))

        def draw(start: int) -> tuple[int, Keys]:
            row = np.arange(start, min(start + step, shape[0]), dtype=np.int64)
            return start, then(permuted(self.seed, row, self.degree, shape[1]))

        return in_order(draw, range(0, shape[0], step))

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
    """Rows of as many different keys each, in any order; sorts `keys`."""
    keys.sort(axis=1)
    begins, ends = np.ones((2, *keys.shape), np.bool_)
    np.not_equal(keys[:, 1:], keys[:, :-1] + 1, out=begins[:, 1:])
    ends[:, :-1] = begins[:, 1:]
    indptr = np.zeros(len(keys) + 1, np.int64)
    np.cumsum(np.count_nonzero(begins, axis=1), out=indptr[1:])
    start = keys[begins]
    return RowRanges(indptr, start, keys[ends] + 1, np.ones_like(start))


def permuted(seed: int, row: IntArray, count: int, length: int) -> IntArray:
    """int64 `[len(row), count]`: the first `count` entries of each row's own permutation of `range(length)`.

    An alternating Feistel network on a grid `a × b ≥ length`; positions outside walk on until they are inside.
    """
    a = isqrt(length - 1) + 1
    b = -(-length // a)
    result = np.empty((len(row), count), np.int64)
    # Positions by rows, so that the longer run of numbers is the inner one.
    position = np.arange(count, dtype=np.uint64)[:, None]
    step = max(1, WALKED_AT_ONCE // max(count, 1))
    for start in range(0, len(row), step):
        some = row[start : start + step].astype(np.uint64)
        keys = _round_keys(seed, some)
        walked = _walk(np.broadcast_to(position, (count, len(some))), keys, a, b)
        outside = np.nonzero(walked >= length)
        while len(outside[0]):
            again = _walk(walked[outside], [key[outside[1]] for key in keys], a, b)
            walked[outside] = again
            still = again >= length
            outside = (outside[0][still], outside[1][still])
        result[start : start + step] = walked.T
    return result


def _round_keys(seed: int, row: UIntArray) -> list[UIntArray]:
    """What each round mixes into the positions of each row."""
    with np.errstate(over="ignore"):
        word = _seed_word(seed)
        return [_mix(_mix(word + np.uint64(i)) ^ row) for i in range(ROUNDS)]


def _walk(position: UIntArray, keys: list[UIntArray], a: int, b: int) -> UIntArray:
    columns = np.uint64(b)
    x = position // columns
    y = position - x * columns
    with np.errstate(over="ignore"):
        for i, key in enumerate(keys):
            moved, other, size = (x, y, np.uint64(a)) if i % 2 == 0 else (y, x, columns)
            mixed = _mix(other ^ key)
            # The remainder by a product: numpy divides by one number much faster than it takes remainders.
            mixed -= mixed // size * size
            moved += mixed
            # Below twice the size: what is less than the size wraps to far above it.
            np.minimum(moved, moved - size, out=moved)
    x *= columns
    x += y
    return x


def _mix(x: UIntArray | np.uint64) -> UIntArray:
    """Source: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    z: UIntArray = np.asarray(x + np.uint64(0x9E3779B97F4A7C15))
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


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
