"""Masks from predicates and block masks, against torch's dense evaluation."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_expr import BOOLS
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask, noop_mask

from sparsec.errors import MaskError
from sparsec.expr import Expr, Var
from sparsec.masks.mask import Mask
from sparsec.masks.predicate import Predicate, from_block_mask, from_expression, from_mask_mod
from sparsec.masks.toeplitz import causal, dilated, full, window

DOCUMENT_ID = torch.from_numpy(np.sort(np.random.default_rng(0).integers(0, 9, 200)))
SHUFFLED_ID = DOCUMENT_ID[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
BLOCKS = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) > 0.5

MASK_MODS: dict[str, Any] = {
    "causal": lambda b, h, q, k: q >= k,
    "everything": noop_mask,
    "nothing": lambda b, h, q, k: q < -k - 1,
    "window-hole": lambda b, h, q, k: ((q - k).abs() <= 9) & (q - k != 4),
    "dilated": lambda b, h, q, k: (q - k) % 3 == 0,
    "document": lambda b, h, q, k: DOCUMENT_ID[q] == DOCUMENT_ID[k],
    "document-causal": lambda b, h, q, k: (DOCUMENT_ID[q] == DOCUMENT_ID[k]) & (q >= k),
    "shuffled": lambda b, h, q, k: SHUFFLED_ID[q] == SHUFFLED_ID[k],
    "block-table": lambda b, h, q, k: BLOCKS[q // 32, k // 32],
    "grid": lambda b, h, q, k: (q % 4 == 0) & (k % 4 == 1),
    "scattered": lambda b, h, q, k: (q * k) % 7 < 3,
    "slope": lambda b, h, q, k: q >= 2 * k,
    "float": lambda b, h, q, k: torch.sin(q * 0.1) > torch.cos(k * 0.1),
    "prefix": lambda b, h, q, k: (k < 20) | (q >= k),
}
SHAPES = [(130, 130), (77, 190), (200, 63), (1, 50), (50, 1)]


def dense(mask_mod: Any, shape: tuple[int, int], batch: int = 0, head: int = 0) -> np.ndarray:
    return create_mask(mask_mod, batch + 1, head + 1, *shape, device="cpu")[batch, head].numpy()


def check(mask: Mask, want: np.ndarray) -> None:
    bound = mask.bind(*want.shape)
    np.testing.assert_array_equal(bound.to_dense(), want)
    assert bound.nnz == want.sum()
    np.testing.assert_array_equal(bound.degrees("q"), want.sum(1))
    np.testing.assert_array_equal(bound.degrees("kv"), want.sum(0))
    tiles = bound.tiles(16, 32)
    padded = np.zeros((-(-want.shape[0] // 16) * 16, -(-want.shape[1] // 32) * 32), np.int64)
    padded[: want.shape[0], : want.shape[1]] = want
    counts = padded.reshape(len(padded) // 16, 16, -1, 32).sum((1, 3))
    assert tiles.nnz == want.sum()
    np.testing.assert_array_equal(tiles.count, counts[counts > 0])
    np.testing.assert_array_equal(bound.T.to_dense(), want.T)


@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", MASK_MODS)
def test_edges(name: str, shape: tuple[int, int]):
    check(from_mask_mod(MASK_MODS[name]), dense(MASK_MODS[name], shape))


@settings(deadline=None, max_examples=60)
@given(BOOLS, st.integers(1, 40), st.integers(1, 40))
def test_edges_of_any_expression(expr: Expr, q_len: int, kv_len: int):
    mask = Predicate(expr.substitute({"h": 1}).simplify())
    q, kv = np.ogrid[:q_len, :kv_len]
    want = np.broadcast_to(mask.expr.evaluate(q_idx=q, kv_idx=kv), (q_len, kv_len))
    rows = mask._rows((q_len, kv_len), 0, q_len)
    got = np.zeros((q_len, kv_len), np.bool_)
    for i in range(q_len):
        for r in range(rows.indptr[i], rows.indptr[i + 1]):
            keys = slice(rows.start[r], rows.stop[r], rows.step[r])
            assert not got[i, keys].any()
            got[i, keys] = True
    np.testing.assert_array_equal(got, want)


def test_parts_and_compositions():
    mask_mod = MASK_MODS["document-causal"]
    mask, want = from_mask_mod(mask_mod), dense(mask_mod, (190, 190))
    check(~mask, ~want)
    check(mask & window(5, 0), want & dense(lambda b, h, q, k: (q >= k) & (q - k <= 5), (190, 190)))
    check(
        mask | dilated(40, 5), want | dense(lambda b, h, q, k: ((q - k).abs() <= 40) & ((q - k) % 5 == 0), (190, 190))
    )
    np.testing.assert_array_equal(mask.bind(190)[13:77, 5:60].to_dense(), want[13:77, 5:60])
    assert mask.bind(190).rows(50, 61).nnz == want[50:61].sum()


def test_predicates_of_the_offset_are_the_masks_they_mean():
    assert from_mask_mod(lambda b, h, q, k: (q - k <= 5) & (q >= k)).bind(64) == window(5, 0).bind(64)
    assert from_mask_mod(lambda b, h, q, k: ((k - q) % 4 == 0) & ((q - k).abs() <= 16)).bind(99) == dilated(16, 4).bind(
        99
    )
    assert from_mask_mod(noop_mask).bind(9, 5) == full().bind(9, 5)
    offsets = from_mask_mod(lambda b, h, q, k: (q - k <= 5) & (q >= k)).bind(64).offsets
    assert offsets is not None
    assert (offsets.start.tolist(), offsets.stop.tolist()) == ([-5], [1])


def test_equality_is_by_meaning_of_the_expression():
    ids = DOCUMENT_ID.clone()
    left = from_mask_mod(and_masks(MASK_MODS["document"], MASK_MODS["causal"]))
    right = from_mask_mod(lambda b, h, q, k: ~(k > q) & (ids[k] == ids[q]))
    assert left == right
    assert hash(left) == hash(right)
    assert left.bind(100).digest == right.bind(100).digest
    assert left.bind(100) == (causal() & from_mask_mod(MASK_MODS["document"])).bind(100)
    assert left != from_mask_mod(MASK_MODS["shuffled"])


def test_repr_reads_back():
    for name, mask_mod in MASK_MODS.items():
        mask = from_mask_mod(mask_mod)
        assert eval(repr(mask), {"from_expression": from_expression}) == mask, name
    one, two = np.arange(3), np.arange(3) + 1

    def same_name(table: np.ndarray) -> Any:
        return lambda b, h, q, k: table[q] > k

    mask = from_mask_mod(same_name(one)) & from_mask_mod(same_name(two))
    assert repr(mask.bind(3).mask).count("table=[") == 2
    merged = from_mask_mod(and_masks(same_name(one), same_name(two)))
    assert eval(repr(merged), {"from_expression": from_expression}) == merged


def test_heads_and_batch_elements_are_selected():
    mask = from_mask_mod(lambda b, h, q, k: (q - k < 4 * (h + 1)) & (k >= 3 * b))
    assert mask.varies_by_head
    assert mask.varies_by_batch
    assert mask.n_heads is None
    bound = mask.bind(40)
    with pytest.raises(MaskError, match="select"):
        bound.rows()
    for batch, head in ((0, 0), (2, 1)):
        want = dense(lambda b, h, q, k: (q - k < 4 * (h + 1)) & (k >= 3 * b), (40, 40), batch, head)
        np.testing.assert_array_equal(bound.select(batch, head).to_dense(), want)


def test_predicate_is_the_expression():
    expr = from_mask_mod(lambda b, h, q, k: q > k).bind(10).predicate
    assert expr == (Var("q_idx") - Var("kv_idx") >= 1)


def test_from_expression():
    assert from_expression("q_idx - kv_idx <= 3").bind(9) == from_mask_mod(lambda b, h, q, k: q - k < 4).bind(9)
    for text, says in {
        "q_idx +": "invalid syntax",
        "__import__('os')": "cannot read",
        "x > 3": "cannot read",
        "q_idx": "it is int",
        "score > 0": "bool expression of",
        "doc[q_idx, kv_idx] > 0": "needs 1 indices",
    }.items():
        with pytest.raises(MaskError, match=says):
            from_expression(text, doc=[0, 1])


def test_a_table_that_is_too_short_is_refused():
    mask = from_mask_mod(MASK_MODS["document"])
    with pytest.raises(MaskError, match=r"indices 0 to 255 at q_len = 256.*200 entries"):
        mask.bind(256)


def test_a_million_tokens_of_documents_are_not_looked_at_pair_by_pair(monkeypatch):
    evaluate, looked_at = Expr.evaluate, []

    def counted(self, **values):
        result = evaluate(self, **values)
        looked_at.append(np.size(result))
        assert sum(looked_at) < 2**30, "more pairs than there are edges"
        return result

    monkeypatch.setattr(Expr, "evaluate", counted)
    lengths = np.random.default_rng(0).integers(1, 600, 5000)
    ids = np.repeat(np.arange(5000, dtype=np.int32), lengths)[: 2**20]
    assert len(ids) == 2**20
    table = torch.from_numpy(ids)
    bound = from_mask_mod(lambda b, h, q, k: (table[q] == table[k]) & (q >= k)).bind(2**20)
    counts = np.bincount(ids)
    assert bound.nnz == (counts * (counts + 1) // 2).sum()
    assert 0 < sum(looked_at) < bound.nnz
    tracemalloc.start()
    bound.rows(500_000, 510_000)
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()


# Block masks.


def block_dense(block_mask: Any, mask_mod: Any, shape: tuple[int, int], batch: int = 0, head: int = 0) -> np.ndarray:
    """Full blocks, and mask_mod inside partial ones, written out."""
    listed = {}
    for kind, counts, indices in (
        ("partial", block_mask.kv_num_blocks, block_mask.kv_indices),
        ("full", block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ):
        grid = np.zeros(shape, np.bool_)
        if counts is not None:
            counts, indices = counts[batch, head], indices[batch, head]
            for i, count in enumerate(counts.tolist()):
                for j in indices[i, :count].tolist():
                    (q, k) = block_mask.BLOCK_SIZE
                    grid[i * q : (i + 1) * q, j * k : (j + 1) * k] = True
        listed[kind] = grid
    return listed["full"] | (listed["partial"] & dense(mask_mod, shape, batch, head))


@pytest.mark.parametrize("shape", [(256, 256), (100, 300), (300, 129)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", ["causal", "document-causal", "window-hole", "everything", "prefix", "nothing"])
@pytest.mark.parametrize("block", [128, 32])
def test_block_mask_is_torchs_dense_mask(name: str, shape: tuple[int, int], block: int):
    ids = torch.arange(300) // 37

    def document_causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (ids[q] == ids[k]) & (q >= k)

    mask_mod = document_causal if name == "document-causal" else MASK_MODS[name]
    block_mask = create_block_mask(mask_mod, None, None, *shape, device="cpu", BLOCK_SIZE=block)
    mask = from_block_mask(block_mask)
    want = dense(mask_mod, shape)
    np.testing.assert_array_equal(block_dense(block_mask, mask_mod, shape), want)
    check(mask, want)


def test_block_mask_keeps_to_its_blocks():
    block_mask = create_block_mask(MASK_MODS["window-hole"], None, None, 256, 256, device="cpu", BLOCK_SIZE=32)
    # True everywhere, in the listed blocks and outside them.
    block_mask.mask_mod = noop_mask
    want = block_dense(block_mask, noop_mask, (256, 256))
    assert 0 < want.sum() < 256 * 256
    check(from_block_mask(block_mask), want)
    block_mask.mask_mod = MASK_MODS["scattered"]
    check(from_block_mask(block_mask), block_dense(block_mask, MASK_MODS["scattered"], (256, 256)))


def test_block_mask_with_unequal_blocks_that_are_no_powers_of_two():
    block_mask = create_block_mask(MASK_MODS["slope"], None, None, 200, 190, device="cpu", BLOCK_SIZE=(48, 20))
    mask = from_block_mask(block_mask)
    check(mask, dense(MASK_MODS["slope"], (200, 190)))
    again = eval(repr(mask), {"from_expression": from_expression})
    np.testing.assert_array_equal(again.bind(200, 190).to_dense(), mask.bind(200, 190).to_dense())


def test_block_mask_of_several_heads_and_batch_elements():
    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q - k < 16 * (h + 1)) & (k >= 20 * b)

    block_mask = create_block_mask(mask_mod, 2, 3, 100, 100, device="cpu", BLOCK_SIZE=32)
    bound = from_block_mask(block_mask).bind(100)
    assert (bound.n_batch, bound.n_heads) == (2, 3)
    for batch in range(2):
        for head in range(3):
            np.testing.assert_array_equal(
                bound.select(batch, head).to_dense(), dense(mask_mod, (100, 100), batch, head)
            )


def test_block_mask_of_one_listed_head_whose_predicate_varies():
    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k < 16 * (h + 1)

    block_mask = create_block_mask(noop_mask, None, None, 64, 64, device="cpu", BLOCK_SIZE=32)
    block_mask.kv_num_blocks, block_mask.full_kv_num_blocks = block_mask.full_kv_num_blocks, block_mask.kv_num_blocks
    block_mask.kv_indices, block_mask.full_kv_indices = block_mask.full_kv_indices, block_mask.kv_indices
    block_mask.mask_mod = mask_mod
    bound = from_block_mask(block_mask).bind(64)
    assert bound.varies_by_head
    np.testing.assert_array_equal(bound.select(0, 1).to_dense(), dense(mask_mod, (64, 64), 0, 1))


def test_block_mask_refuses_anything_else():
    with pytest.raises(MaskError, match="BlockMask; found ndarray"):
        from_block_mask(np.eye(3))
