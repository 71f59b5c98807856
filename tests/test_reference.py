"""The oracle itself: against torch in fp64, and whether its tolerances tell right from wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import every_constructor, scattered

from sparsec import masks as m
from sparsec import score
from sparsec.backends import reference
from sparsec.backends.base import DTYPES
from sparsec.score import as_score_mod

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _inputs(q_len, kv_len, head_dim, v_dim, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) for shape in ((q_len, head_dim), (kv_len, head_dim), (kv_len, v_dim)))


def _dense(q, k, v, attended, scale):
    scores = torch.from_numpy(q @ k.T * scale).masked_fill(~torch.from_numpy(attended), -torch.inf)
    out = torch.softmax(scores, -1).nan_to_num(0.0) @ torch.from_numpy(v)
    return out.numpy(), torch.logsumexp(scores, -1).numpy()


@pytest.mark.parametrize("case", every_constructor(), ids=lambda case: case.id)
def test_it_is_dense_masked_attention(case):
    q, k, v = _inputs(case.problem.q_len, case.problem.kv_len, 16, 8)
    out, lse = reference.attention(q, k, v, case.bound, 0.25)
    wanted, wanted_lse = _dense(q, k, v, case.bound.to_dense(), 0.25)
    np.testing.assert_allclose(out, wanted, atol=1e-13)
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-13)


def test_long_masks_go_by_stretches_of_rows():
    bound = m.window(30, 7).bind(700, 650)
    q, k, v = _inputs(700, 650, 4, 3)
    out, lse = reference.attention(q, k, v, bound, 0.5)
    wanted, wanted_lse = _dense(q, k, v, bound.to_dense(), 0.5)
    np.testing.assert_allclose(out, wanted, atol=1e-13)
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-13)


@pytest.mark.parametrize("rows", [[5], [0, 1, 2], [64, 3, 3, 17], [], list(range(10, 60)) + [2]])
def test_chosen_rows(rows):
    bound = scattered(65, 67, 0.3).bind(65, 67)
    q, k, v = _inputs(65, 67, 8, 8)
    everything = reference.attention(q, k, v, bound, 1.0)
    chosen = reference.attention(q, k, v, bound, 1.0, np.array(rows, int))
    for some, every in zip(chosen, everything, strict=True):
        np.testing.assert_allclose(some, every[rows], atol=1e-14)


def test_an_empty_row_gives_zero_and_minus_infinity():
    q, k, v = _inputs(9, 7, 4, 4)
    out, lse = reference.attention(q, k, v, (~m.full()).bind(9, 7), 1.0)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_modifier_forbids_is_as_if_the_mask_had_it_not(dtype):
    """A row of which all is forbidden is empty; and a forbidden pair makes no tolerance wider."""
    modifier = reference.Modifier(
        as_score_mod(lambda s, b, h, q, kv: torch.where((q % 3 == 1) | (kv % 4 == 0), -float("inf"), s)), 0, 0
    )
    q, k, v = (reference.rounded(array, dtype) for array in _inputs(9, 12, 8, 8))
    dense = np.ones((9, 12), bool)
    dense[1::3] = dense[:, ::4] = False
    bound, remaining = m.full().bind(9, 12), m.from_dense(dense).bind(9, 12)
    found = reference.attention(q, k, v, bound, 0.3, modifier=modifier)
    for got, wanted in zip(found, reference.attention(q, k, v, remaining, 0.3), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert np.isneginf(found[1][1::3]).all()
    allowed = reference.tolerances(q, k, v, bound, 0.3, dtype, modifier)
    assert allowed == reference.tolerances(q, k, v, remaining, 0.3, dtype)
    above = np.ones((9, 8)), np.ones(9)
    allowed = reference.gradient_tolerances(q, k, v, bound, 0.3, *above, dtype, modifier)
    assert allowed == reference.gradient_tolerances(q, k, v, remaining, 0.3, *above, dtype)


def test_a_nan_that_no_row_attends_spoils_none():
    bound = m.prefix(3).bind(5, 6)
    q, k, v = _inputs(5, 6, 4, 4)
    k[4] = v[5] = np.nan
    out, lse = reference.attention(q, k, v, bound, 1.0)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


def test_large_scores_do_not_overflow():
    q, k, v = _inputs(20, 30, 8, 8)
    out, lse = reference.attention(q * 1e6, k, v, m.full().bind(20, 30), 1.0)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_that_of_torch(dtype):
    rng = np.random.default_rng(1)
    values = np.concatenate(
        [rng.standard_normal(5000) * 10.0 ** rng.integers(-4, 4, 5000), [0.0, -0.0, 1.0, 1 + 2**-8]]
    )
    values = values.astype(np.float32)
    wanted = torch.from_numpy(values).to(TORCH[dtype]).double().numpy()
    assert np.array_equal(reference.rounded(values, dtype), wanted)


def test_a_pair_without_weight_has_no_gradient_however_steep_its_modifier():
    """By the product rule of numbers 0 · inf is none; a weight of 0 is as if the mask had not the pair."""
    nothing = torch.ones(1, requires_grad=True)
    score = as_score_mod(
        lambda s, b, h, q, kv: s + torch.log(torch.clamp(s, max=9e9) - s + 1.0 - kv % 3 // 2) * nothing
    )
    q, k, v = _inputs(12, 12, 8, 8)
    above = np.random.default_rng(1).standard_normal((12, 8)), np.zeros(12)
    # A row of the window attends nothing that is left: it is empty.
    mask = (m.window(2, 0) & ~m.window(1, 0) | m.window(0, 0)).bind(12)
    remaining = m.from_dense(mask.to_dense() & (np.arange(12) % 3 != 2)).bind(12)
    d_table = [np.zeros(1)]
    found = reference.gradients(q, k, v, mask, 0.3, *above, reference.Modifier(score, 0, 0), d_table)
    for got, wanted in zip(found, reference.gradients(q, k, v, remaining, 0.3, *above), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-14)
    assert d_table[0] == 0


def test_rounding_keeps_what_is_not_finite():
    values = np.array([np.inf, -np.inf, np.nan])
    for dtype in DTYPES:
        assert np.array_equal(reference.rounded(values, dtype), values, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tolerances_tell_right_from_wrong(dtype):
    bound = scattered(65, 67, 0.3).bind(65, 67)
    q, k, v = (reference.rounded(array, dtype) for array in _inputs(65, 67, 64, 64))
    out, lse = reference.attention(q, k, v, bound, 0.125)
    allowed, allowed_lse = reference.tolerances(q, k, v, bound, 0.125, dtype)
    unit = reference.unit_roundoff(dtype)
    largest = np.abs(out).max()
    # An output that is merely rounded passes; one that is off by a few units of its dtype does not.
    assert np.abs(reference.rounded(out, dtype) - out).max() < allowed
    assert allowed < 24 * unit * largest
    assert allowed_lse < 2e-5
    # A key left out, or one too many, is far outside.
    dense = bound.to_dense()
    row = int(dense.sum(1).argmax())
    dense[row, int(dense[row].argmax())] = False
    other, other_lse = reference.attention(q, k, v, m.from_dense(dense).bind(65, 67), 0.125)
    assert np.abs(other - out).max() > allowed
    assert abs(other_lse[row] - lse[row]) > allowed_lse


class _Inexact(reference.Modifier):
    """A modifier whose scores are some units in the last place off, now up and now down."""

    def value(self, scaled, rows):
        signs = np.random.default_rng(99).choice([-1.0, 1.0], scaled.shape)
        return super().value(scaled, rows) * (1.0 + _Inexact.units * signs * 2.0**-24)


def test_tolerances_of_a_function_no_processor_rounds_correctly():
    bound = scattered(65, 67, 0.3).bind(65, 67)
    q, k, v = (reference.rounded(array, "fp32") for array in _inputs(65, 67, 64, 64))
    cap = as_score_mod(score.soft_cap(5.0))
    places = (cap, 0, 0)
    allowed = reference.tolerances(q, k, v, bound, 1.0, "fp32", reference.Modifier(*places))
    exact = reference.attention(q, k, v, bound, 1.0, modifier=reference.Modifier(*places))
    for units, is_right in ((4.0, True), (100.0, False)):
        _Inexact.units = units
        found = reference.attention(q, k, v, bound, 1.0, modifier=_Inexact(*places))
        assert (np.abs(found[0] - exact[0]).max() <= allowed[0]) == is_right
    # What only multiplies and adds is rounded as NumPy rounds it.
    assert not reference.Modifier(as_score_mod(score.alibi([1.0])), 0, 0).has_functions


def test_tolerances_of_an_empty_mask():
    q, k, v = _inputs(5, 6, 4, 4)
    allowed, allowed_lse = reference.tolerances(q, k, v, (~m.full()).bind(5, 6), 1.0, "bf16")
    assert allowed == 0.0
    assert 0.0 <= allowed_lse < 1e-5
