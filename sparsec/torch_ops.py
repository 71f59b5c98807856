"""sparsec's operators in torch's own registry: forward, backward, their shapes for tracing, and autograd between them.

This file decides how torch sees a compiled attention: `sparsec::forward` and `sparsec::backward` take tensors and the
handle of an `Executor`, so that `torch.compile`, checkpointing and autograd treat them like any operator. It imports
torch, and is imported only when tensors are at hand. It must not know what an executor does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from sparsec.errors import UnsupportedError
from sparsec.handles import Executor, executor, register
from sparsec.tensors import check_tangents

# Who computed a log-sum-exp, for as long as it is somewhere: the backward pass is that of the same mask, also in a
# compiled graph, which knows a number alone.
_computed_by: weakref.WeakKeyDictionary[torch.UntypedStorage, Executor] = weakref.WeakKeyDictionary()


def new_output(q: torch.Tensor, v_dim: int, empty: Callable[[Sequence[int]], torch.Tensor]) -> torch.Tensor:
    """An output `[batch, q_heads, q_len, v_dim]` made by `empty`; its heads lie within its rows where those of q do."""
    batch, heads, length, _ = q.shape
    if q.stride(1) < q.stride(2):
        return empty((batch, length, heads, v_dim)).transpose(1, 2)
    return empty((batch, heads, length, v_dim))


@torch.library.custom_op("sparsec::forward", mutates_args=())
def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: Sequence[torch.Tensor], handle: int
) -> tuple[torch.Tensor, torch.Tensor]:
    # Who calls the attention itself is checked there; a compiled graph comes here alone.
    check_tangents(q, k, v, *tables)
    computing = executor(handle)
    held = computing.held()
    out, lse = computing.forward(q, k, v, tables)
    _computed_by[lse.untyped_storage()] = held
    return out, lse


@forward.register_fake
def _forward_shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: Sequence[torch.Tensor], handle: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return new_output(q, v.shape[3], q.new_empty), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sparsec::backward", mutates_args=())
def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
    tables: Sequence[torch.Tensor],
    is_wanted: Sequence[bool],
    handle: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Gradients of q, k, v and the tables; an empty tensor for a table whose gradient is not wanted."""
    computing = _computed_by.get(lse.untyped_storage())
    if computing is None:
        computing = executor(handle)
        if computing.was_updated:
            raise UnsupportedError(
                "a backward pass was given a copy of its forward pass's log-sum-exp, which does not tell whether "
                "update changed the mask in between: keep that tensor where it is, or compile an attention a mask"
            )
    dq, dk, dv, *d_tables = computing.backward(q, k, v, out, lse, d_out, d_lse, tables, is_wanted)
    return dq, dk, dv, d_tables


@backward.register_fake
def _backward_shapes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
    tables: Sequence[torch.Tensor],
    is_wanted: Sequence[bool],
    handle: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    d_tables = [t.new_empty(t.shape if wanted else (0,)) for t, wanted in zip(tables, is_wanted, strict=True)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_tables


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's autograd context
    q, k, v, tables, ctx.handle = inputs
    # The graph keeps who computed it. In a trace nobody did yet, and a handle may be a symbol.
    ctx.held = executor(ctx.handle).held() if type(output[1]) is torch.Tensor else None
    ctx.save_for_backward(q, k, v, *output, *tables)


def _differentiate(ctx, d_out, d_lse):  # type: ignore[no-untyped-def]  # torch's autograd context
    q, k, v, out, lse, *tables = ctx.saved_tensors
    is_wanted = [bool(wanted) for wanted in ctx.needs_input_grad[3]]
    # Another mask may have come in between: the gradient is that of the mask of the forward pass.
    handle = ctx.handle if ctx.held is None else register(ctx.held)
    dq, dk, dv, d_tables = backward(q, k, v, out, lse, d_out, d_lse, tables, is_wanted, handle)
    found = [d_table if wanted else None for d_table, wanted in zip(d_tables, is_wanted, strict=True)]
    return dq, dk, dv, found, None


def _refuse(ctx, *above):  # type: ignore[no-untyped-def]  # torch's autograd context
    raise UnsupportedError(
        "a gradient of a gradient of sparsec's attention is asked for, and only first ones are computed: leave "
        "create_graph out, or take second derivatives of a dense attention"
    )


forward.register_autograd(_differentiate, setup_context=_save)
backward.register_autograd(_refuse)
