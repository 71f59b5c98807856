"""What tensors look like to callers: layouts, checks, and the dtype they take under autocast.

This file decides which axes mean what (`Layout`), what is refused before any work is done, and how inputs are cast
where `torch.autocast` is on. It must not know masks, plans or kernels, and imports torch only when tensors are at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sparsec.errors import SparsecError, UnsupportedError

if TYPE_CHECKING:
    import torch

# [batch, heads, length, dim]; [batch, length, heads, dim]; [length, heads, dim] of sequences packed into one.
Layout = Literal["bhsd", "bshd", "thd"]


def check_kinds(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> None:
    """Raises where one of the three is nothing that sparsec takes.

    Raises:
        SparsecError: No dense tensor, or of other dimensions than the layout has.
        UnsupportedError: A NestedTensor.
    """
    import torch

    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise SparsecError(f"{name} is a {type(tensor).__name__}; sparsec takes torch tensors")
        if tensor.is_nested:
            raise UnsupportedError(
                f"{name} is a NestedTensor: pack the sequences into one and use masks.documents(lengths)"
            )
        if tensor.dim() != len(layout):
            wanted = {3: "three", 4: "four"}[len(layout)]
            raise SparsecError(
                f"{name} has shape {tuple(tensor.shape)}; {wanted} dimensions are needed (layout {layout!r})"
            )
        if tensor.layout != torch.strided:
            raise SparsecError(f"{name} is a {tensor.layout} tensor; sparsec takes dense ones")


def check_agreement(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> None:
    """Raises where the three do not belong together.

    Raises:
        SparsecError: Shapes, dtypes or devices that do not fit.
    """
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise SparsecError(f"q is {q.dtype} and {name} is {tensor.dtype}: all three must have one dtype")
        if tensor.device != q.device:
            raise SparsecError(f"q is on {q.device} and {name} on {tensor.device}: all three must be on one device")
        if layout != "thd" and tensor.shape[0] != q.shape[0]:
            raise SparsecError(f"q has batch {q.shape[0]} and {name} has {tensor.shape[0]}")
    if k.shape[:-1] != v.shape[:-1]:
        raise SparsecError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: only the last may differ")
    if q.shape[-1] != k.shape[-1]:
        raise SparsecError(f"q has head_dim {q.shape[-1]} and k has {k.shape[-1]}")


def length_of(tensor: torch.Tensor, layout: Layout) -> int:
    """How many tokens a tensor has."""
    return int(tensor.shape[{"bhsd": 2, "bshd": 1, "thd": 0}[layout]])


def heads_first(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A view `[batch, heads, length, dim]`."""
    if layout == "bhsd":
        return tensor
    return tensor.transpose(0, 1).unsqueeze(0) if layout == "thd" else tensor.transpose(1, 2)


def in_layout(out: torch.Tensor, lse: torch.Tensor | None, layout: Layout) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views of `[batch, heads, length, dim]` and `[batch, heads, length]` as the layout has them."""
    if layout == "bhsd":
        return out, lse
    if layout == "thd":
        return out.squeeze(0).transpose(0, 1), None if lse is None else lse.squeeze(0)
    return out.transpose(1, 2), lse


def taken(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs of a call as kernels take them: cast where autocast is on, `[batch, heads, length, dim]`.

    Raises:
        SparsecError: As `check_kinds` and `check_agreement`.
    """
    check_kinds(q, k, v, layout)
    q, k, v = autocast(q, k, v)
    check_agreement(q, k, v, layout)
    return heads_first(q, layout), heads_first(k, layout), heads_first(v, layout)


def given_back(
    out: torch.Tensor, lse: torch.Tensor | None, layout: Layout, *, with_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What a call returns."""
    out, lse = in_layout(out, lse, layout)
    if not with_lse:
        return out
    assert lse is not None, "the log-sum-exp was asked for"
    return out, lse


def autocast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs in the dtype of `torch.autocast` where it is on, as torch's own attention takes them."""
    import torch

    kind = q.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (_cast(t, dtype) for t in (q, k, v))
    return q, k, v


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    import torch

    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def check_tangents(*tensors: torch.Tensor | None) -> None:
    """Raises where one carries a derivative forward, which would be lost: kernels see values alone.

    Raises:
        UnsupportedError: It is a dual tensor, or this is within `torch.func.jvp`.
    """
    from torch.autograd import forward_ad

    unpack: Any = forward_ad.unpack_dual  # torch gives it no types
    try:
        has_tangent = any(t is not None and unpack(t).tangent is not None for t in tensors)
    except RuntimeError:
        # In a compiled graph torch cannot tell dual tensors from others, and there are some: a dual level is entered.
        has_tangent = True
    if has_tangent:
        raise UnsupportedError(
            "sparsec's attention was given tensors with forward-mode derivatives (torch.func.jvp, jacfwd or dual "
            "tensors), and only reverse mode is computed: use backward() or torch.autograd.grad, or dense attention"
        )


def requires_grad(*tensors: torch.Tensor) -> bool:
    """Whether a backward pass may follow."""
    import torch

    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
