"""Row algebra against Python sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.masks import ranges

LENGTH = 40


@st.composite
def row_ranges(draw, n_rows=3):
    """Rows of interleaved progressions and intervals, built by hand as the contract states them."""
    rows = []
    for _ in range(n_rows):
        taken, parts = set(), []
        for _ in range(draw(st.integers(0, 4))):
            start, step = draw(st.integers(0, LENGTH - 1)), draw(st.sampled_from([1, 1, 2, 3, 4, 7]))
            keys = list(range(start, min(LENGTH, start + draw(st.integers(1, 20)) * step), step))
            if taken.isdisjoint(keys):
                taken.update(keys)
                parts.append((keys[0], keys[-1] + 1, step if len(keys) > 1 else 1))
        rows.append(sorted(parts))
    flat = np.array([part for row in rows for part in row], np.int64).reshape(-1, 3)
    indptr = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64)
    return ranges.RowRanges(indptr, flat[:, 0].copy(), flat[:, 1].copy(), flat[:, 2].copy())


def as_sets(rows):
    result = []
    for i in range(rows.n_rows):
        keys = set()
        for r in range(rows.indptr[i], rows.indptr[i + 1]):
            part = range(rows.start[r], rows.stop[r], rows.step[r])
            assert len(part) > 0
            assert part[-1] + 1 == rows.stop[r]
            assert len(part) > 1 or rows.step[r] == 1
            assert keys.isdisjoint(part)
            keys.update(part)
        starts = rows.start[rows.indptr[i] : rows.indptr[i + 1]]
        assert (np.diff(starts) > 0).all()
        result.append(keys)
    return result


@settings(max_examples=200, deadline=None)
@given(row_ranges(), row_ranges())
def test_algebra_is_that_of_sets(a, b):
    sets_a, sets_b = as_sets(a), as_sets(b)
    everything = set(range(LENGTH))
    for got, want in (
        (ranges.union(a, b), [x | y for x, y in zip(sets_a, sets_b, strict=True)]),
        (ranges.intersect(a, b), [x & y for x, y in zip(sets_a, sets_b, strict=True)]),
        (ranges.difference(a, b), [x - y for x, y in zip(sets_a, sets_b, strict=True)]),
        (ranges.complement(a, LENGTH), [everything - x for x in sets_a]),
        (ranges.shift(a, 5), [{key + 5 for key in x} for x in sets_a]),
        (ranges.clip(a, 7, 23), [{key for key in x if 7 <= key < 23} for x in sets_a]),
        (ranges.concatenate([a, b]), sets_a + sets_b),
        (ranges.take_rows(a, 1, 3), sets_a[1:]),
        (ranges.pick_rows(a, np.array([2, 0, 0])), [sets_a[2], sets_a[0], sets_a[0]]),
    ):
        assert as_sets(got) == want
    assert ranges.degrees(a).tolist() == [len(x) for x in sets_a]
    assert a.nnz == sum(map(len, sets_a))


@settings(max_examples=100, deadline=None)
@given(row_ranges())
def test_edges_and_back(rows):
    row, key = ranges.to_edges(rows)
    assert list(zip(row.tolist(), key.tolist(), strict=True)) == [
        (i, k) for i, keys in enumerate(as_sets(rows)) for k in sorted(keys)
    ]
    assert as_sets(ranges.from_edges(rows.n_rows, row, key)) == as_sets(rows)
    probe = np.arange(LENGTH)
    held = ranges.contains(rows, np.ones(LENGTH, np.int64), probe)
    assert set(probe[held].tolist()) == as_sets(rows)[1]


def test_equal_spacing_becomes_one_progression():
    key = np.array([0, 3, 6, 9, 20, 21, 22, 30])
    rows = ranges.from_edges(1, np.zeros_like(key), key)
    assert list(zip(rows.start, rows.stop, rows.step, strict=True)) == [(0, 10, 3), (20, 23, 1), (30, 31, 1)]


@pytest.mark.parametrize("low", [-(2**40), -7])
def test_negative_and_far_keys(low):
    a = ranges.RowRanges(*(np.array(x, np.int64) for x in ([0, 1], [low], [2**40], [1])))
    b = ranges.RowRanges(*(np.array(x, np.int64) for x in ([0, 1], [-3], [3], [1])))
    rest = ranges.difference(a, b)
    assert list(zip(rest.start.tolist(), rest.stop.tolist(), strict=True)) == [(low, -3), (3, 2**40)]
