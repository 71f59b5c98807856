"""Expressions as source text of C++, CUDA and Triton, and as a function on torch tensors.

Each dialect is a small class made mostly of tables. A printer is given what the variables and the captured arrays are
called in the kernel, and returns text; it must not know templates or devices. All keep the meaning `evaluate` has:
`//` and `%` round towards minus infinity, a negative index counts from the end of its array and any other index outside
it reads the nearest entry, so that a kernel may evaluate positions beyond the end of a ragged tile.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np

from sparsec.errors import MaskError
from sparsec.expr.bounds import UNKNOWN, Interval, all_bounds
from sparsec.expr.captured import Captured, is_torch_tensor
from sparsec.expr.ops import OPS, UNARY_PRECEDENCE, Kind
from sparsec.expr.tree import Apply, Const, Expr, Table, Var, postorder

_CALL = 100
_INT32_MAX = 2**31 - 1
Ranges = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Code:
    """Printed expressions.

    Attributes:
        statements: Definitions to run first, in order, one a line.
        results: The text of each expression.
    """

    statements: tuple[str, ...]
    results: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Printing:
    """What is known while one list of expressions is printed."""

    names: Mapping[str, str]
    tables: Mapping[Captured, str]
    bounds: Mapping[Expr, Interval]
    # Text and precedence of the subexpressions printed so far.
    texts: dict[Expr, tuple[str, int]] = field(default_factory=dict)

    def is_non_negative(self, expr: Expr) -> bool:
        low, high = self.bounds[expr]
        return bool((low >= 0).all() and (high < UNKNOWN).all())

    def is_inside(self, expr: Expr, size: int) -> bool:
        return self.is_non_negative(expr) and bool((self.bounds[expr][1] < size).all())

    def operand(self, expr: Expr, binds: int = 0) -> str:
        """The text of `expr` for a place that binds with precedence `binds`."""
        text, precedence = self.texts[expr]
        return text if precedence > binds else f"({text})"


def needs_int64(expr: Expr, ranges: Ranges) -> bool:
    """Whether some integer in `expr` may not fit int32.

    Args:
        expr: Any expression.
        ranges: The least and largest value of each int variable used.
    """
    return any(
        bool((low < -_INT32_MAX).any() or (high > _INT32_MAX).any())
        for node, (low, high) in all_bounds((expr,), _boxes(ranges)).items()
        if node.kind == "int"
    )


def _boxes(ranges: Ranges | None) -> dict[str, tuple[float, float]]:
    boxes: dict[str, tuple[float, float]] = dict.fromkeys(("b", "h", "q_idx", "kv_idx", "edge"), (0, _INT32_MAX))
    return {**boxes, **(ranges or {}), "score": (-math.inf, math.inf)}


class Dialect:
    """A target language. What is not in `calls` keeps Python's operator of the same name."""

    # Operation -> its spelling, where that differs from Python's operator; for one kind: (operation, kind).
    operators: ClassVar[Mapping[str, str]] = {}
    # Operation, or (operation, kind of the operands) -> function name.
    calls: ClassVar[Mapping[str | tuple[str, Kind], str]] = {}

    def code(
        self,
        exprs: Sequence[Expr],
        names: Mapping[str, str] | None = None,
        tables: Mapping[Captured, str] | None = None,
        ranges: Ranges | None = None,
        prefix: str = "t",
    ) -> Code:
        """Several expressions as text that shares what they have in common.

        Args:
            exprs: The expressions, best simplified.
            names: What each variable is called in the target; itself where left out.
            tables: What each captured array is called (a pointer to its contiguous content); its `name` where left out.
            ranges: The least and largest value of the int variables, `0 … 2**31 - 1` where left out. Tight ranges print
                plain divisions and unclamped look-ups.
            prefix: The names of shared subexpressions are this and a number.
        """
        printing = self._printing(exprs, names, tables, ranges)
        uses = Counter(arg for node in printing.bounds for arg in node.args) + Counter(exprs)
        statements: list[str] = []
        for node in printing.bounds:
            text, precedence = self._node(node, printing)
            if node.args and uses[node] > 1:
                name = f"{prefix}{len(statements)}"
                statements.append(self.definition(name, node.kind, text))
                text, precedence = name, _CALL
            printing.texts[node] = (text, precedence)
        return Code(tuple(statements), tuple(printing.texts[expr][0] for expr in exprs))

    def inline(
        self,
        expr: Expr,
        names: Mapping[str, str] | None = None,
        tables: Mapping[Captured, str] | None = None,
        ranges: Ranges | None = None,
    ) -> str:
        """One expression as one piece of text; shared subexpressions are repeated. Arguments as for `code`."""
        printing = self._printing((expr,), names, tables, ranges)
        for node in printing.bounds:
            printing.texts[node] = self._node(node, printing)
        return printing.texts[expr][0]

    def _printing(
        self,
        exprs: Sequence[Expr],
        names: Mapping[str, str] | None,
        tables: Mapping[Captured, str] | None,
        ranges: Ranges | None,
    ) -> _Printing:
        known = all_bounds(tuple(exprs), _boxes(ranges))
        return _Printing(names or {}, tables or {}, known)

    def _node(self, node: Expr, printing: _Printing) -> tuple[str, int]:
        if isinstance(node, Var):
            return printing.names.get(node.name, node.name), _CALL
        if isinstance(node, Const):
            text = self.constant(node)
            return text, UNARY_PRECEDENCE if text.startswith("-") else _CALL
        if isinstance(node, Table):
            return self._load(node, printing), _CALL
        apply_node = cast(Apply, node)
        if apply_node.op in ("floordiv", "mod"):
            return self._rounded_division(apply_node, printing)
        if apply_node.op.startswith("to_"):
            return self.cast(apply_node, printing), _CALL
        return self.operation(apply_node, printing)

    def operation(self, node: Apply, printing: _Printing) -> tuple[str, int]:
        row, kind = OPS[node.op], node.args[-1].kind
        call = self.calls.get((node.op, kind)) or self.calls.get(node.op)
        if call:
            return f"{call}({', '.join(printing.operand(arg) for arg in node.args)})", _CALL
        symbol = self.operators.get(node.op, row.symbol)
        if node.op == "not" and kind == "bool":
            symbol = self.operators.get("logical_not", symbol)
        if not symbol:
            raise MaskError(
                f"{type(self).__name__} has no {node.op} for {kind}, used in {node}; rewrite the expression."
            )
        binds = row.precedence
        if row.arity == 1:
            # The operand of a sign is bracketed when it is signed itself: `- -x`.
            return f"{symbol}{printing.operand(node.args[0], binds)}", binds
        left, right = node.args
        left_binds = binds if row.signature == "comparison" else binds - 1
        return f"{printing.operand(left, left_binds)} {symbol} {printing.operand(right, binds)}", binds

    def _rounded_division(self, node: Apply, printing: _Printing) -> tuple[str, int]:
        """`//` and `%`, as shifts and masks by a power of two, plainly where the dividend is not negative."""
        a, b = node.args
        if node.kind == "int" and isinstance(b, Const) and b.value > 0:
            divisor = int(b.value)
            if divisor & (divisor - 1) == 0:
                op, right = ("shr", divisor.bit_length() - 1) if node.op == "floordiv" else ("and", divisor - 1)
                return f"({printing.operand(a, _CALL - 1)} {OPS[op].symbol} {right})", _CALL
            if printing.is_non_negative(a):
                binds, symbol = OPS["mul"].precedence, self.operators.get(node.op, OPS[node.op].symbol)
                return f"{printing.operand(a, binds - 1)} {symbol} {divisor}", binds
        return self.floor_division(node, printing), _CALL

    def _load(self, node: Table, printing: _Printing) -> str:
        name = printing.tables.get(node.captured, node.captured.name)
        linear = ""
        for index, size in zip(node.args, node.captured.shape, strict=True):
            text = self.index(index, size, printing)
            linear = f"({linear}) * {size} + {text}" if linear else text
        return self.load(name, linear, node)

    def index(self, index: Expr, size: int, printing: _Printing) -> str:
        """`index` brought into `0 … size - 1`, plainly where it is known to be there."""
        text = printing.operand(index, OPS["mul"].precedence)
        if printing.is_inside(index, size):
            return text
        if not printing.is_non_negative(index):
            text = self.wrap_index(text, size)
        return self.clamp_index(text, size)

    # What every dialect defines.

    def definition(self, name: str, kind: Kind, text: str) -> str:
        raise NotImplementedError

    def constant(self, node: Const) -> str:
        raise NotImplementedError

    def cast(self, node: Apply, printing: _Printing) -> str:
        raise NotImplementedError

    def floor_division(self, node: Apply, printing: _Printing) -> str:
        raise NotImplementedError

    def load(self, name: str, index: str, node: Table) -> str:
        raise NotImplementedError

    def wrap_index(self, index: str, size: int) -> str:
        raise NotImplementedError

    def clamp_index(self, index: str, size: int) -> str:
        raise NotImplementedError


_ELEMENTARY = ("floor", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos")


class _CLike(Dialect):
    """What C++ and CUDA share: operators, their precedences, constants and definitions."""

    operators: ClassVar[Mapping[str, str]] = {"logical_not": "!", "floordiv": "/", "mod": "%"}
    # `& ^ |` bind less than comparisons in C; their operands and those of shifts are bracketed whatever they are.
    _bracketed: ClassVar[Mapping[str, int]] = {"and": 3, "xor": 3, "or": 3, "shl": 5, "shr": 5}

    def operation(self, node: Apply, printing: _Printing) -> tuple[str, int]:
        if node.op not in self._bracketed:
            return super().operation(node, printing)
        left, right = node.args
        chains = isinstance(left, Apply) and left.op == node.op
        left_text = printing.texts[left][0] if chains else printing.operand(left, _CALL - 1)
        return f"{left_text} {OPS[node.op].symbol} {printing.operand(right, _CALL - 1)}", self._bracketed[node.op]

    def definition(self, name: str, kind: Kind, text: str) -> str:
        return f"const auto {name} = {text};"

    def constant(self, node: Const) -> str:
        value = node.value
        if node.kind == "bool":
            return "true" if value else "false"
        if node.kind == "int":
            return str(value) if abs(value) <= _INT32_MAX else f"{value}ll"
        if math.isnan(value):
            return '__builtin_nanf("")'
        if math.isinf(value):
            return "-__builtin_huge_valf()" if value < 0 else "__builtin_huge_valf()"
        return _float_text(float(value)) + "f"


def _float_text(value: float) -> str:
    """The shortest decimal text that reads back as the same fp32."""
    text = str(np.float32(value))
    return text if any(mark in text for mark in ".en") else text + ".0"


class Cpp(_CLike):
    """C++, of scalars or of GCC vector types: operators, and functions `sx_*` that a header overloads for both.

    The functions are those in `functions`: among them `sx_where(condition, a, b)`, `sx_floordiv` and `sx_mod` (rounded
    down, for int and float), `sx_to_int`, `sx_to_float` and `sx_to_bool` (a vector of bools holds 0 and -1),
    `sx_load(pointer, index)`, `sx_clamp_index(index, size)` and `sx_wrap_index(index, size)`.
    """

    calls: ClassVar[Mapping[str | tuple[str, Kind], str]] = {
        name: f"sx_{name}" for name in (*_ELEMENTARY, "min", "max", "abs", "tanh", "sigmoid", "pow", "where")
    }
    functions: ClassVar[tuple[str, ...]] = (
        *calls.values(),
        *(f"sx_{name}" for name in ("floordiv", "mod", "to_int", "to_float", "to_bool")),
        *(f"sx_{name}" for name in ("load", "clamp_index", "wrap_index")),
    )

    def cast(self, node: Apply, printing: _Printing) -> str:
        return f"sx_{node.op}({printing.operand(node.args[0])})"

    def floor_division(self, node: Apply, printing: _Printing) -> str:
        left, right = (printing.operand(arg) for arg in node.args)
        low, high = printing.bounds[node.args[1]]
        if node.kind == "float" or bool(((low > 0) | (high < 0)).all()):
            return f"sx_{node.op}({left}, {right})"
        # A processor traps where an integer is divided by zero; here, as in numpy, it is 0.
        is_zero = f"{printing.operand(node.args[1], OPS['eq'].precedence)} == 0"
        return f"sx_where({is_zero}, 0, sx_{node.op}({left}, sx_where({is_zero}, 1, {right})))"

    def load(self, name: str, index: str, node: Table) -> str:
        return f"sx_load({name}, {index})"

    def wrap_index(self, index: str, size: int) -> str:
        return f"sx_wrap_index({index}, {size})"

    def clamp_index(self, index: str, size: int) -> str:
        return f"sx_clamp_index({index}, {size})"


CUDA_FUNCTIONS = """\
template <class T> __device__ __forceinline__ T sx_floordiv(T a, T b) {
  T quotient = a / b;
  return quotient - ((a % b != 0) && ((a < 0) != (b < 0)));
}
template <class T> __device__ __forceinline__ T sx_mod(T a, T b) {
  T remainder = a % b;
  return remainder + ((remainder != 0 && ((remainder < 0) != (b < 0))) ? b : T(0));
}
template <> __device__ __forceinline__ float sx_floordiv(float a, float b) { return floorf(a / b); }
template <> __device__ __forceinline__ float sx_mod(float a, float b) {
  float remainder = fmodf(a, b);
  return remainder + ((remainder != 0.0f && ((remainder < 0.0f) != (b < 0.0f))) ? b : 0.0f);
}
__device__ __forceinline__ float sx_sigmoid(float x) {
  float small = expf(-fabsf(x));
  return (x >= 0.0f ? 1.0f : small) / (1.0f + small);
}
template <class T> __device__ __forceinline__ T sx_wrap_index(T index, int size) {
  return index < 0 ? index + size : index;
}
template <class T> __device__ __forceinline__ T sx_clamp_index(T index, int size) {
  return index < 0 ? T(0) : index < size ? index : T(size - 1);
}
"""
"""Device functions that printed CUDA may call; a kernel includes them once, before the printed code."""


class Cuda(_CLike):
    """CUDA C++ of scalars, for NVRTC; may call what `CUDA_FUNCTIONS` defines."""

    calls: ClassVar[Mapping[str | tuple[str, Kind], str]] = {
        ("min", "int"): "min",
        ("max", "int"): "max",
        ("abs", "int"): "abs",
        ("min", "float"): "fminf",
        ("max", "float"): "fmaxf",
        ("abs", "float"): "fabsf",
        "sigmoid": "sx_sigmoid",
        "pow": "powf",
        "tanh": "tanhf",
        **{name: f"{name}f" for name in _ELEMENTARY},
    }
    _types: ClassVar[Mapping[Kind, str]] = {"bool": "bool", "int": "int", "float": "float"}

    def operation(self, node: Apply, printing: _Printing) -> tuple[str, int]:
        if node.op == "where":
            condition, a, b = (printing.operand(arg, 2) for arg in node.args)
            return f"{condition} ? {a} : {b}", 1
        return super().operation(node, printing)

    def cast(self, node: Apply, printing: _Printing) -> str:
        return f"static_cast<{self._types[node.kind]}>({printing.operand(node.args[0])})"

    def floor_division(self, node: Apply, printing: _Printing) -> str:
        left, right = (printing.operand(arg) for arg in node.args)
        # Both operands in the type of their sum, which is wide enough for either.
        return f"sx_{node.op}<decltype(({left}) + ({right}))>({left}, {right})"

    def load(self, name: str, index: str, node: Table) -> str:
        return f"{name}[{index}]"

    def wrap_index(self, index: str, size: int) -> str:
        return f"sx_wrap_index({index}, {size})"

    def clamp_index(self, index: str, size: int) -> str:
        return f"sx_clamp_index({index}, {size})"


TRITON_FUNCTIONS = '''\
@triton.jit
def sx_tanh(x):
    """x + x³ · P(x²) where |x| < 0.625, and 1 - 2 / (e^2|x| + 1) with the sign of x beyond: to 1.5e-7 of itself."""
    z = x * x
    p = (((-5.71702141e-3 * z + 2.06505638e-2) * z - 5.37434891e-2) * z + 0.133314908) * z - 0.333332837
    # An overflow is an infinity, and the quotient 0; NaN goes through.
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * (z * p), tl.where(x < 0.0, -far, far))
'''
"""Functions that printed Triton may call; a module includes them once, before the printed code.

`tl` has no tanh, and libdevice's is missing in the interpreter. P is a least-squares fit driven to minimax, to 4e-9.
(2 · sigmoid(2x) - 1 is wrong by a rounding unit of 1 for small x too, which a soft cap multiplies by the cap.)
"""


class Triton(Dialect):
    """Triton, of blocks: needs `tl` (`triton.language`); may call what `TRITON_FUNCTIONS` defines."""

    operators: ClassVar[Mapping[str, str]] = {"logical_not": "~"}
    calls: ClassVar[Mapping[str | tuple[str, Kind], str]] = {
        "min": "tl.minimum",
        "max": "tl.maximum",
        "where": "tl.where",
        "sigmoid": "tl.sigmoid",
        "tanh": "sx_tanh",
        "abs": "tl.abs",
        **{name: f"tl.{name}" for name in _ELEMENTARY},
    }

    def definition(self, name: str, kind: Kind, text: str) -> str:
        return f"{name} = {text}"

    def constant(self, node: Const) -> str:
        value = node.value
        if node.kind != "float":
            return str(value)
        return f'float("{value}")' if not math.isfinite(value) else _float_text(float(value))

    def operation(self, node: Apply, printing: _Printing) -> tuple[str, int]:
        if node.op == "pow":
            # The exponent is not a whole number, so a negative base gives nan, as it does here.
            base, exponent = printing.operand(node.args[0]), printing.operand(node.args[1])
            return f"tl.exp2({exponent} * tl.log2({base}))", _CALL
        return super().operation(node, printing)

    def cast(self, node: Apply, printing: _Printing) -> str:
        (a,) = node.args
        if node.kind == "bool":
            return f"({printing.operand(a, 6)} != 0)"
        width = "tl.float32" if node.kind == "float" else "tl.int32"
        return f"{printing.operand(a, _CALL - 1)}.to({width})"

    def floor_division(self, node: Apply, printing: _Printing) -> str:
        a, b = (printing.operand(arg, OPS["mul"].precedence) for arg in node.args)
        if node.kind == "float":
            quotient = f"tl.floor({a} / {b})"
            return quotient if node.op == "floordiv" else f"({a} - {quotient} * {b})"
        # `//` and `%` of blocks truncate.
        if isinstance(node.args[1], Const) and node.args[1].value > 0:
            remainder = f"(({a} % {b} + {b}) % {b})"
            return remainder if node.op == "mod" else f"(({a} - {remainder}) // {b})"
        is_off = f"(({a} % {b} != 0) & (({a} < 0) != ({b} < 0)))"
        if node.op == "floordiv":
            return f"({a} // {b} - {is_off}.to(tl.int32))"
        return f"({a} % {b} + tl.where({is_off}, {b}, 0))"

    def load(self, name: str, index: str, node: Table) -> str:
        text = f"tl.load({name} + ({index}))"
        # A bool array arrives as bytes.
        return f"({text} != 0)" if node.kind == "bool" else text

    def wrap_index(self, index: str, size: int) -> str:
        return f"tl.where({index} < 0, {index} + {size}, {index})"

    def clamp_index(self, index: str, size: int) -> str:
        return f"tl.minimum(tl.maximum({index}, 0), {size - 1})"


CPP, CUDA, TRITON = Cpp(), Cuda(), Triton()


def torch_function(expr: Expr) -> Callable[..., Any]:  # Any: torch is not imported here
    """`expr` as a differentiable function of torch tensors, called with keywords: `f(score=…, q_idx=…, kv_idx=…)`.

    Captured tensors that require a gradient receive one.
    """
    import torch

    calls: dict[str, Callable[..., Any]] = {
        **{
            name: getattr(torch, name)
            for name in ("add", "sub", "mul", "where", "abs", "neg", "floor", "exp", "exp2", "log")
        },
        **{name: getattr(torch, name) for name in ("log2", "tanh", "sqrt", "rsqrt", "sigmoid", "sin", "cos", "pow")},
        **{name: getattr(torch, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
        "div": torch.true_divide,
        "floordiv": torch.floor_divide,
        "mod": torch.remainder,
        "min": torch.minimum,
        "max": torch.maximum,
        "and": torch.bitwise_and,
        "or": torch.bitwise_or,
        "xor": torch.bitwise_xor,
        "not": torch.bitwise_not,
        "shl": torch.bitwise_left_shift,
        "shr": torch.bitwise_right_shift,
    }
    tensors: dict[Captured, Any] = {
        captured: cast(Any, captured.original).reshape(captured.shape)
        if captured.is_live
        else torch.from_numpy(captured.array.copy())
        for captured in expr.tables()
    }
    order = tuple(postorder((expr,)))

    def function(**inputs: Any) -> Any:  # tensors
        score = inputs.get("score")
        device = next((x.device for x in inputs.values() if isinstance(x, torch.Tensor)), None)
        dtypes = {"bool": torch.bool, "int": torch.int64, "float": torch.float32 if score is None else score.dtype}
        values: dict[Expr, Any] = {}
        for node in order:
            value: Any
            operands = [values[arg] for arg in node.args]
            if isinstance(node, Var):
                value = inputs[node.name]
                value = value if is_torch_tensor(value) else torch.tensor(value, device=device)
            elif isinstance(node, Const):
                value = torch.tensor(node.value, dtype=dtypes[node.kind], device=device)
            elif isinstance(node, Table):
                indices = tuple(
                    torch.where(index < 0, index + size, index).clamp(0, size - 1)
                    for index, size in zip(operands, node.captured.shape, strict=True)
                )
                value = tensors[node.captured].to(indices[0].device)[indices]
            elif cast(Apply, node).op.startswith("to_"):
                value = operands[0]
            else:
                value = calls[cast(Apply, node).op](*operands)
            values[node] = value.to(dtypes[node.kind])
        return values[expr]

    return function
