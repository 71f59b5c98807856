"""Tiles and patterns of random compositions against their dense form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_strategies import SHAPES, bound_masks, leaves

from sparsec import masks as m
from sparsec.errors import MaskError
from sparsec.masks import derive, periodic, tilemap

blocks = st.sampled_from([8, 16, 32, 64, 128])
low_blocks = st.sampled_from([1, 2, 4, 8, 16, 32, 64])


def check_tiles(bound, dense, tile_map, tile_rows=None):
    """Raises unless the map is exactly the dense mask's."""
    block_q, block_kv = tile_map.block_q, tile_map.block_kv
    n_q, n_kv = -(-dense.shape[0] // block_q), -(-dense.shape[1] // block_kv)
    assert len(tile_map.indptr) == n_q + 1
    found = []
    for i in range(n_q):
        for j in range(n_kv):
            tile = dense[i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
            if tile.any() and (tile_rows is None or i in tile_rows):
                found.append((i, j, int(tile.sum()), bool(tile.all())))
    row = np.repeat(np.arange(n_q), np.diff(tile_map.indptr))
    got = list(
        zip(row.tolist(), tile_map.indices.tolist(), tile_map.count.tolist(), tile_map.is_full.tolist(), strict=True)
    )
    assert got == found
    assert (tile_map.indices.dtype, tile_map.count.dtype, tile_map.indptr.dtype) == (np.int32, np.int32, np.int64)


def check_patterns(dense, tile_map, patterns):
    """Raises unless the patterns paint exactly the dense mask."""
    block_q, block_kv = tile_map.block_q, tile_map.block_kv
    bits = np.unpackbits(patterns.bits, axis=2, bitorder="little").astype(bool)
    assert patterns.bits.shape[1:] == (block_q, block_kv // 8)
    row = np.repeat(np.arange(len(tile_map.indptr) - 1), np.diff(tile_map.indptr))
    for tile, (i, j) in enumerate(zip(row.tolist(), tile_map.indices.tolist(), strict=True)):
        want = dense[i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
        if tile_map.is_full[tile]:
            assert patterns.index[tile] == -1
            continue
        got = bits[patterns.index[tile]]
        assert np.array_equal(got[: want.shape[0], : want.shape[1]], want)
        assert got.sum() == want.sum()
    flat = patterns.bits.reshape(len(patterns.bits), block_q * block_kv // 8)
    assert len(np.unique(flat, axis=0)) == len(flat)
    assert set(patterns.index[~tile_map.is_full].tolist()) == set(range(len(flat)))


@settings(max_examples=150, deadline=None)
@given(bound_masks(), low_blocks, blocks, st.data())
def test_tiles_and_patterns_of_compositions(case, block_q, block_kv, data):
    bound, dense = case
    tile_map = bound.tiles(block_q, block_kv)
    check_tiles(bound, dense, tile_map)
    check_patterns(dense, tile_map, bound.patterns(tile_map))
    n_q = len(tile_map.indptr) - 1
    first = data.draw(st.integers(0, n_q))
    some = range(first, data.draw(st.integers(first, n_q)))
    part = bound.tiles(block_q, block_kv, some)
    check_tiles(bound, dense, part, some)
    check_patterns(dense, part, bound.patterns(part))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SHAPES).flatmap(lambda shape: st.tuples(st.just(shape), leaves(shape))), blocks, blocks)
def test_edges_of_any_tiles_are_counted(case, block_q, block_kv):
    """What compositions ask their parts for: a wrong count of a partial tile may change nothing but their speed."""
    shape, (mask, dense) = case
    part = mask.bind(*shape).mask
    grid = tilemap.Grid(shape, block_q, block_kv)
    keys = grid.keys(range(grid.n_q_tiles))
    counts = part._normal(shape, False, False)._counts_at(grid, keys)
    row, column = np.divmod(keys, grid.n_kv_tiles)
    wanted = [
        dense[i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv].sum()
        for i, j in zip(row, column, strict=True)
    ]
    assert counts.tolist() == wanted


@pytest.mark.parametrize(
    "mask",
    [
        m.window(20, 3) | m.global_tokens(5),
        m.documents([100, 3, 200, 97]) & m.causal(),
        m.bigbird(16, 3, 2, 2, 0),
        m.longformer(64, [3, 200], 2),
        m.random_edges(5, 1) - m.window(9, 9),
        ~m.strided(37),
        ~m.strided(37) & m.documents([150, 250]),
        m.neighborhood((20, 20), (5, 7), causal=(True, False)),
    ],
    ids=str,
)
def test_tiles_of_middling_masks(mask):
    bound = mask.bind(400)
    dense = bound.to_csr().toarray()
    for block_q, block_kv in ((1, 16), (2, 128), (8, 64), (32, 16), (64, 64), (128, 256)):
        tile_map = bound.tiles(block_q, block_kv)
        check_tiles(bound, dense, tile_map)
        check_patterns(dense, tile_map, bound.patterns(tile_map))


@pytest.mark.parametrize(
    "mask",
    [
        m.neighborhood(1000, 7),
        m.neighborhood(999, 9, stride=4, dilation=3, causal=True),
        m.neighborhood((60, 20), (5, 7)),
        m.neighborhood((61, 16), (6, 5), stride=(3, 2), dilation=(2, 3), causal=(True, False)).T,
        m.neighborhood((40, 5, 6), (3, 3, 3)),
        m.neighborhood((64, 16), (3, 16), causal=(False, True)) | m.global_tokens(3),
    ],
    ids=str,
)
def test_tiles_of_masks_with_a_period(mask):
    bound = mask.bind()
    dense = bound.to_csr().toarray()
    for block_q, block_kv in ((8, 16), (16, 8), (32, 32)):
        tile_map = bound.tiles(block_q, block_kv)
        check_tiles(bound, dense, tile_map)
        check_patterns(dense, tile_map, bound.patterns(tile_map))
        some = range(5, 5 + len(tile_map.indptr) // 2)
        part = bound.tiles(block_q, block_kv, some)
        check_tiles(bound, dense, part, some)
        grid = tilemap.Grid(bound.shape, block_q, block_kv)
        keys = grid.keys(range(grid.n_q_tiles))
        counts = tilemap.look_up(keys, tilemap.keys_of(tile_map), tile_map.count)
        assert np.array_equal(bound._body._counts_at(grid, keys), counts)


@pytest.mark.parametrize(
    "mask",
    [
        m.documents([3, 90, 40, 17, 60]),
        m.window(9, 2) | m.global_tokens([5, 70, 130]),
        m.neighborhood((21, 10), (3, 5)),
        m.blocks(m.window(1, 0), 24),
        ~m.strided(7),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [(32, 96), (64, 210), (48, 112), (0, 40)], ids=str)
def test_tiles_of_rows_of_a_mask(mask, rows):
    """Whole rows of tiles are the mask's own; others are cut."""
    whole = mask.bind(210)
    part = whole[rows[0] : rows[1], 0:210]
    dense = whole.to_dense()[rows[0] : rows[1]]
    for block_q, block_kv in ((16, 32), (32, 16), (64, 64)):
        tile_map = part.tiles(block_q, block_kv)
        check_tiles(part, dense, tile_map)
        check_patterns(dense, tile_map, part.patterns(tile_map))
        some = range(1, len(tile_map.indptr) - 1)
        check_tiles(part, dense, part.tiles(block_q, block_kv, some), some)
        grid = tilemap.Grid(part.shape, block_q, block_kv)
        keys = np.arange(grid.n_q_tiles * grid.n_kv_tiles)
        counts = tilemap.look_up(keys, tilemap.keys_of(tile_map), tile_map.count)
        assert np.array_equal(part._body._counts_at(grid, keys), counts)


def test_large_tiles_of_masks_with_a_period_are_put_together_from_small_ones(monkeypatch):
    sizes = []
    own = derive.tiles
    monkeypatch.setattr(periodic, "_FINE", 8)
    monkeypatch.setattr(derive, "tiles", lambda mask, grid, rows: sizes.append(grid.block_q) or own(mask, grid, rows))
    for mask in (m.neighborhood((60, 19), (5, 7)), m.neighborhood((60, 19), (5, 7), causal=True).T):
        bound = mask.bind()
        for block_q, block_kv in ((64, 64), (128, 64)):
            check_tiles(bound, bound.to_dense(), bound.tiles(block_q, block_kv))
    assert set(sizes) == {8}


def test_a_period_spares_reading_rows():
    bound = m.neighborhood((2000, 32), (3, 5)).bind()
    read = []
    own_rows = type(bound._body)._rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(bound._body),
            "_rows",
            lambda self, shape, start, stop: read.append(stop - start) or own_rows(self, shape, start, stop),
        )
        bound.patterns(bound.tiles(64, 64))
    assert sum(read) < bound.q_len / 50


def test_tiles_of_the_same_strips_and_another_area_differ():
    """Ten queries of ten keys are all of a ragged tile, and a corner of a whole one."""
    over = np.zeros((37, 37), np.bool_)
    over[:5, :5] = over[32:, 32:] = True
    bound = m.blocks(over, 2).bind(74)
    found = bound._body._bits_at(tilemap.Grid(bound.shape, 64, 64), np.arange(4))
    assert found.index[1:].tolist() == [tilemap.EMPTY, tilemap.EMPTY, tilemap.FULL]
    assert found.index[0] >= 0
    assert np.bitwise_count(found.bits[found.index[0]]).sum() == 100


def test_equal_hashes_do_not_join_strips(monkeypatch):
    class Zeros:
        def integers(self, low, high, size, dtype):
            # Of all but the last multiplier nothing is left.
            return np.zeros(size, dtype)

    bound = m.documents([3, 9, 1, 30, 40, 17]).bind(100)
    tile_map = bound.tiles(16, 16)
    monkeypatch.setattr(np.random, "Generator", lambda _: Zeros())
    check_patterns(bound.to_dense(), tile_map, bound.patterns(tile_map))


def test_chunks_join_without_a_seam(monkeypatch):
    from sparsec.masks import derive, runs

    monkeypatch.setattr(derive, "RANGES_PER_CHUNK", 32)
    monkeypatch.setattr(runs, "ROWS_A_STEP", 64)
    monkeypatch.setattr(tilemap, "PAINT_BYTES", 2**11)
    mask = (m.documents([30, 50, 20, 100]) & m.causal()) | m.blocks(m.random_edges(2, 0), 16) | m.strided(13)
    bound = mask.bind(200)
    dense = bound.to_dense()
    assert np.array_equal(bound.to_csr().toarray(), dense)
    assert bound.nnz == dense.sum()
    tile_map = bound.tiles(32, 32)
    check_tiles(bound, dense, tile_map)
    check_patterns(dense, tile_map, bound.patterns(tile_map))


def test_equal_hashes_do_not_join_patterns(monkeypatch):
    bits = np.zeros((3, 8, 8), np.uint8)
    bits[1, 0, 0], bits[2, 0, 0] = 1, 2

    class Zeros:
        def integers(self, low, high, size, dtype):
            # Multipliers of 2**63 lose all but the lowest bit.
            return np.full(size, 2**62, dtype)

    monkeypatch.setattr(np.random, "Generator", lambda _: Zeros())
    patterns, entry = tilemap.distinct(bits)
    assert np.array_equal(patterns[entry], bits)


@pytest.mark.parametrize(("block_q", "block_kv"), [(7, 8), (8, 12), (8, 4), (0, 8)])
def test_blocks_must_be_powers_of_two(block_q, block_kv):
    with pytest.raises(MaskError, match="power of two"):
        m.full().bind(16).tiles(block_q, block_kv)
