"""Published compositions: BigBird and Longformer, in the words of their papers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsec.errors import MaskError
from sparsec.masks.blocks import Blocks, checked_block
from sparsec.masks.mask import Mask, Named
from sparsec.masks.random import checked_seed, random_edges
from sparsec.masks.ranges import IntArray
from sparsec.masks.structured import end_tokens
from sparsec.masks.structured import global_tokens as global_tokens_mask
from sparsec.masks.toeplitz import dilated
from sparsec.masks.toeplitz import window as window_mask
from sparsec.masks.varying import per_head


def bigbird(block: int, window_blocks: int, global_blocks: int, random_blocks: int, seed: int | Sequence[int]) -> Mask:
    """BigBird's internal-transformer construction: window, global and random blocks.

    Args:
        block: Tokens a block.
        window_blocks: Blocks in the window, the query's own in its middle (odd).
        global_blocks: Blocks that attend and are attended by all: the first half (rounded up) at the start, the others at
            the end, so 2 are the first and the last.
        random_blocks: Random blocks for each query block, beside those of window and global blocks.
        seed: One seed, or one for each query head.

    Source: Zaheer et al., Big Bird: Transformers for Longer Sequences, arXiv 2007.14062, appendix D.
    """
    size = checked_block(block, "bigbird")
    for name, value in (("global_blocks", global_blocks), ("random_blocks", random_blocks)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise MaskError(f"bigbird: {name} = {value!r} must be an int ≥ 0")
    if not isinstance(window_blocks, (int, np.integer)) or window_blocks < 1 or window_blocks % 2 == 0:
        raise MaskError(f"bigbird: window_blocks = {window_blocks!r} must be odd: the query's own block is in its middle")
    if not isinstance(seed, (int, np.integer)):
        return per_head([bigbird(block, window_blocks, global_blocks, random_blocks, each) for each in seed])
    reach, last = int(window_blocks) // 2, int(global_blocks) // 2
    fixed = window_mask(reach, reach) | end_tokens(int(global_blocks) - last, last)
    drawn = random_edges(int(random_blocks), checked_seed(seed, "bigbird"), avoiding=fixed)
    text = f"bigbird({size}, {int(window_blocks)}, {int(global_blocks)}, {int(random_blocks)}, {int(seed)})"
    return Named(Blocks(fixed | drawn, size), text)


def longformer(window: int, global_tokens: int | Sequence[int] | IntArray, dilation: int = 1) -> Mask:
    """Longformer's sliding window with global tokens.

    Args:
        window: Keys in the window, all told: `window // 2` on each side of the query, and its own.
        global_tokens: The first n tokens, or a list of them; they attend, and are attended by, all.
        dilation: The step between keys of the window.

    Source: Beltagy, Peters, Cohan, Longformer: The Long-Document Transformer, arXiv 2004.05150, section 3.1.
    """
    for name, value in (("window", window), ("dilation", dilation)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise MaskError(f"longformer: {name} = {value!r} must be an int ≥ 1")
    side = int(window) // 2
    local = window_mask(side, side) if dilation == 1 else dilated(side * int(dilation), int(dilation))
    marked = global_tokens_mask(global_tokens)
    listed = int(global_tokens) if isinstance(global_tokens, (int, np.integer)) else np.asarray(global_tokens).tolist()
    option = "" if dilation == 1 else f", {int(dilation)}"
    return Named(local | marked, f"longformer({int(window)}, {listed!r}{option})")
