"""A Python function with the values it can reach replaced.

A function reaches its closure cells, defaults, the globals it names, and through those other functions, containers,
bound methods and partial applications. This file decides how far that is followed; it must not know what values are
replaced by. The user's objects are never changed: whatever holds a replaced value is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

Replace = Callable[[object, str], object | None]
"""Returns what stands in for a value of the given name, or None to leave it alone."""

# Functions of these packages are called as they are, unless they close over something, as FlexAttention's and_masks.
_LIBRARIES = frozenset({"torch", "numpy", "sparsec", "builtins", "math", "functools", "operator"})
_LARGEST_CONTAINER = 100_000


def rebuilt(function: Callable[..., Any], replace: Replace) -> Callable[..., Any]:
    """`function` seeing `replace(value, name)` in place of the values it can reach.

    Args:
        function: A function, lambda, partial, bound method, or an object with a `__call__` written in Python.
        replace: Returns the replacement, or None.
    """
    rebuilder = _Rebuilder(replace)
    result = rebuilder.value(function, getattr(function, "__name__", "function"))
    if result is function and not isinstance(function, FunctionType | MethodType | functools.partial):
        call = vars(type(function)).get("__call__")
        if isinstance(call, FunctionType):
            bound: Callable[..., Any] = MethodType(rebuilder.function(call), rebuilder.instance(function))
            return bound
    return result  # type: ignore[no-any-return]


class _Rebuilder:
    def __init__(self, replace: Replace) -> None:
        self._replace = replace
        # By identity; the original is kept so that its id is not used again.
        self._done: dict[int, tuple[object, Any]] = {}
        self._globals: dict[int, dict[str, Any]] = {}

    def value(self, value: Any, name: str) -> Any:  # any value of the user's
        known = self._done.get(id(value))
        if known is not None:
            return known[1]
        replacement = self._replace(value, name)
        if replacement is None:
            return self._followed(value, name)
        self._done[id(value)] = (value, replacement)
        return replacement

    def _followed(self, value: Any, name: str) -> Any:
        if isinstance(value, FunctionType):
            is_library = (value.__module__ or "").partition(".")[0] in _LIBRARIES
            return value if is_library and not value.__closure__ else self.function(value)
        if isinstance(value, functools.partial):
            keywords = {key: self.value(item, key) for key, item in value.keywords.items()}
            args = (self.value(item, f"{name}_{i}") for i, item in enumerate(value.args))
            return functools.partial(self.value(value.func, name), *args, **keywords)
        if isinstance(value, MethodType):
            if not isinstance(value.__func__, FunctionType):
                return value
            return MethodType(self.function(value.__func__), self.instance(value.__self__))
        if isinstance(value, list | tuple | dict) and len(value) <= _LARGEST_CONTAINER:
            return self._container(value, name)
        return self.instance(value) if _is_plain_object(value) else value

    def _container(self, value: Any, name: str) -> Any:
        if isinstance(value, dict):
            copied: Any = {}
            self._done[id(value)] = (value, copied)
            copied.update({key: self.value(item, f"{name}_{key}") for key, item in value.items()})
            changed = any(copied[key] is not item for key, item in value.items())
        else:
            items = [self.value(item, f"{name}_{i}") for i, item in enumerate(value)]
            changed = any(new is not old for new, old in zip(items, value, strict=True))
            # A named tuple takes its items one by one.
            copied = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        result = copied if changed else value
        self._done[id(value)] = (value, result)
        return result

    def instance(self, value: Any) -> Any:
        """A copy of a simple object whose attributes are replaced; the object itself where it has none."""
        known = self._done.get(id(value))
        if known is not None:
            return known[1]
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict) or isinstance(value, type | ModuleType):
            return value
        copied = object.__new__(type(value))
        self._done[id(value)] = (value, copied)
        copied.__dict__.update({key: self.value(item, key) for key, item in attributes.items()})
        return copied

    def function(self, function: FunctionType) -> FunctionType:
        known = self._done.get(id(function))
        if known is not None:
            return known[1]  # type: ignore[no-any-return]
        cells = tuple(CellType() for _ in function.__closure__ or ())
        scope = self._globals.setdefault(id(function.__globals__), dict(function.__globals__))
        copied = FunctionType(function.__code__, scope, function.__name__, None, cells)
        # Before what it reaches, which may reach the function again.
        self._done[id(function)] = (function, copied)
        for cell, original, name in zip(cells, function.__closure__ or (), function.__code__.co_freevars, strict=True):
            try:
                cell.cell_contents = self.value(original.cell_contents, name)
            except ValueError:
                # An empty cell: the name is not bound yet.
                continue
        for name in _names(function.__code__):
            if name in function.__globals__:
                scope[name] = self.value(function.__globals__[name], name)
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        defaults = function.__defaults__ or ()
        named = zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
        copied.__defaults__ = tuple(self.value(item, name) for name, item in named) or None
        if function.__kwdefaults__:
            copied.__kwdefaults__ = {name: self.value(item, name) for name, item in function.__kwdefaults__.items()}
        copied.__qualname__ = function.__qualname__
        copied.__module__ = function.__module__
        return copied


def _is_plain_object(value: object) -> bool:
    """Whether a value is an instance of a class of the user's own that may hold arrays."""
    cls = type(value)
    return (
        not isinstance(value, type | ModuleType)
        and cls.__module__.partition(".")[0] not in _LIBRARIES
        and isinstance(getattr(value, "__dict__", None), dict)
        and cls.__new__ is object.__new__
        and not isinstance(value, BaseException)
    )


def _names(code: CodeType) -> Iterator[str]:
    """The global names a function and the functions written inside it mention."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
