"""`attention`: compiled attention as a function of tensors and a mask.

This file decides what is kept between calls: one compiled callable for each mask and lengths. It must not know what
compiling does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args, overload

from sparsec.errors import MaskError
from sparsec.masks.mask import Mask
from sparsec.packing import packed
from sparsec.request import check_choice, check_mask
from sparsec.runtime import Attention, compile
from sparsec.tensors import Layout, check_kinds, length_of

if TYPE_CHECKING:
    import torch


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    layout: Layout = "bhsd",
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    layout: Layout = "bhsd",
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    return_lse: bool,
    layout: Layout = "bhsd",
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    layout: Layout = "bhsd",
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention under a mask, with the compiled callable kept for the next call with an equal mask.

    Args:
        q: As in `Attention.__call__`, like the rest.
        k: Keys.
        v: Values.
        mask: Which query attends which key.
        scale: Of the scores; `1/√head_dim` by default.
        return_lse: Whether to return the log-sum-exp too.
        layout: Of the tensors.
        cu_seqlens: With layout `"thd"`: where the packed sequences begin, `[0, …, total]`. Each is then attended as if
            it were alone; the mask must depend on `kv - q` alone.

    Raises:
        MaskError: `cu_seqlens` decreases or does not end at the total, or the mask counts positions.
    """
    check_mask(mask)
    check_choice("layout", layout, get_args(Layout))
    check_kinds(q, k, v, layout)
    q_len, kv_len = length_of(q, layout), length_of(k, layout)
    if cu_seqlens is not None:
        if layout != "thd" or q_len != kv_len:
            raise MaskError(
                f"cu_seqlens is for packed tensors of as many queries as keys; these have layout {layout!r}, {q_len} "
                f"queries and {kv_len} keys"
            )
        mask = packed(mask, cu_seqlens, q_len)
    return _cached(mask, q_len, kv_len, scale, layout)(q, k, v, return_lse=return_lse)


@lru_cache(maxsize=64)
def _cached(mask: Mask, q_len: int, kv_len: int, scale: float | None, layout: Layout) -> Attention:
    return compile(mask, (q_len, kv_len), scale=scale, layout=layout)
