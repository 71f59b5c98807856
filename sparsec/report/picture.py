"""Masks drawn with Braille characters: two dots across and four down in each, so that a square mask looks square.

This file decides how many tokens a dot stands for. It must not know what a mask means beyond its edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sparsec.masks import BoundMask

# Up to this many tokens a mask is drawn from its dense form; above, from tiles, whose edge is a power of two.
_DENSE_TOKENS: Final = 1024
_DOTS_ACROSS: Final = 2
_DOTS_DOWN: Final = 4
_BLANK: Final = 0x2800
# Bits of the dots of a Braille character, by row and column.
# Source: Unicode Standard, block U+2800, dots 1 to 8.
_DOT_BITS: Final = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]], np.int64)


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn mask: queries from top to bottom, keys from left to right.

    Attributes:
        lines: Text lines of equal length.
        tokens: Queries, and keys, that one dot stands for; such a dot is set where they hold at least one edge.
        enlarged: Dots that one pair stands for in each direction, where the mask is smaller than the picture.
    """

    lines: tuple[str, ...]
    tokens: int
    enlarged: int

    @property
    def width(self) -> int:
        return len(self.lines[0])

    def __str__(self) -> str:
        return "\n".join(self.lines)


def picture(bound: BoundMask, dots: int) -> Picture:
    """A mask drawn with at most `dots` dots in its longer direction.

    Args:
        bound: The mask, the same for all heads and batch elements.
        dots: 1 to 128.
    """
    longest = max(bound.shape)
    tokens = max(1, -(-longest // dots))
    if longest > _DENSE_TOKENS:
        tokens = 1 << (tokens - 1).bit_length()
    enlarged = max(1, dots // max(longest, 1))
    cells = _cells(bound, tokens).repeat(enlarged, axis=0).repeat(enlarged, axis=1)
    return Picture(_braille(cells), tokens, enlarged)


def _cells(bound: BoundMask, tokens: int) -> npt.NDArray[np.bool_]:
    """Which squares of `tokens` queries and keys hold an edge."""
    q_len, kv_len = bound.shape
    cells = np.zeros((-(-q_len // tokens), -(-kv_len // tokens)), bool)
    if max(bound.shape) <= _DENSE_TOKENS:
        q, kv = np.nonzero(bound.to_dense())
        cells[q // tokens, kv // tokens] = True
    else:
        tiles = bound.tiles(tokens, tokens)
        cells[np.repeat(np.arange(len(cells)), np.diff(tiles.indptr)), tiles.indices] = True
    return cells


def _braille(cells: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    rows, columns = (max(1, -(-n // per)) for n, per in zip(cells.shape, (_DOTS_DOWN, _DOTS_ACROSS), strict=True))
    padded: npt.NDArray[Any] = np.zeros((rows * _DOTS_DOWN, columns * _DOTS_ACROSS), np.int64)
    padded[: cells.shape[0], : cells.shape[1]] = cells
    dots = padded.reshape(rows, _DOTS_DOWN, columns, _DOTS_ACROSS)
    codes = _BLANK + np.einsum("rdca,da->rc", dots, _DOT_BITS)
    return tuple("".join(map(chr, row)) for row in codes.tolist())
