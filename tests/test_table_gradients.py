"""Sums that programs may add to in any order, and what they amount to."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from sparsec.backends import table_gradients
from sparsec.score import ScoreMod, as_score_mod, chain, edge_bias, relative_bias


def _added(sums: torch.Tensor, entry: int, number: float) -> None:
    """What a kernel does with a term, in Python's integers."""
    bits = int(np.float32(number).view(np.uint32))
    exponent, sign = bits >> 23 & 255, -1 if bits >> 31 else 1
    if exponent == 255:
        is_nan = math.isnan(number)
        sums[entry, -1] += (1 << 32) + 1 if is_nan else 1 << 32 if sign < 0 else 1
        return
    place = max(exponent, 1) - 1
    wide = (bits & 0x7FFFFF | (0x800000 if exponent else 0)) << place % table_gradients.DIGIT_BITS
    digit = place // table_gradients.DIGIT_BITS
    sums[entry, digit] += sign * (wide & (1 << table_gradients.DIGIT_BITS) - 1)
    sums[entry, digit + 1] += sign * (wide >> table_gradients.DIGIT_BITS)


TERMS = (
    [1.0],
    [-1.5, 0.25],
    [3e38, 1e-45, -3e38],  # what is left is the smallest number there is
    [1e-45] * 3,
    [0.1] * 1000,
    [1e30, 1.0, -1e30],
    [math.inf, 1.0],
    [-math.inf, 1e38],
    [math.inf, -math.inf],
    [math.nan],
    [],
)


def test_sums_are_exact_in_any_order():
    sums = torch.zeros(len(TERMS), table_gradients.WORDS, dtype=torch.int64)
    for entry, terms in enumerate(TERMS):
        for number in terms:
            _added(sums, entry, number)
    wanted = [math.fsum(map(np.float32, terms)) if all(map(math.isfinite, terms)) else sum(terms) for terms in TERMS]
    found = table_gradients.exact_totals(sums)
    np.testing.assert_array_equal(found.numpy(), np.array(wanted, np.float32))
    assert found[2] > 0


def test_random_sums_are_rounded_once():
    rng = np.random.default_rng(5)
    terms = (rng.standard_normal((20, 50)) * 10.0 ** rng.integers(-20, 20, (20, 50))).astype(np.float32)
    sums = torch.zeros(20, table_gradients.WORDS, dtype=torch.int64)
    for entry, each in itertools.product(range(20), range(50)):
        _added(sums, entry, float(terms[entry, each]))
    wanted = [np.float32(math.fsum(row.astype(float))) for row in terms]
    np.testing.assert_array_equal(table_gradients.exact_totals(sums).numpy(), wanted)


def _edges(*shape: int) -> ScoreMod:
    return edge_bias(torch.zeros(*shape, requires_grad=True))


def test_what_has_an_entry_for_each_edge_is_told_from_the_rest():
    table = torch.zeros(9, requires_grad=True)
    shared = as_score_mod(lambda score, b, h, q, kv: score + table[h] * table[q])
    score = chain(_edges(2, 9), shared, relative_bias(torch.zeros(5, requires_grad=True)))
    assert table_gradients.sum_types(score) == ("float32", "int64", "int64")


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (4,), (3, 10), (2, 2, 7), (1, 5, 3)])
def test_edges_that_share_an_entry_are_added_up(shape):
    """A look-up beyond the end of a table is one of its last entry."""
    sums = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradient = torch.ones(shape, dtype=torch.float64)
    table_gradients.add_sums(_edges(*shape), [sums], [gradient])
    wanted = np.ones(shape)
    for b, h, edge in np.ndindex(2, 3, 7):
        place = tuple(min(i, n - 1) for i, n in zip((b, h, edge)[3 - len(shape) :], shape, strict=True))
        wanted[place] += float(sums[b, h, edge])
    np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-12)
