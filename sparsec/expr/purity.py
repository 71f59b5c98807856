"""Whether a user's function leaves everything outside itself as it was.

A traced function is called when an attention is compiled and never again, so a side effect would happen once instead of
once a score. This file decides what counts as one, by reading the function's code: assignments to globals, to variables
of enclosing functions, to attributes and to items, and calls by which a list, dict or set from outside changes. It must
not know what the function computes.
"""

from __future__ import annotations

import dis
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from sparsec.errors import MaskError

_WRITES = {
    "STORE_GLOBAL": "the global",
    "DELETE_GLOBAL": "the global",
    "STORE_ATTR": "the attribute",
    "DELETE_ATTR": "the attribute",
    "STORE_SUBSCR": "an item of an object",
    "DELETE_SUBSCR": "an item of an object",
}
_LOADS = ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME")
_METHODS = ("LOAD_ATTR", "LOAD_METHOD")
# Methods by which Python's own containers change.
_CHANGING = frozenset(
    {"append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse", "appendleft", "popleft"}
    | {"add", "discard", "update", "setdefault", "popitem"}
)


def check_purity(function: Callable[..., Any]) -> None:
    """Returns where the function, as written, changes nothing that outlives it.

    Raises:
        MaskError: It does; names the line.
    """
    plain = getattr(function, "__func__", function)
    code = getattr(plain, "__code__", None)
    if not isinstance(code, CodeType):
        return
    known = inspect.getclosurevars(plain)
    containers = {
        name
        for name, value in {**known.globals, **known.nonlocals}.items()
        if isinstance(value, list | dict | set | deque)
    }
    for line, what in _effects(code, frozenset(code.co_freevars), containers):
        raise MaskError(
            f"{code.co_filename}:{line}: {getattr(function, '__name__', 'the function')} changes {what}; it is called "
            "when it is compiled, not for every score: return what it computes and change nothing else"
        )


def _effects(code: CodeType, outer: frozenset[str], containers: set[str]) -> Iterator[tuple[int, str]]:
    line, loaded = code.co_firstlineno, None
    for step in dis.get_instructions(code):
        position = step.positions.lineno if step.positions is not None else None
        line = line if position is None else position
        if step.opname in _WRITES:
            name = f" {step.argval}" if isinstance(step.argval, str) else ""
            yield line, f"{_WRITES[step.opname]}{name}"
        elif step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in outer:
            yield line, f"the variable {step.argval} of an enclosing function"
        elif step.opname in _METHODS and step.argval in _CHANGING and loaded in containers:
            yield line, f"{loaded}, by {step.argval}"
        loaded = step.argval if step.opname in _LOADS else None
    for constant in code.co_consts:
        # A function written inside may write to the variables of this one.
        if isinstance(constant, CodeType):
            yield from _effects(constant, outer, containers)
