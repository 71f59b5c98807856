"""Numbers that stand for compiled attentions where torch's operators can take no objects.

This file decides how long a number is good for: as long as the attention lives. It imports no torch, so that an
attention has its number before tensors are at hand.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from sparsec.errors import SparsecError

if TYPE_CHECKING:
    import torch


class Executor(Protocol):
    """Who computes for a handle; tensors are `[batch, heads, length, dim]`."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp, given the live tables of the score modifier."""
        ...

    def backward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        d_out: torch.Tensor,
        d_lse: torch.Tensor,
        tables: Sequence[torch.Tensor] = (),
        is_wanted: Sequence[bool] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of q, k, v and each table; an empty tensor for a table whose gradient is not wanted."""
        ...

    def held(self) -> Executor:
        """One that computes what this one does now, whatever this one is told later; the same until it is told."""
        ...

    @property
    def was_updated(self) -> bool:
        """Whether it once computed something else than now."""
        ...


_executors: weakref.WeakValueDictionary[int, Executor] = weakref.WeakValueDictionary()
_handles: weakref.WeakKeyDictionary[Executor, int] = weakref.WeakKeyDictionary()
_numbers = itertools.count()


def register(executor: Executor) -> int:
    """The handle of an executor, good as long as the executor lives."""
    handle = _handles.get(executor)
    if handle is None:
        handle = _handles[executor] = next(_numbers)
        _executors[handle] = executor
    return handle


def executor(handle: int) -> Executor:
    """Who computes for a handle.

    Raises:
        SparsecError: It no longer exists.
    """
    found = _executors.get(handle)
    if found is None:
        raise SparsecError(
            f"attention {handle} no longer exists: keep the object that sparsec.compile returned as long as its graph"
        )
    return found
