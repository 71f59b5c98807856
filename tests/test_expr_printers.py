"""Printed code means what `evaluate` means: C++ and CUDA compiled by g++, Triton on a numpy stand-in that truncates."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparsec.expr import (
    CPP,
    CUDA,
    CUDA_FUNCTIONS,
    TRITON,
    TRITON_FUNCTIONS,
    Captured,
    Const,
    Cpp,
    Dialect,
    Expr,
    Table,
    Var,
    apply,
)

q, kv, h, score = (Var(name) for name in ("q_idx", "kv_idx", "h", "score"))
DOC = Captured(np.array([0, 0, 1, 1, 1, 4, 4, 7], np.int32), "doc")
BIAS = Captured(np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "bias")
ALLOWED = Captured(np.array([True, False, True, True]), "allowed")
d = q - kv


def doc(index: Expr) -> Table:
    return Table(DOC, (index,))


EXPRS: list[Expr] = [
    q >= kv,
    (d <= 3) & ~(q < 2) | doc(q).eq(doc(kv)),
    d // 3,
    d % 3,
    d // 4,
    d % 4,
    d // -3,
    d % -4,
    d // (kv * 2 - 5),
    d % (kv * 2 - 5),
    q // 3 + q % 5,
    (d * 2 - 1) * 3 - (q - (kv - 1)),
    apply("neg", -d) - d * 2,
    abs(d),
    apply("min", q, kv) + apply("max", d, -1),
    apply("where", d > 0, q, -kv) + 1,
    apply("where", (d > 0).eq(q > 3), 1, apply("where", q > 4, 2, 3)) * 2,
    (q ^ kv) & 5 | ~(q & 3),
    (q < 3) ^ (kv < 3),
    ~((q < 3) ^ (kv > 1)),
    apply("shl", q, 2) + apply("shr", d, 1),
    doc(d),
    doc(q * 3),
    Table(ALLOWED, (kv % 4,)) & (q > 1),
    apply("to_int", q > kv) + apply("to_int", score * 2.5),
    apply("to_bool", d) & apply("to_bool", kv),
    (d * d).eq(4) | (d * d + d).eq(2),
    score + Table(BIAS, (h, d)) * d,
    apply("tanh", score / 20) * 20,
    apply("exp", -abs(score))
    + apply("exp2", score)
    - apply("log", score * score + 1) * apply("log2", score * score + 2),
    apply("sigmoid", score) + apply("sin", score) * apply("cos", d * 0.5),
    apply("sqrt", abs(score)) + apply("rsqrt", abs(score) + 1) + apply("pow", abs(score) + 0.5, 1.7),
    apply("floor", score * 3) + apply("floordiv", score, 0.75) + apply("mod", score, 0.75),
    apply("max", apply("min", score, 0.5), -0.25) + 1e-8 + 3e10 * 0.0,
    apply("where", q >= kv, score, Const(-float("inf"))),
]
EXPRS += [expr.simplify() for expr in EXPRS]
POINTS = list(itertools.product(range(8), range(6), range(2), (-1.3, 0.2, 2.6)))
TABLES = {DOC: "doc", BIAS: "bias", ALLOWED: "allowed"}


def expected(exprs: list[Expr]) -> np.ndarray:
    columns = dict(zip(("q_idx", "kv_idx", "h", "score"), map(np.array, zip(*POINTS, strict=True)), strict=True))
    columns["score"] = columns["score"].astype(np.float32)
    return np.stack([np.broadcast_to(expr.evaluate(**columns), len(POINTS)).astype(np.float64) for expr in exprs])


def check(got: np.ndarray, exprs: list[Expr] = EXPRS) -> None:
    for expr, have, want in zip(exprs, got, expected(exprs), strict=True):
        np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-5, err_msg=str(expr))


# Integer divisions by zero, which a CPU traps unless the printer keeps them from it.
BY_ZERO: list[Expr] = [q // kv, d % kv, (d + 1) // (kv - 2) + q % d]
CPP_FUNCTIONS = """\
template <class A, class B> auto sx_min(A a, B b) { return b < a ? b : a; }
template <class A, class B> auto sx_max(A a, B b) { return a < b ? b : a; }
template <class A, class B> auto sx_where(bool c, A a, B b) { return c ? a : b; }
template <class A, class B> A sx_floordiv(A a, B b) {
  if constexpr (std::is_same_v<A, float>) return std::floor(a / b);
  else return a / b - ((a % b != 0) && ((a < 0) != (b < 0)));
}
template <class A, class B> A sx_mod(A a, B b) {
  if constexpr (std::is_same_v<A, float>) return a - std::floor(a / b) * b;
  else return (a % b + b) % b;
}
inline int sx_abs(int x) { return std::abs(x); }
inline float sx_abs(float x) { return std::abs(x); }
inline float sx_floor(float x) { return std::floor(x); }
inline float sx_exp(float x) { return std::exp(x); }
inline float sx_exp2(float x) { return std::exp2(x); }
inline float sx_log(float x) { return std::log(x); }
inline float sx_log2(float x) { return std::log2(x); }
inline float sx_sqrt(float x) { return std::sqrt(x); }
inline float sx_rsqrt(float x) { return 1 / std::sqrt(x); }
inline float sx_sin(float x) { return std::sin(x); }
inline float sx_cos(float x) { return std::cos(x); }
inline float sx_tanh(float x) { return std::tanh(x); }
inline float sx_sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
inline float sx_pow(float x, float y) { return std::pow(x, y); }
template <class A> int sx_to_int(A a) { return static_cast<int>(a); }
template <class A> float sx_to_float(A a) { return static_cast<float>(a); }
template <class A> bool sx_to_bool(A a) { return a != 0; }
template <class T> T sx_load(const T* p, int i) { return p[i]; }
inline int sx_wrap_index(int i, int n) { return i < 0 ? i + n : i; }
inline int sx_clamp_index(int i, int n) { return std::min(std::max(i, 0), n - 1); }
"""
CUDA_STAND_INS = """\
#define __device__
#define __forceinline__ inline
using std::min;
using std::max;
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
"""


def program(dialect: Dialect, functions: str, exprs: list[Expr]) -> str:
    code = dialect.code(exprs, {"q_idx": "q", "kv_idx": "k", "score": "s"}, TABLES, {"q_idx": (0, 7), "kv_idx": (0, 5)})
    arrays = {
        f"{kind} {name}": captured.array.reshape(-1).astype(float).tolist()
        for kind, (captured, name) in zip(("int", "float", "bool"), TABLES.items(), strict=True)
    }
    tables = "".join(
        f"static const {head}[] = {{{', '.join(f'({head.split()[0]}){value!r}' for value in values)}}};\n"
        for head, values in arrays.items()
    )
    prints = (f'std::printf("%.9g\\n", (double)({result}));' for result in code.results)
    body = "\n".join([*code.statements, *prints])
    loop = "for (int q = 0; q < 8; ++q) for (int k = 0; k < 6; ++k) for (int h = 0; h < 2; ++h) for (float s : scores)"
    return (
        "#include <algorithm>\n#include <cmath>\n#include <cstdio>\n#include <cstdlib>\n#include <type_traits>\n"
        f"{functions}\n{tables}\nint main() {{\n"
        f"const float scores[] = {{-1.3f, 0.2f, 2.6f}};\n{loop} {{\n{body}\n}}\n}}\n"
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("name", ["cpp", "cuda"])
def test_compiled_code_means_the_same(name: str, tmp_path: Path):
    dialect, functions = (CPP, CPP_FUNCTIONS) if name == "cpp" else (CUDA, CUDA_STAND_INS + CUDA_FUNCTIONS)
    exprs = EXPRS + BY_ZERO if name == "cpp" else EXPRS
    source = tmp_path / "program.cpp"
    source.write_text(program(dialect, functions, exprs))
    flags = ["-std=c++17", "-O0", "-Wall", "-Wno-unused", "-Wno-div-by-zero"]
    subprocess.run(["g++", *flags, "-o", tmp_path / "program", source], check=True)
    output = subprocess.run([tmp_path / "program"], check=True, capture_output=True, text=True).stdout
    check(np.array(output.split(), np.float64).reshape(len(POINTS), len(exprs)).T, exprs)


class Block:
    """A block of Triton: integer `//` and `%` truncate, and pointers are added to."""

    def __init__(self, value: Any) -> None:
        self.value = np.asarray(value)
        if self.value.dtype == np.float64:
            self.value = self.value.astype(np.float32)

    def to(self, dtype: Any) -> Block:
        return Block(self.value.astype(dtype))


def _raw(value: Any) -> Any:
    return value.value if isinstance(value, Block) else value


def _truncated_division(a: Any, b: Any) -> Any:
    magnitude = np.abs(a) // np.maximum(np.abs(b), 1)
    return np.where((a < 0) != (b < 0), -magnitude, magnitude)


_OPERATORS: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "floordiv": _truncated_division,
    "mod": lambda a, b: a - _truncated_division(a, b) * b,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
    **{name: getattr(np, long) for name, long in (("lt", "less"), ("le", "less_equal"), ("gt", "greater"))},
    **{name: getattr(np, long) for name, long in (("ge", "greater_equal"), ("eq", "equal"), ("ne", "not_equal"))},
}
for _name, _function in _OPERATORS.items():
    setattr(Block, f"__{_name}__", lambda self, other, f=_function: Block(f(self.value, _raw(other))))
    setattr(Block, f"__r{_name}__", lambda self, other, f=_function: Block(f(_raw(other), self.value)))
Block.__invert__ = lambda self: Block(~self.value)  # type: ignore[attr-defined]
Block.__neg__ = lambda self: Block(-self.value)  # type: ignore[attr-defined]


class Pointer:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array.reshape(-1)

    def __add__(self, index: Any) -> tuple[np.ndarray, Any]:
        return self.array, _raw(index)


def _load(address: tuple[np.ndarray, Any]) -> Block:
    array, index = address
    assert ((index >= 0) & (index < array.size)).all()
    return Block(array.astype(np.int8)[index] if array.dtype == np.bool_ else array[index])


def _blockwise(function: Any) -> Any:
    return lambda *args: Block(function(*(_raw(arg) for arg in args)))


def test_triton_text_means_the_same():
    names = ("minimum", "maximum", "where", "abs", "floor", "exp", "exp2", "log", "log2", "sqrt", "sin", "cos")
    tl = SimpleNamespace(
        **{name: _blockwise(getattr(np, name)) for name in names},
        rsqrt=_blockwise(lambda x: 1 / np.sqrt(x)),
        sigmoid=_blockwise(lambda x: 1 / (1 + np.exp(-x))),
        load=_load,
        float32=np.float32,
        int32=np.int64,
    )
    code = TRITON.code(EXPRS, {"q_idx": "q", "kv_idx": "k"}, TABLES, {"q_idx": (0, 7), "kv_idx": (0, 5)})
    columns = [Block(np.array(column)) for column in zip(*POINTS, strict=True)]
    scope: dict[str, Any] = dict(zip(("q", "k", "h", "score"), columns, strict=True))
    scope |= {
        "sx_tanh": _blockwise(np.tanh),
        "tl": tl,
        **{name: Pointer(captured.array) for captured, name in TABLES.items()},
    }
    with np.errstate(all="ignore"):
        exec("\n".join(code.statements), scope)
        results = [np.broadcast_to(_raw(eval(result, scope)), len(POINTS)) for result in code.results]
    check(np.stack([result.astype(np.float64) for result in results]))


def test_triton_tanh_is_exact_to_a_share_of_itself():
    """However small: a soft cap multiplies what is lost by the cap, and scores are small beside it."""
    scope: dict[str, Any] = {"triton": SimpleNamespace(jit=lambda function: function), "tl": np}
    exec(TRITON_FUNCTIONS, scope)
    positive = np.logspace(-30, 2, 20_000, dtype=np.float32)
    x = np.concatenate([-positive, positive])
    with np.errstate(over="ignore", invalid="ignore"):
        got = scope["sx_tanh"](x)
        assert got.dtype == np.float32
        assert np.abs(got / np.tanh(x.astype(np.float64)) - 1.0).max() < 2e-7
        extremes = np.array([0.0, np.nan, np.inf, -np.inf], np.float32)
        np.testing.assert_array_equal(scope["sx_tanh"](extremes), [0.0, np.nan, 1.0, -1.0])


def test_shared_subexpressions_are_bound_once():
    shared = doc(q) * 2 + kv
    code = CPP.code([(shared > 3) & (shared < 9), shared])
    assert code.statements == ("const auto t0 = sx_load(doc, sx_clamp_index(q_idx, 8)) * 2 + kv_idx;",)
    assert code.results == ("(t0 > 3) & (t0 < 9)", "t0")
    assert CPP.inline((d > 3) & (d < 9)) == "(q_idx - kv_idx > 3) & (q_idx - kv_idx < 9)"


def test_divisions_and_lookups_are_plain_where_ranges_allow():
    assert CPP.inline(q // 3 + kv % 7) == "q_idx / 3 + kv_idx % 7"
    assert CPP.inline(d % 3) == "sx_mod(q_idx - kv_idx, 3)"
    assert CPP.inline(d % 8) == "((q_idx - kv_idx) & 7)"
    assert CUDA.inline(doc(q), {"q_idx": "q"}, {DOC: "ids"}, {"q_idx": (0, 7)}) == "ids[q]"
    assert TRITON.inline(d // 16) == "((q_idx - kv_idx) >> 4)"


def test_every_cpp_function_is_declared():
    text = " ".join(CPP.code(EXPRS).statements + CPP.code(EXPRS).results)
    used = {word.split("(")[0] for word in text.replace("(", "( ").split() if "sx_" in word}
    assert {word[word.index("sx_") :].rstrip("(") for word in used} <= set(Cpp.functions)
