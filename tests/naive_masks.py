"""What every mask means, pair by pair: the slow definitions tests hold `sparsec.masks` to. Shares no code with it."""

from __future__ import annotations

from itertools import product

import numpy as np


def pairs(shape, attends):
    q_len, kv_len = shape
    return np.array([[bool(attends(q, kv)) for kv in range(kv_len)] for q in range(q_len)]).reshape(shape)


def full(shape):
    return np.ones(shape, bool)


def causal(shape, align="top_left"):
    by = shape[1] - shape[0] if align == "bottom_right" else 0
    return pairs(shape, lambda q, kv: kv <= q + by)


def window(shape, left, right):
    return pairs(shape, lambda q, kv: q - left <= kv <= q + right)


def dilated(shape, reach, dilation):
    return pairs(shape, lambda q, kv: abs(q - kv) <= reach and (q - kv) % dilation == 0)


def dilated_2d(shape, block, dilation):
    return pairs(
        shape,
        lambda q, kv: q // block == kv // block and q % block % dilation == 0 and kv % block % dilation == 0,
    )


def strided(shape, stride):
    return pairs(shape, lambda q, kv: (q - kv) % stride == 0)


def global_tokens(shape, tokens):
    chosen = set(range(tokens)) if isinstance(tokens, int) else set(tokens)
    return pairs(shape, lambda q, kv: q in chosen or kv in chosen)


def prefix(shape, n):
    return pairs(shape, lambda q, kv: kv < n)


def documents(shape, lengths):
    owner = [i for i, length in enumerate(lengths) for _ in range(length)]
    return pairs(shape, lambda q, kv: owner[q] == owner[kv])


def blocks(shape, pattern, block):
    return pairs(shape, lambda q, kv: pattern[q // block][kv // block])


def neighborhood(grid, kernel, stride, dilation, causal):
    """Every dimension by the published rule: a window around the stride group's leader, shifted inwards."""
    tokens = list(product(*(range(size) for size in grid)))

    def near(q, kv, size, k, s, d, is_causal):
        if q % d != kv % d:
            return False
        members = len(range(q % d, size, d))
        q, kv = q // d, kv // d
        if is_causal:
            leader = min(q // s * s + s - 1, members - 1)
            return kv <= q and leader - kv < k
        leader = min(q // s * s + s // 2, members - 1)
        left, right = k // 2, k // 2 + k % 2 - 1
        centre = max(left, min(leader, members - 1 - right))
        return centre - left <= kv <= centre + right

    return np.array(
        [
            [
                all(near(*axis) for axis in zip(q, kv, grid, kernel, stride, dilation, causal, strict=True))
                for kv in tokens
            ]
            for q in tokens
        ]
    )
