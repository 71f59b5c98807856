"""A user's `mask_mod` or `score_mod` as an expression, by calling it with symbols.

FlexAttention's functions index captured tensors with positions and combine positions with operators and torch
functions. The function is rebuilt so that the arrays it can reach are `StandIn`s (`rebuild.py`), and called once with
`Symbol`s, which record what is done to them. This file decides which operations a symbol takes and how a refusal reads;
it must not know what the expression is for, and it does not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import numpy as np

from sparsec.errors import MaskError
from sparsec.expr.captured import Captured, is_torch_tensor, to_numpy
from sparsec.expr.ops import OPS, Kind
from sparsec.expr.purity import check_purity
from sparsec.expr.rebuild import rebuilt
from sparsec.expr.tree import Const, Expr, Table, Var, apply, as_expr, cast_to

# Code of these packages is not the user's.
_LIBRARIES = frozenset({"torch", "numpy", "functools", "sparsec"})


def trace_mask_mod(mask_mod: Callable[..., Any]) -> Expr:
    """The predicate `mask_mod(b, h, q_idx, kv_idx)` computes, simplified.

    Raises:
        MaskError: The function branches on a symbol, uses an operation an expression does not have, or does not return
            a bool. The message names the file and line.
    """
    expr = _traced(mask_mod, ("b", "h", "q_idx", "kv_idx"))
    if expr.kind != "bool":
        raise MaskError(
            f"{_describe(mask_mod)} returned {expr}, which is {expr.kind}; a mask_mod(b, h, q_idx, kv_idx) returns a "
            "bool, true where the query attends: compare it, as in `... != 0`."
        )
    return expr.simplify()


def trace_score_mod(score_mod: Callable[..., Any]) -> Expr:
    """The score `score_mod(score, b, h, q_idx, kv_idx)` computes, as a simplified float expression.

    Tensors of floats that it captures are live: they are read anew each time the score is computed.

    Raises:
        MaskError: As for `trace_mask_mod`; or the function writes to what outlives it, or draws random numbers.
    """
    names = ("score", "b", "h", "q_idx", "kv_idx")
    check_purity(score_mod)
    made = [cast_to("float", _traced(score_mod, names, is_live=True)).simplify() for _ in range(2)]
    if made[0] != made[1]:
        raise MaskError(
            f"{_describe(score_mod)} gave {made[0]} and then {made[1]}: a score_mod is called once for all scores, and "
            "must depend on its arguments and captured arrays alone; draw random numbers and count calls outside it"
        )
    return made[0]


def _traced(function: Callable[..., Any], names: Sequence[str], *, is_live: bool | None = None) -> Expr:
    if not callable(function):
        raise MaskError(f"expected a function of ({', '.join(names)}); found {type(function).__name__} {function!r}.")
    try:
        result = rebuilt(function, partial(_stand_in, is_live=is_live))(*(Symbol(Var(name)) for name in names))
    except (TypeError, AttributeError, IndexError, RuntimeError) as error:
        where = _location_in(error)
        raise MaskError(
            f"{where or _describe(function)}: {type(error).__name__}: {error}. While tracing with symbols for "
            f"({', '.join(names)}); use operators, torch functions and captured arrays indexed by them."
        ) from error
    try:
        return _expr(result)
    except MaskError as error:
        found = "nothing" if result is None else f"{type(result).__name__} {result!r}"
        raise MaskError(f"{_describe(function)} returned {found}; return an expression of its arguments.") from error


def _describe(function: Callable[..., Any]) -> str:
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{code.co_filename}:{code.co_firstlineno}: {name}" if code else name


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


def _user_line() -> str:
    """File and line of the innermost frame of the user's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not _is_library(frame.f_globals.get("__name__", "")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown line"


def _location_in(error: BaseException) -> str | None:
    """File and line of the innermost frame of the user's code an error passed through."""
    traceback, found = error.__traceback__, None
    while traceback is not None:
        frame = traceback.tb_frame
        if not _is_library(frame.f_globals.get("__name__", "")):
            found = f"{frame.f_code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found


def _refuse(what: str, way_out: str) -> MaskError:
    return MaskError(f"{_user_line()}: {what}; {way_out}")


def _unsupported(name: str, operands: Sequence[object]) -> MaskError:
    shown = ", ".join(str(operand.expr) for operand in operands if isinstance(operand, Symbol))
    return _refuse(
        f"{name}({shown}) cannot be part of an expression",
        "use arithmetic, comparisons, & | ~, where, minimum, maximum, abs, clamp, exp, log, tanh, sqrt, sigmoid, sin, "
        "cos, floor or a captured array indexed by positions",
    )


def _expr(value: object) -> Expr:
    """What a value in the user's function stands for."""
    if isinstance(value, Symbol):
        return value.expr
    if isinstance(value, StandIn):
        value._no_indices("the value")
        if value.captured.is_live and all(size == 1 for size in value.captured.shape):
            return Table(value.captured, (Const(0),) * len(value.captured.shape))
        value = value.array
    if is_torch_tensor(value) and getattr(value, "requires_grad", False):
        raise _refuse("a tensor that requires a gradient is computed here", _BY_POSITION)
    if is_torch_tensor(value) or isinstance(value, np.ndarray | np.generic):
        array = to_numpy(value)
        if array.ndim == 0 or array.size == 1:
            return as_expr(array.reshape(-1)[0].item())
        raise _refuse(
            f"an array of shape {tuple(array.shape)} is used as if it were one number", "index it by positions first"
        )
    if isinstance(value, bool | int | float):
        return Const(value)
    raise _refuse(f"{type(value).__name__} {value!r} cannot be part of an expression", "use numbers and positions")


def _apply(op: str, *operands: object) -> Symbol:
    exprs = [_expr(operand) for operand in operands]
    if op in ("floordiv", "mod") and isinstance(exprs[1], Const) and not exprs[1].value:
        raise _refuse(f"{exprs[0]} {OPS[op].symbol} 0 divides by zero", "divide by something else")
    try:
        return Symbol(apply(op, *exprs))
    except MaskError as error:
        raise MaskError(f"{_user_line()}: {error}") from error


def _no_branch(what: str) -> Callable[[Symbol], Any]:
    def method(self: Symbol) -> Any:  # never returns
        raise _refuse(
            f"{what} of `{self.expr}` is asked for; while tracing there is none, as it stands for every position",
            "write & | ~ for and, or, not (and two comparisons joined by & for a chained one), torch.where for `if`, "
            "torch.minimum and torch.maximum for min and max, and loop over numbers only",
        )

    return method


def _binary(op: str) -> tuple[Callable[[Symbol, object], Symbol], Callable[[Symbol, object], Symbol]]:
    def forward(self: Symbol, other: object) -> Symbol:
        return _apply(op, self, other)

    def reflected(self: Symbol, other: object) -> Symbol:
        return _apply(op, other, self)

    return forward, reflected


class Symbol:
    """What a user's function sees in place of a tensor: an expression that records what is done to it."""

    __slots__ = ("expr",)
    # Before numpy's own operators.
    __array_priority__ = 1000
    # `==` builds an expression.
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expr: Expr) -> None:
        self.expr = expr

    def __repr__(self) -> str:
        return f"Symbol({self.expr})"

    __add__, __radd__ = _binary("add")
    __sub__, __rsub__ = _binary("sub")
    __mul__, __rmul__ = _binary("mul")
    __truediv__, __rtruediv__ = _binary("div")
    __floordiv__, __rfloordiv__ = _binary("floordiv")
    __mod__, __rmod__ = _binary("mod")
    __pow__, __rpow__ = _binary("pow")
    __and__, __rand__ = _binary("and")
    __or__, __ror__ = _binary("or")
    __xor__, __rxor__ = _binary("xor")
    __lshift__, __rlshift__ = _binary("shl")
    __rshift__, __rrshift__ = _binary("shr")
    __lt__, _ = _binary("lt")
    __le__, _ = _binary("le")
    __gt__, _ = _binary("gt")
    __ge__, _ = _binary("ge")
    __eq__, _ = _binary("eq")  # type: ignore[assignment]
    __ne__, _ = _binary("ne")  # type: ignore[assignment]

    def __neg__(self) -> Symbol:
        return _apply("neg", self)

    def __pos__(self) -> Symbol:
        return self

    def __abs__(self) -> Symbol:
        return _apply("abs", self)

    def __invert__(self) -> Symbol:
        return _apply("not", self)

    __bool__ = _no_branch("the truth value")
    __int__ = _no_branch("the integer value")
    __float__ = _no_branch("the float value")
    __index__ = _no_branch("the integer value")
    __len__ = _no_branch("the length")
    __iter__ = _no_branch("the elements")

    def __getitem__(self, index: object) -> Symbol:
        if index in ((), None) or index is Ellipsis:
            return self
        raise _refuse(f"`{self.expr}` is indexed", "it is one number; index a captured array with it instead")

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    @property
    def ndim(self) -> int:
        return 0

    @property
    def device(self) -> None:
        """None: torch then takes its default device."""
        return None

    @property
    def dtype(self) -> Any:  # a torch dtype where torch is loaded, else a numpy one
        torch = sys.modules.get("torch")
        if torch is None:
            return np.dtype({"bool": np.bool_, "int": np.int64, "float": np.float32}[self.expr.kind])
        return {"bool": torch.bool, "int": torch.int64, "float": torch.float32}[self.expr.kind]

    def __getattr__(self, name: str) -> Any:  # a method of a tensor
        # Python, numpy and torch probe for protocols by such names.
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _METHODS:
            method = _METHODS[name]
        elif name in _FUNCTIONS:
            method = _FUNCTIONS[name]
        else:
            raise _unsupported(f".{name}", [self])
        return lambda *args, **kwargs: method(self, *args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _call(getattr(function, "__name__", str(function)), args, kwargs or {})

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method != "__call__":
            raise _unsupported(f"numpy.{ufunc.__name__}.{method}", args)
        return _call(ufunc.__name__, args, kwargs)

    def __array_function__(self, function: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _call(function.__name__, args, kwargs)


# What a result is computed on does not change what it is.
_IGNORED_ARGUMENTS = frozenset({"device", "layout", "requires_grad", "memory_format", "casting"})


def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Symbol:
    """A torch or numpy function on symbols."""
    plain = name.strip("_")
    if kwargs.pop("out", None) is not None:
        raise _refuse(f"{name} writes to an array that outlives the function", "return the result instead")
    if plain == "getitem":
        # Of a tensor the function itself made.
        return Symbol(_expr(StandIn(args[0], "table")[args[1]]))
    if name.startswith("__r") and plain[1:] in _FUNCTIONS and plain not in _FUNCTIONS:
        # Tensor.__rsub__ and its like, called by torch with the operands the other way round.
        return _FUNCTIONS[plain[1:]](args[1], args[0])
    function = _FUNCTIONS.get(plain) or _METHODS.get(plain)
    if function is None:
        raise _unsupported(name, args)
    return function(*args, **{key: value for key, value in kwargs.items() if key not in _IGNORED_ARGUMENTS})


def _simple(op: str) -> Callable[..., Symbol]:
    return lambda *operands: _apply(op, *operands)


def _where(condition: object, a: object, b: object) -> Symbol:
    return _apply("where", condition, a, b)


def _div(a: object, b: object, *, rounding_mode: str | None = None) -> Symbol:
    if rounding_mode == "floor":
        return _apply("floordiv", a, b)
    if rounding_mode is None:
        return _apply("div", a, b)
    magnitude = _apply("floordiv", _apply("abs", a), _apply("abs", b))
    return _apply("where", _apply("lt", _apply("mul", a, b), 0), _apply("neg", magnitude), magnitude)


def _clamp(x: object, min: object = None, max: object = None, **bounds: object) -> Symbol:
    min, max = bounds.get("a_min", min), bounds.get("a_max", max)
    result = Symbol(_expr(x))
    if min is not None:
        result = _apply("max", result, min)
    return result if max is None else _apply("min", result, max)


def _logical(op: str) -> Callable[..., Symbol]:
    return lambda *operands: _apply(op, *(_apply("to_bool", operand) for operand in operands))


def _sign(x: object) -> Symbol:
    one, zero = Const(1), Const(0)
    return _apply("where", _apply("gt", x, 0), Symbol(one), _apply("where", _apply("lt", x, 0), -1, Symbol(zero)))


def _ceil(x: object) -> Symbol:
    return _apply("neg", _apply("floor", _apply("neg", x)))


def _square(x: object) -> Symbol:
    return _apply("mul", x, x)


def _kind_of_dtype(dtype: object) -> Kind | None:
    """The kind a torch, numpy or Python type is; None for what is no dtype."""
    name = getattr(dtype, "__name__", None) if isinstance(dtype, type) else str(dtype)
    plain = (name or "").rpartition(".")[2].rstrip("_")
    if plain.startswith("bool"):
        return "bool"
    if plain.startswith(("int", "uint", "long", "short")):
        return "int"
    return "float" if plain.startswith(("float", "bfloat", "half", "double")) else None


def _to(x: object, *args: object, **kwargs: object) -> Symbol:
    """`.to(dtype)`, `.to(device)`, `.to(other)`, `.type(dtype)`, `.astype(dtype)`."""
    for argument in (*args, *kwargs.values()):
        kind = argument.expr.kind if isinstance(argument, Symbol) else _kind_of_dtype(argument)
        if kind is None and is_torch_tensor(argument):
            kind = _kind_of_dtype(argument.dtype)  # type: ignore[attr-defined]
        if kind is not None:
            return _apply(f"to_{kind}", x)
    return Symbol(_expr(x))


def _cast(kind: Kind) -> Callable[..., Symbol]:
    return lambda x, *_: _apply(f"to_{kind}", x)


def _filled(value: float | None) -> Callable[..., Symbol]:
    """`ones_like`, `new_zeros`, `full_like` and their like: a constant of the asked dtype, or that of the symbol."""

    def fill(
        like: Symbol, size: object = (), fill_value: object = None, *, dtype: object = None, **_: object
    ) -> Symbol:
        content = value
        if content is None:
            content = size if fill_value is None else fill_value  # type: ignore[assignment]
        kind = _kind_of_dtype(dtype) if dtype is not None else like.expr.kind
        return _apply(f"to_{kind}", content)

    return fill


def _masked_fill(x: object, mask: object, value: object) -> Symbol:
    return _apply("where", mask, value, x)


def _identity(x: object, *_: object, **__: object) -> Symbol:
    return Symbol(_expr(x))


# By the names torch, numpy and Python's operators give them.
_ALIASES: dict[str, tuple[str, ...]] = {
    "sub": ("subtract",),
    "mul": ("multiply",),
    "floordiv": ("floor_divide",),
    "mod": ("remainder",),
    "min": ("minimum", "fmin"),
    "max": ("maximum", "fmax"),
    "abs": ("absolute", "fabs"),
    "neg": ("negative",),
    "pow": ("power", "float_power"),
    "sigmoid": ("special_expit",),
    "lt": ("less",),
    "le": ("less_equal",),
    "gt": ("greater",),
    "ge": ("greater_equal",),
    "eq": ("equal",),
    "ne": ("not_equal",),
    "and": ("bitwise_and",),
    "or": ("bitwise_or",),
    "xor": ("bitwise_xor",),
    "not": ("invert", "bitwise_not"),
    "shl": ("lshift", "bitwise_left_shift", "left_shift"),
    "shr": ("rshift", "bitwise_right_shift", "right_shift"),
}
_FUNCTIONS: dict[str, Callable[..., Symbol]] = {
    **{name: _simple(name) for name in OPS if name not in ("min", "max") and not name.startswith("to_")},
    **{alias: _simple(name) for name, aliases in _ALIASES.items() for alias in aliases},
    **dict.fromkeys(("div", "truediv", "true_divide", "divide"), _div),
    "logical_and": _logical("and"),
    "logical_or": _logical("or"),
    "logical_xor": _logical("xor"),
    "logical_not": _logical("not"),
    "where": _where,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda x, max: _clamp(x, None, max),
    "relu": lambda x, *_: _apply("max", x, 0),
    "sign": _sign,
    "ceil": _ceil,
    "square": _square,
    "reciprocal": lambda x: _apply("div", 1, x),
    "ones_like": _filled(1),
    "zeros_like": _filled(0),
    "full_like": _filled(None),
}
_METHODS: dict[str, Callable[..., Symbol]] = {
    **dict.fromkeys(("to", "type", "astype", "type_as"), _to),
    **dict.fromkeys(("float", "half", "bfloat16", "double"), _cast("float")),
    **dict.fromkeys(("int", "long", "short"), _cast("int")),
    "bool": _cast("bool"),
    "new_ones": _filled(1),
    "new_zeros": _filled(0),
    "new_full": _filled(None),
    "new_tensor": lambda x, value, **_: Symbol(_expr(value)),
    "masked_fill": _masked_fill,
    **dict.fromkeys(("clone", "detach", "contiguous", "cpu", "cuda", "squeeze"), _identity),
}


def _stand_in(value: object, name: str, is_live: bool | None = None) -> object | None:
    """A stand-in for an array or number of the user's, None for anything else."""
    if isinstance(value, np.generic):
        number: object = value.item()
        return number
    if isinstance(value, np.ndarray) or is_torch_tensor(value):
        # As a torch module's own name for it, not that of the dictionary which holds it.
        return StandIn(value, name.removeprefix("_parameters_").removeprefix("_buffers_"), is_live=is_live)
    return None


class StandIn:
    """What a user's function sees in place of an array it captured: itself, but for being indexed by symbols."""

    __slots__ = ("_captured", "_is_live", "array", "indices", "name")
    __array_priority__ = 1000
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, array: Any, name: str, indices: tuple[Expr, ...] = (), *, is_live: bool | None = None) -> None:
        self.array = array
        self.name = name
        self.indices = indices
        self._is_live = is_live
        self._captured: Captured | None = None

    @property
    def captured(self) -> Captured:
        if self._captured is None:
            self._captured = Captured(self.array, self.name, self._is_live)
        return self._captured

    def __repr__(self) -> str:
        return f"{self.name}{list(self.indices) if self.indices else ''}"

    def __getitem__(self, index: object) -> object:
        parts = tuple(index) if isinstance(index, tuple | list) else (index,)
        if not self.indices and not any(isinstance(part, Symbol) for part in parts):
            plain = tuple(part.array if isinstance(part, StandIn) else part for part in parts)
            chosen = plain if isinstance(index, tuple | list) else plain[0]
            is_entry = len(plain) == len(self.array.shape) and all(isinstance(part, int) for part in plain)
            if is_entry and getattr(self.array, "requires_grad", False):
                return Symbol(Table(self.captured, tuple(Const(part) for part in plain)))
            return _wrapped(self.array[chosen], self.name)
        if any(isinstance(part, slice) or part is None or part is Ellipsis for part in parts):
            raise _refuse(
                f"{self.name!r} is indexed by positions and slices together", "index every dimension by a position"
            )
        indices = (*self.indices, *(_expr(part) for part in parts))
        dims = len(self.array.shape)
        if len(indices) > dims:
            raise _refuse(
                f"{self.name!r} has {dims} dimensions and is given {len(indices)} indices", "give one a dimension"
            )
        if len(indices) < dims:
            partial = StandIn(self.array, self.name, indices)
            partial._captured = self.captured
            return partial
        try:
            return Symbol(Table(self.captured, indices))
        except MaskError as error:
            raise MaskError(f"{_user_line()}: {error}") from error

    def __getattr__(self, name: str) -> Any:  # an attribute of the array
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_"):
            raise _refuse(f"{self.name}.{name} changes the captured array {self.name!r}", "change it outside")
        self._no_indices(name)
        found = getattr(self.array, name)
        if not callable(found):
            return _wrapped(found, self.name)
        return lambda *args, **kwargs: self._called(name, found, args, kwargs)

    def _no_indices(self, name: str) -> None:
        if self.indices:
            missing = len(self.array.shape) - len(self.indices)
            raise _refuse(
                f"{name} of {self!r}, which needs {missing} more indices", "index every dimension by a position"
            )

    def _called(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        if any(isinstance(argument, Symbol) for argument in (*args, *kwargs.values())):
            if is_torch_tensor(self.array) and name in ("gather", "index_select", "take"):
                raise _refuse(f"{self.name}.{name} with a position", f"write {self.name}[position]")
            return _call(name, (self, *args), kwargs)
        return _wrapped(function(*_unwrapped(args), **{key: _bare(value) for key, value in kwargs.items()}), self.name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(argument, Symbol) for argument in (*args, *kwargs.values())):
            return _call(getattr(function, "__name__", str(function)), args, kwargs)
        return _wrapped(
            function(*_unwrapped(args), **{key: _bare(value) for key, value in kwargs.items()}), _name_in(args)
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(argument, Symbol) for argument in args):
            return _call(ufunc.__name__, args, kwargs)
        return _wrapped(getattr(ufunc, method)(*_unwrapped(args), **kwargs), self.name)

    def __array_function__(self, function: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(isinstance(argument, Symbol) for argument in args):
            return _call(function.__name__, args, kwargs)
        return _wrapped(function(*_unwrapped(args), **kwargs), self.name)

    def __len__(self) -> int:
        return len(self.array)

    def __bool__(self) -> bool:
        return bool(self.array)

    def __int__(self) -> int:
        return int(self.array)

    def __float__(self) -> float:
        return float(self.array)

    def __index__(self) -> int:
        return int(self.array.__index__())


def _name_in(arguments: Sequence[object]) -> str:
    """What the first captured array among these is called."""
    return next((argument.name for argument in arguments if isinstance(argument, StandIn)), "table")


def _bare(value: object) -> object:
    if isinstance(value, StandIn):
        value._no_indices("a function")
        return value.array
    return value


def _unwrapped(values: Sequence[object]) -> list[object]:
    return [_bare(value) for value in values]


_BY_POSITION = (
    "its gradient and its later values would be lost: index the captured tensor by positions first, or compute outside "
    "and pass the result to each call as score_args"
)


def _wrapped(value: object, name: str) -> object:
    """What a function computed from captured arrays alone: once and for all, so nothing that is to be trained."""
    if is_torch_tensor(value) and getattr(value, "requires_grad", False):
        raise _refuse(
            f"something is computed from {name!r}, which requires a gradient, before it is indexed", _BY_POSITION
        )
    stand_in = _stand_in(value, name, is_live=False)
    return value if stand_in is None else stand_in


def _operator(name: str) -> Callable[..., Any]:
    """An operator of a stand-in: on the array itself, or on symbols where the other operand is one."""

    def method(self: StandIn, *others: Any) -> Any:
        self._no_indices(name)
        if any(isinstance(other, Symbol) for other in others):
            # The symbol's reflected operator takes over.
            return NotImplemented
        return _wrapped(getattr(self.array, name)(*_unwrapped(others)), self.name)

    return method


for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"),
    *("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "rand", "ror", "rxor", "rlshift", "rrshift"),
    *("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "invert"),
):
    setattr(StandIn, f"__{_name}__", _operator(f"__{_name}__"))
