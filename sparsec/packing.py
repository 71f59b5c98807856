"""Masks of sequences packed one after the other: every document attended as if it were alone.

This file decides when a mask written for one sequence can be taken to many packed ones exactly. It must not know
tensors other than the boundaries it is given.
"""

from __future__ import annotations

import sys

import numpy as np

from sparsec.errors import MaskError
from sparsec.masks import documents
from sparsec.masks.arguments import int_array
from sparsec.masks.mask import Mask


def packed(mask: Mask, cu_seqlens: object, total: int) -> Mask:
    """The mask of `total` tokens in which each document has `mask` for itself, as many queries as keys.

    Args:
        mask: For one document; what it attends must depend on `kv - q` alone (windows, causal, dilated, strided, full,
            and their combinations): then restricting it to documents is exact, wherever they begin.
        cu_seqlens: Where documents begin, `[0, …, total]`: ints, an array or a tensor.
        total: Tokens.

    Raises:
        MaskError: The boundaries do not begin at 0, decrease or do not end at the total; or the mask counts positions
            from the beginning of a document.
    """
    bounds = _boundaries(cu_seqlens)
    together = documents(cu_seqlens=bounds)
    if bounds[-1] != total:
        raise MaskError(
            f"cu_seqlens ends at {bounds[-1]}, and the tensors have {total} tokens: its last entry must be their total"
        )
    is_open = not (mask.varies_by_head or mask.varies_by_batch) and mask._fixed_lengths() == (None, None)
    if not is_open or mask.bind(total).offsets is None:
        raise MaskError(
            f"{mask} with cu_seqlens: it does not depend on kv - q alone, so that it means something else in each "
            "document; write the mask of all packed tokens, with documents(cu_seqlens=…), and leave cu_seqlens out here"
        )
    return together & mask


def _boundaries(cu_seqlens: object) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(cu_seqlens, torch.Tensor):
        cu_seqlens = cu_seqlens.cpu().numpy()
    return int_array(cu_seqlens, "cu_seqlens", "boundaries")
