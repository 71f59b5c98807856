"""Published compositions: BigBird and Longformer, in the words of their papers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsec.errors import MaskError
from sparsec.masks.arguments import checked_int, is_int
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
        global_blocks: Blocks that attend and are attended by all: the first half (rounded up) at the start, the others
            at the end, so 2 are the first and the last.
        random_blocks: Random blocks for each query block, beside those of window and global blocks.
        seed: One seed, or one for each query head.

    Source: Zaheer et al., Big Bird: Transformers for Longer Sequences, arXiv 2007.14062, appendix D.
    """
    size = checked_block(block, "bigbird")
    n_global = checked_int(global_blocks, "bigbird", "global_blocks", least=0)
    n_random = checked_int(random_blocks, "bigbird", "random_blocks", least=0)
    n_window = checked_int(window_blocks, "bigbird", "window_blocks")
    if n_window % 2 == 0:
        raise MaskError(
            f"bigbird: window_blocks = {window_blocks!r} must be odd: the query's own block is in its middle"
        )
    if not isinstance(seed, (int, np.integer)):
        return per_head([bigbird(block, window_blocks, global_blocks, random_blocks, each) for each in seed])
    reach, last = n_window // 2, n_global // 2
    fixed = window_mask(reach, reach) | end_tokens(n_global - last, last)
    drawn = random_edges(n_random, checked_seed(seed, "bigbird"), avoiding=fixed)
    text = f"bigbird({size}, {n_window}, {n_global}, {n_random}, {int(seed)})"
    return Named(Blocks(fixed | drawn, size), text)


def longformer(window: int, global_tokens: int | Sequence[int] | IntArray, dilation: int = 1) -> Mask:
    """Longformer's sliding window with global tokens.

    Args:
        window: Keys in the window, all told: `window // 2` on each side of the query, and its own.
        global_tokens: The first n tokens, or a list of them; they attend, and are attended by, all.
        dilation: The step between keys of the window.

    Source: Beltagy, Peters, Cohan, Longformer: The Long-Document Transformer, arXiv 2004.05150, section 3.1.
    """
    width, step = checked_int(window, "longformer", "window"), checked_int(dilation, "longformer", "dilation")
    side = width // 2
    local = window_mask(side, side) if step == 1 else dilated(side * step, step)
    marked = global_tokens_mask(global_tokens)
    listed = int(global_tokens) if is_int(global_tokens) else np.asarray(global_tokens).tolist()
    option = "" if step == 1 else f", {step}"
    return Named(local | marked, f"longformer({width}, {listed!r}{option})")
