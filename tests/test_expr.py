"""Expressions: structure, evaluation, normal form, bounds, derivatives."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import MaskError
from sparsec.expr import Captured, Const, Expr, Table, Var, apply, depends_on_offset_only, linear_form, needs_int64
from sparsec.expr.bounds import all_bounds
from sparsec.expr.parse import parse_expr

q, kv, h, score = (Var(name) for name in ("q_idx", "kv_idx", "h", "score"))
DOC = Captured(np.array([0, 0, 1, 1, 1, 4, 4, 7, 7, 9]), "doc")
SLOPES = Captured(np.array([[0.5, 0.25, 3.0], [-1.0, 2.0, 0.125]], np.float32), "slopes")
FLAGS = Captured(np.array([True, False, True]), "flags")


def doc(index: Expr) -> Table:
    return Table(DOC, (index,))


# Random expressions of each kind, of bounded depth.

_INT_LEAVES = st.sampled_from([q, kv, h]) | st.integers(-9, 9).map(Const)


def _ints(children: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    positive = st.integers(1, 7).map(Const)
    return st.one_of(
        st.builds(apply, st.sampled_from(["add", "sub", "mul", "min", "max", "and", "or", "xor"]), children, children),
        st.builds(apply, st.sampled_from(["floordiv", "mod"]), children, positive | st.integers(-5, -1).map(Const)),
        st.builds(apply, st.sampled_from(["floordiv", "mod"]), children, children.filter(lambda e: e != Const(0))),
        st.builds(apply, st.sampled_from(["neg", "abs", "not"]), children),
        st.builds(apply, st.sampled_from(["shl", "shr"]), children, st.integers(0, 3).map(Const)),
        st.builds(doc, children),
    )


INTS = st.recursive(_INT_LEAVES, _ints, max_leaves=8)
BOOLS = st.recursive(
    st.builds(apply, st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), INTS, INTS)
    | st.builds(lambda i: Table(FLAGS, (i,)), INTS),
    lambda children: st.one_of(
        st.builds(apply, st.sampled_from(["and", "or", "xor", "eq", "ne"]), children, children),
        st.builds(apply, st.just("not"), children),
        st.builds(apply, st.just("where"), children, children, children),
    ),
    max_leaves=5,
)
FLOATS = st.recursive(
    st.just(score)
    | st.floats(-4, 4, width=16).map(Const)
    | st.builds(lambda a, b: Table(SLOPES, (a, b)), _INT_LEAVES, _INT_LEAVES)
    | INTS.map(lambda e: apply("to_float", e)),
    lambda children: st.one_of(
        st.builds(apply, st.sampled_from(["add", "sub", "mul", "min", "max", "div"]), children, children),
        st.builds(
            apply,
            st.sampled_from(["neg", "abs", "tanh", "sigmoid", "sin", "cos", "exp", "log", "sqrt", "floor"]),
            children,
        ),
        st.builds(apply, st.just("where"), BOOLS, children, children),
    ),
    max_leaves=6,
)
INPUTS = {
    "q_idx": np.arange(0, 12)[:, None, None],
    "kv_idx": np.arange(0, 11)[None, :, None],
    "h": np.arange(0, 3),
    "score": np.float32(0.75),
}


def test_structure():
    assert (q - kv <= 255) == (q - kv <= 255)
    assert hash(q - kv) == hash(q - kv)
    assert q - kv != kv - q
    assert len({Const(1), Const(1.0), Const(True), Const(0.0), Const(-0.0)}) == 5
    assert str((q - kv <= 255) & ~(q < 5) | doc(q).eq(doc(kv))) == (
        "(q_idx - kv_idx <= 255) & ~(q_idx < 5) | (doc[q_idx] == doc[kv_idx])"
    )
    assert str(q - (kv - 1)) == "q_idx - (kv_idx - 1)"
    assert str(apply("neg", -q)) == "-(-q_idx)"
    assert (q + h).variables() == {"q_idx", "h"}
    assert (doc(q) + doc(kv)).tables() == (DOC,)
    with pytest.raises(TypeError, match="eq"):
        (q % 2 == 0)  # noqa: B015
    with pytest.raises(TypeError, match="truth"):
        bool(q < kv)


def test_captured_arrays_are_equal_by_content_and_kept():
    array = np.array([1, 2, 3], np.int64)
    captured = Captured(array, "a")
    array[:] = 0
    assert captured.array.tolist() == [1, 2, 3]
    assert captured == Captured([1, 2, 3], "b")
    assert captured != Captured([1.0, 2, 3], "a")
    expr = Table(captured, (q,)) + 1
    assert pickle.loads(pickle.dumps(expr)) == expr
    with pytest.raises(MaskError, match="dimensions"):
        Captured(np.zeros((2, 2, 2, 2)))


def test_digest_is_the_same_in_another_process():
    program = (
        "from sparsec.expr import *; import numpy as np;"
        "print((Table(Captured(np.arange(5)), (Var('q_idx'),)).eq(Var('kv_idx')) & (Var('q_idx') >= 2)).digest)"
    )
    expr = (q >= 2) & Table(Captured(np.arange(5)), (q,)).eq(kv)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expr.digest


def test_kinds():
    assert (q / kv).kind == "float"
    assert (q + score).kind == "float"
    assert ((q < kv) + 1).kind == "int"
    assert apply("where", q, True, q < kv).kind == "bool"
    assert apply("pow", q, 2).kind == "int"
    for wrong in (lambda: score & 1, lambda: apply("pow", q, kv), lambda: doc(score), lambda: Var("x")):
        with pytest.raises(MaskError):
            wrong()


def test_evaluate_rounds_down_and_wraps_indices():
    assert (kv // 4).evaluate(kv_idx=[-5, -4, 3]).tolist() == [-2, -1, 0]
    assert (kv % 4).evaluate(kv_idx=[-5, -4, 3]).tolist() == [3, 0, 3]
    assert doc(kv).evaluate(kv_idx=[-1, 9, 10, -100]).tolist() == [9, 9, 9, 0]
    assert (score * 2).evaluate(score=np.float64(0.1)).dtype == np.float64
    with pytest.raises(MaskError, match="kv_idx"):
        (q - kv).evaluate(q_idx=1)


@settings(deadline=None, max_examples=150)
@given(BOOLS | INTS)
def test_simplify_keeps_the_value(expr: Expr):
    simple = expr.simplify()
    assert simple.kind == expr.kind
    want, got = np.broadcast_arrays(expr.evaluate(**INPUTS), simple.evaluate(**INPUTS))
    np.testing.assert_array_equal(got, want)
    assert simple.simplify() == simple


@settings(deadline=None, max_examples=100)
@given(FLOATS)
def test_simplify_keeps_float_values(expr: Expr):
    want, got = np.broadcast_arrays(expr.evaluate(**INPUTS), expr.simplify().evaluate(**INPUTS))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=100)
@given(BOOLS | INTS)
def test_text_reads_back(expr: Expr):
    tables = {"doc": DOC.array, "flags": FLAGS.array, "slopes": SLOPES.array}
    again = parse_expr(str(expr), tables)
    np.testing.assert_array_equal(again.evaluate(**INPUTS), expr.evaluate(**INPUTS))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (q >= kv, q - kv >= 0),
        (q >= kv, ~(kv > q)),
        (q < kv + 1, kv >= q),
        (2 * q - 2 * kv <= 7, q - kv <= 3),
        ((q <= kv) & True, kv >= q),
        ((q < 3) | False, q <= 2),
        ((q < 3) & (q < 3), q <= 2),
        ((q < 3) & (q >= 3), Const(False)),
        (~((q < 5) & (kv < 5)), (q >= 5) | (kv >= 5)),
        ((q % 4).eq(kv % 4), ((kv - q) % 4).eq(0)),
        (abs(kv - q) <= 5, abs(q - kv) <= 5),
        (doc(q).eq(doc(kv)), (doc(kv) - doc(q)).eq(0)),
        (apply("where", q < kv, True, False), q < kv),
        (apply("to_bool", q), q.ne(0)),
        (score * 1.0 + 0.0, score),
        ((4 * q + 8) // 4, q + 2),
        (doc(Const(2)) + 1, Const(2)),
    ],
    ids=str,
)
def test_normal_form(left: Expr, right: Expr):
    assert left.simplify() == right.simplify()


def test_linear_form():
    assert linear_form(3 * q - (kv - 2) * 2) == ({"q_idx": 3, "kv_idx": -2}, 4)
    assert linear_form(q * kv) is None
    assert linear_form(q // 2) is None
    assert linear_form(Const(3)) == ({}, 3)


def test_offset_only():
    yes = [q >= kv, abs(q - kv) <= 5, ((q - kv) % 3).eq(0), doc(q - kv) > 1, (q % 4).eq(kv % 4), Const(True), h > 2]
    no = [q > 3, doc(q).eq(doc(kv)), (q // 4).eq(kv // 4), q + kv > 5, (q >= kv) & (kv < 3)]
    assert [depends_on_offset_only(expr) for expr in yes] == [True] * len(yes)
    assert [depends_on_offset_only(expr) for expr in no] == [False] * len(no)


def test_long_chains_need_no_recursion():
    expr: Expr = q < 0
    for start in range(1000):
        expr = expr | ((q >= 3 * start) & (kv < start))
    simple = expr.simplify()
    assert simple == expr.simplify()
    assert parse_expr("|".join(f"(q_idx == {i})" for i in range(500))).evaluate(q_idx=[499, 500]).tolist() == [
        True,
        False,
    ]
    assert simple.evaluate(q_idx=10, kv_idx=0)
    assert simple.digest
    shared: Expr = q
    for _ in range(60):
        shared = shared * shared % 1000
    assert shared.size == 122
    assert 0 <= shared.evaluate(q_idx=3) < 1000


_ENDS = st.tuples(st.integers(-3, 12), st.integers(0, 6)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@settings(deadline=None, max_examples=400)
@given(BOOLS | INTS | FLOATS, st.tuples(_ENDS, _ENDS, _ENDS))
def test_bounds_hold_everywhere_in_the_box(expr: Expr, box: tuple[tuple[int, int], ...]):
    limits = dict(zip(("q_idx", "kv_idx", "h"), box, strict=True))
    limits["score"] = (-1.5, 2.0)
    axes = {name: np.arange(low, high + 1) for name, (low, high) in list(limits.items())[:3]}
    points = dict(zip(axes, np.meshgrid(*axes.values(), indexing="ij"), strict=True))
    points = {name: grid[..., None] for name, grid in points.items()}
    points["score"] = np.linspace(-1.5, 2.0, 5, dtype=np.float32)
    # Two boxes at once: bounds are vectorised.
    arrays = {name: (np.array([low, low]), np.array([high, high])) for name, (low, high) in limits.items()}
    for node, (low, high) in all_bounds((expr,), arrays).items():
        value = node.evaluate(**points)
        low, high = np.broadcast_to(low, 2)[0], np.broadcast_to(high, 2)[0]
        if node.kind == "bool":
            assert not low or value.all(), node
            assert high or not value.any(), node
        elif node.kind == "float" and low == -np.inf and high == np.inf:
            continue
        else:
            assert (value >= low).all(), (str(node), low, high, value.min())
            assert (value <= high).all(), (str(node), low, high, value.max())


@pytest.mark.parametrize(
    "expr",
    [
        (q * 1.0) % kv >= 0,
        apply("mod", apply("exp", q * 30.0), 3.0) >= 0,
        apply("sin", apply("exp", q * 30.0)) <= 1,
        apply("cos", apply("exp", q * 30.0)) <= 1,
    ],
    ids=str,
)
def test_bounds_know_what_is_no_number(expr):
    at = {"q_idx": np.arange(8)[:, None], "kv_idx": np.arange(6)}
    held = np.broadcast_to(expr.evaluate(**at), (8, 6))
    certain, possible = expr.bounds(q_idx=(0, 7), kv_idx=(0, 5))
    assert held.any()
    assert not held.all()
    assert (bool(certain), bool(possible)) == (False, True)


def test_bounds_are_tight_where_masks_need_it():
    box = {"q_idx": (np.array([0, 0, 4]), np.array([1, 3, 7])), "kv_idx": (np.array([2, 0, 0]), np.array([3, 3, 3]))}
    certain, possible = (q >= kv).bounds(**box)
    assert certain.tolist() == [False, False, True]
    assert possible.tolist() == [False, True, True]
    certain, possible = doc(q).eq(doc(kv)).bounds(**box)
    assert possible.tolist() == [False, True, True]
    assert (q // 4).eq(1).bounds(**box)[0].tolist() == [False, False, True]
    assert ((q % 8) >= 4).bounds(**box)[0].tolist() == [False, False, True]
    with pytest.raises(MaskError, match="kv_idx"):
        (q >= kv).bounds(q_idx=(0, 1))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_extremes_of_captured_arrays(n: int, m: int, data: st.DataObject):
    array = np.random.default_rng(n * 64 + m).integers(-50, 50, (n, m))
    captured = Captured(array)
    boxes = [
        sorted(data.draw(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1))))
        for size in array.shape
        for _ in "12"
    ]
    lower = [np.array([boxes[2 * d][0], boxes[2 * d + 1][0]]) for d in (0, 1)]
    upper = [np.array([boxes[2 * d][1], boxes[2 * d + 1][1]]) for d in (0, 1)]
    least, most = captured.extremes(lower, upper)
    for i in range(2):
        inside = array[lower[0][i] : upper[0][i] + 1, lower[1][i] : upper[1][i] + 1]
        assert least[i] <= inside.min()
        assert most[i] >= inside.max()
        if inside.size == 1:
            assert least[i] == most[i] == inside[0, 0]


def test_needs_int64():
    ranges = {"q_idx": (0, 2**20), "kv_idx": (0, 2**20)}
    assert not needs_int64(q * 1000 - kv, ranges)
    assert needs_int64((q * kv) % 7, ranges)


@settings(deadline=None, max_examples=150)
@given(FLOATS, st.floats(-1.4, 1.9))
def test_derivative_is_the_slope(expr: Expr, at: float):
    step = 1e-5
    points = {"q_idx": 3, "kv_idx": 2, "h": 1}
    values = expr.evaluate(score=at + step * np.arange(-2, 3), **points) * np.ones(5)
    slope = float(expr.derivative("score").evaluate(score=np.float64(at), **points))
    # Where the function bends or breaks inside the stencil the difference quotient says nothing.
    with np.errstate(invalid="ignore"):
        left, right = (values[2] - values[0]) / (2 * step), (values[4] - values[2]) / (2 * step)
    if not np.isfinite(values).all() or abs(left - right) > 1e-2 * max(1.0, abs(left)) or abs(left) > 1e4:
        return
    assert slope == pytest.approx((left + right) / 2, rel=2e-2, abs=2e-3)


def test_a_constant_branch_has_no_slope_where_the_function_around_it_is_steep():
    expr = apply("sqrt", apply("where", q > 2, 0.0, score))
    slope = expr.derivative("score")
    assert slope.evaluate(score=np.float64(4.0), q_idx=3) == 0.0
    assert slope.evaluate(score=np.float64(4.0), q_idx=1) == 0.25


def test_derivative_with_respect_to_a_table():
    slope = Table(SLOPES, (h, kv % 3))
    expr = score + slope * slope * (q - kv)
    assert expr.derivative(slope) == ((q - kv).simplify() * 1.0 * (slope + slope)).simplify() or np.allclose(
        expr.derivative(slope).evaluate(**INPUTS), (2 * slope * (q - kv)).evaluate(**INPUTS)
    )
    assert expr.derivative("score") == Const(1.0)
    assert (score * doc(q)).derivative(slope) == Const(0.0)
    with pytest.raises(MaskError, match="choose"):
        expr.derivative("q_idx")
    with pytest.raises(MaskError, match="choose"):
        expr.derivative(doc(q))


def test_derivative_of_soft_cap():
    expr = apply("tanh", score / 20) * 20
    assert str(expr.derivative("score")) == "1.0 - tanh(score / 20.0) * tanh(score / 20.0)"


@pytest.mark.parametrize(
    "text",
    [
        "kv_idx * 0.1 * 10.0 <= q_idx",
        "kv_idx * 1e30 * 1e30 <= q_idx * 1e38",
        "q_idx * (h * 0.9) >= kv_idx",
        "kv_idx * 0.3 * 4.0 <= q_idx * 1.1",
    ],
)
def test_simplifying_rounds_nothing_otherwise(text):
    # Positions compared as floats: an ulp decides which pairs are attended.
    expr = parse_expr(text)
    q, kv = np.arange(600)[:, None], np.arange(600)
    known = {"h": 3} if "h" in expr.variables() else {}
    expected = np.broadcast_to(expr.evaluate(q_idx=q, kv_idx=kv, **known), (600, 600))
    found = expr.substitute(known).simplify()
    assert np.array_equal(np.broadcast_to(found.evaluate(q_idx=q, kv_idx=kv), (600, 600)), expected)
