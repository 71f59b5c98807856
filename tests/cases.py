"""The one table of (mask, problem) that every kernel, plan and report is tried on.

A case is a row; its id says mask, lengths, dimensions and what else is unusual (`window-63x130-d64-gqa4x2`). A new
template or back end is found by discovery and meets all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from sparsec import masks as m
from sparsec.backends.base import Problem
from sparsec.masks import BoundMask, Mask


@dataclass(frozen=True, eq=False)
class Case:
    """A mask and the shape it is tried on, with fp32 standing for every dtype.

    Attributes:
        name: Of the mask.
        mask: With open lengths, or such that fit.
        problem: The shape.
        scale: Of the scores; the usual one by default.
        magnitude: What q is multiplied by.
        shift: What every score is about moved by: large scores that still compete.
    """

    name: str
    mask: Mask
    problem: Problem
    scale: float | None = None
    magnitude: float = 1.0
    shift: float = 0.0

    @property
    def id(self) -> str:
        p = self.problem
        parts = [self.name, f"{p.q_len}x{p.kv_len}", f"d{p.head_dim}"]
        if p.v_dim != p.head_dim:
            parts.append(f"v{p.v_dim}")
        if p.q_heads > 1:
            parts.append(f"h{p.q_heads}" if p.q_heads == p.kv_heads else f"gqa{p.q_heads}x{p.kv_heads}")
        if p.batch > 1:
            parts.append(f"b{p.batch}")
        if self.scale is not None:
            parts.append(f"scale{self.scale:g}")
        if self.magnitude != 1.0:
            parts.append(f"magnitude{self.magnitude:g}")
        if self.shift:
            parts.append(f"shift{self.shift:g}")
        return "-".join(parts)

    @property
    def bound(self) -> BoundMask:
        return self.mask.bind(self.problem.q_len, self.problem.kv_len)

    def with_dtype(self, dtype: str) -> Case:
        return _with_dtype(self, dtype)


@cache
def _with_dtype(case: Case, dtype: str) -> Case:
    # Always the same object, so that inputs and expected results are worked out once for all kernels.
    return replace(case, problem=replace(case.problem, dtype=dtype))


def case(
    name: str,
    mask: Mask,
    q_len: int,
    kv_len: int,
    head_dim: int = 64,
    *,
    v_dim: int | None = None,
    heads: tuple[int, int] = (1, 1),
    batch: int = 1,
    scale: float | None = None,
    magnitude: float = 1.0,
    shift: float = 0.0,
) -> Case:
    v_dim = head_dim if v_dim is None else v_dim
    problem = Problem(q_len, kv_len, *heads, head_dim, v_dim, batch=batch)
    return Case(name, mask, problem, scale, magnitude, shift)


def scattered(q_len: int, kv_len: int, density: float, seed: int = 3) -> Mask:
    """Random edges with an empty and a full row and column, and a dense corner: what a graph may look like."""
    dense = np.random.default_rng(seed).random((q_len, kv_len)) < density
    dense[: q_len // 3, : kv_len // 2] |= np.random.default_rng(seed + 1).random((q_len // 3, kv_len // 2)) < 0.8
    dense[q_len // 2] = True
    dense[:, kv_len // 3] = True
    dense[:, kv_len // 5] = False
    dense[q_len // 4] = False
    return m.from_dense(dense)


def by_degree(degrees: list[int], kv_len: int) -> Mask:
    """Row i has degrees[i] keys, evenly spread."""
    rows = [np.unique(np.linspace(i % 3, kv_len - 1, degree).astype(int)) for i, degree in enumerate(degrees)]
    return m.from_csr(np.cumsum([0, *map(len, rows)]), np.concatenate(rows), kv_len)


def one_edge(q_len: int, kv_len: int, q: int, kv: int) -> Mask:
    dense = np.zeros((q_len, kv_len), bool)
    dense[q, kv] = True
    return m.from_dense(dense)


def one_full_row(q_len: int, kv_len: int, q: int) -> Mask:
    dense = np.zeros((q_len, kv_len), bool)
    dense[q] = True
    dense[::7, 1] = True
    return m.from_dense(dense)


def _grid_graph() -> Mask:
    import networkx as nx

    return m.from_graph(nx.convert_node_labels_to_integers(nx.grid_2d_graph(9, 11)))


def _block_mask() -> Mask:
    from torch.nn.attention.flex_attention import create_block_mask

    made = create_block_mask(lambda b, h, q, kv: (q >= kv) & (q - kv < 100), None, None, 200, 200, device="cpu")
    return m.from_block_mask(made)


@cache
def every_constructor() -> tuple[Case, ...]:
    """One case at least for each way to make a mask, at lengths that divide nothing."""
    import scipy.sparse

    rng = np.random.default_rng(5)
    pattern = rng.random((9, 7)) < 0.35
    return (
        case("full", m.full(), 63, 130),
        case("full-square", m.full(), 65, 65),
        case("empty", ~m.full(), 63, 130),
        case("causal", m.causal(), 127, 127),
        case("causal-wide", m.causal(), 63, 130),
        case("causal-tall", m.causal(), 130, 63),
        case("causal-bottom-right", m.causal("bottom_right"), 63, 130),
        case("causal-bottom-right-tall", m.causal("bottom_right"), 130, 63),
        case("window", m.window(20, 5), 63, 130),
        case("window-causal", m.window(31, 0), 129, 64),
        case("window-ahead", m.window(-3, 40), 100, 110),
        case("window-past-the-end", m.window(-90, 200), 100, 110),
        case("diagonal", m.window(0, 0), 101, 101),
        case("dilated", m.dilated(40, 3), 131, 131),
        case("dilated-2d", m.dilated_2d(16, 4), 100, 100),
        case("strided", m.strided(7), 101, 130),
        case("strided-causal", m.strided(8) & m.causal(), 130, 130),
        case("global", m.global_tokens(3), 97, 97),
        case("global-listed", m.global_tokens([5, 64, 96]), 97, 130),
        case("prefix", m.prefix(17), 63, 130),
        case("prefix-causal", m.prefix(17) | m.causal(), 130, 130),
        case("documents", m.documents([1, 63, 2, 64, 31]), 161, 161),
        case("documents-causal", m.documents(cu_seqlens=[0, 70, 71, 140]) & m.causal(), 140, 140),
        case("neighborhood-1d", m.neighborhood((130,), 9, dilation=3, causal=True), 130, 130),
        case("neighborhood-2d", m.neighborhood((9, 13), (3, 5)), 117, 117),
        case("neighborhood-3d", m.neighborhood((4, 5, 6), (3, 3, 2), stride=(2, 1, 1)), 120, 120),
        case("blocks", m.blocks(pattern, 16), 144, 112),
        case("blocks-ragged", m.blocks(pattern, 16), 137, 103),
        case("random-blocks", m.random_blocks(3, 16, 0), 137, 150),
        case("random-edges", m.random_edges(5, 0), 90, 130),
        case("random-edges-many", m.random_edges(40, 1), 90, 130),
        case("longformer", m.longformer(16, 2), 150, 150),
        case("longformer-dilated", m.longformer(16, [3, 77], dilation=2), 150, 150),
        case("bigbird", m.bigbird(16, 3, 1, 2, 0), 160, 160),
        case("from-dense", scattered(70, 131, 0.1), 70, 131),
        case("from-dense-sparse", scattered(131, 70, 0.01), 131, 70),
        case("from-csr", by_degree(list(range(80)), 130), 80, 130),
        case("from-sparse", m.from_sparse(scipy.sparse.random_array((77, 90), density=0.05, rng=rng)), 77, 90),
        case("from-graph", _grid_graph(), 99, 99),
        case("from-mask-mod", m.from_mask_mod(lambda b, h, q, kv: (q - kv).abs() * 3 % 7 < 2), 83, 99),
        case("from-expression", m.from_expression("kv_idx <= q_idx + 4"), 63, 130),
        case("from-block-mask", _block_mask(), 200, 200),
        case("transposed", scattered(70, 131, 0.1).T, 131, 70),
        case("sliced", m.bigbird(16, 3, 1, 2, 0).bind(160)[13:101, 5:160].mask, 88, 155),
        case("complement", ~m.window(5, 5), 90, 63),
        case("difference", m.window(30, 30) - m.strided(3), 90, 90),
        case("dilated-and-window", m.dilated(90, 6) | m.window(9, 9), 200, 200),
        case("one-edge", one_edge(50, 70, 33, 69), 50, 70),
        case("one-full-row", one_full_row(90, 200, 65), 90, 200),
        case("short-rows", by_degree([i % 10 for i in range(75)], 64), 75, 64),
    )


@cache
def every_shape() -> tuple[Case, ...]:
    """Lengths, heads, dimensions, batches, scales and magnitudes, on masks that leave partial tiles everywhere."""
    square = scattered(65, 67, 0.3)
    dims = [(1, 1), (3, 3), (8, 8), (16, 16), (17, 17), (32, 32), (33, 33), (80, 80), (128, 128), (255, 255)]
    dims += [(256, 256), (64, 1), (1, 64), (48, 80), (64, 63), (256, 3), (31, 256)]
    short = by_degree([i % 10 for i in range(41)], 40)
    return (
        case("full", m.full(), 1, 1),
        case("empty", ~m.full(), 1, 1),
        case("full", m.full(), 1, 257),
        case("full", m.full(), 257, 1),
        case("window", m.window(3, 3), 1, 257),
        case("full", m.full(), 64, 64),
        case("full", m.full(), 16, 128),
        case("window", m.window(64, 64), 128, 128),
        *(case("scattered", square, 65, 67, d, v_dim=v) for d, v in dims),
        *(case("short-rows", short, 41, 40, d) for d in (32, 128)),
        case("scattered", square, 65, 67, heads=(8, 2)),
        case("scattered", square, 65, 67, heads=(4, 1), batch=2),
        case("scattered", square, 65, 67, 40, v_dim=24, heads=(3, 3), batch=3),
        case("short-rows", short, 41, 40, heads=(6, 2), batch=2),
        case("causal", m.causal(), 67, 67, heads=(4, 2), batch=2),
        *(case("scattered", square, 65, 67, scale=scale) for scale in (-0.125, 0.0, 1e-20, 3.0)),
        *(case("short-rows", short, 41, 40, scale=scale) for scale in (-0.125, 0.0, 3.0)),
        # Of several strips of keys, of which the later ones outgrow the first.
        case("scattered", scattered(65, 300, 0.3), 65, 300, magnitude=100.0),
        case("scattered", square, 65, 67, magnitude=1e4),
        case("short-rows", short, 41, 40, magnitude=1e4),
        case("scattered", square, 65, 67, shift=1e4),
        case("scattered", square, 65, 67, shift=-1e4),
        case("full", m.full(), 67, 200, shift=1e4),
        case("short-rows", short, 41, 40, shift=1e4),
        case("scattered", square, 65, 67, magnitude=1e-3),
    )


@cache
def cases() -> tuple[Case, ...]:
    return every_constructor() + every_shape()


# One that has everything: empty and full rows, full and partial tiles, single edges, grouped heads, odd dimensions.
HARD = case("hard", scattered(150, 170, 0.04), 150, 170, 40, v_dim=24, heads=(2, 1))
