from __future__ import annotations

import numpy as np
import pytest

from sparsec import masks as m
from sparsec.layout import (
    BlockTiles,
    GatheredTiles,
    HybridLayout,
    Ordering,
    RowLists,
    Schedule,
    block_tiles,
    gathered_tiles,
    hybrid_split,
    reordered,
    residue_order,
    row_lists,
    schedule,
)
from sparsec.layout import hybrid as hybrid_module
from sparsec.layout.edges import row_chunks
from sparsec.masks.mask import BoundMask
from sparsec.masks.ranges import RowRanges


def _random(q_len: int, kv_len: int, density: float, seed: int) -> BoundMask:
    """Random edges with an empty row, a full row and a full column."""
    rng = np.random.default_rng(seed)
    dense = rng.random((q_len, kv_len)) < density
    dense[q_len // 3] = False
    dense[q_len // 2] = True
    dense[:, kv_len // 2] |= rng.random(q_len) < 0.7
    return m.from_dense(dense).bind(q_len, kv_len)


CASES = {
    "random-97x97": lambda: _random(97, 97, 0.05, 0),
    "random-130x61": lambda: _random(130, 61, 0.2, 1),
    "random-64x257": lambda: _random(64, 257, 0.01, 2),
    "one-query": lambda: _random(1, 300, 0.3, 3),
    "one-key": lambda: m.full().bind(77, 1),
    "empty": lambda: m.from_dense(np.zeros((50, 70), bool)).bind(50, 70),
    "full-100x90": lambda: m.full().bind(100, 90),
    "causal-150": lambda: m.causal().bind(150),
    "window-200": lambda: m.window(30, 7).bind(200),
    "window-63x130": lambda: m.window(17, 0).bind(63, 130),
    "off-diagonal": lambda: m.window(-40, 60).bind(90),
    "dilated-130": lambda: m.dilated(24, 3).bind(130),
    "strided-causal": lambda: (m.strided(7) & m.causal()).bind(111),
    "longformer": lambda: (m.dilated(32, 2) | m.global_tokens(3)).bind(140),
    "documents": lambda: (m.documents([40, 1, 59, 33]) & m.causal()).bind(133),
    "dilated-2d": lambda: m.dilated_2d(32, 4).bind(150),
    "neighborhood": lambda: m.neighborhood((11, 13), (5, 3), dilation=(2, 1)).bind(143),
    "bigbird": lambda: m.bigbird(16, 1, 1, 2, seed=0).bind(160),
}


@pytest.fixture(params=CASES, name="bound")
def _bound(request: pytest.FixtureRequest) -> BoundMask:
    return CASES[request.param]()


def _dense_of_tiles(tiles: BlockTiles) -> np.ndarray:
    tile_map, patterns = tiles.tile_map, tiles.patterns
    q_len, kv_len = tile_map.shape
    n_rows, n_columns = len(tile_map.indptr) - 1, -(-kv_len // tile_map.block_kv)
    dense = np.zeros((n_rows * tile_map.block_q, n_columns * tile_map.block_kv), np.int64)
    for row in range(n_rows):
        for tile in range(tile_map.indptr[row], tile_map.indptr[row + 1]):
            block = np.ones((tile_map.block_q, tile_map.block_kv), np.uint8)
            if not tile_map.is_full[tile]:
                block = np.unpackbits(patterns.bits[patterns.index[tile]], axis=1, bitorder="little")
            q, kv = row * tile_map.block_q, int(tile_map.indices[tile]) * tile_map.block_kv
            dense[q : q + tile_map.block_q, kv : kv + tile_map.block_kv] += block
            assert tile_map.count[tile] == dense[q:q_len, kv:kv_len][: tile_map.block_q, : tile_map.block_kv].sum()
    return dense[:q_len, :kv_len]


def _dense_of_edges(shape: tuple[int, int], row: np.ndarray, column: np.ndarray) -> np.ndarray:
    dense = np.zeros(shape, np.int64)
    np.add.at(dense, (row, column), 1)
    return dense


def _dense_of_rows(rows: RowLists) -> np.ndarray:
    dense = np.zeros(rows.shape, np.int64)
    for q in range(rows.shape[0]):
        if rows.form == "edges":
            columns = rows.columns[rows.indptr[q] : rows.indptr[q + 1]]
            assert (np.diff(columns) > 0).all()
            dense[q, columns] += 1
            continue
        shift = q if rows.form == "offsets" else 0
        which = slice(None) if rows.form == "offsets" else slice(rows.indptr[q], rows.indptr[q + 1])
        for start, stop, step in zip(rows.start[which], rows.stop[which], rows.step[which], strict=True):
            keys = np.arange(start, stop, step) + shift
            dense[q, keys[(keys >= 0) & (keys < rows.shape[1])]] += 1
    return dense


@pytest.mark.parametrize(("block_q", "block_kv"), [(16, 16), (64, 32), (16, 128), (128, 64)])
def test_block_tiles_hold_every_edge_and_turn_around(bound: BoundMask, block_q: int, block_kv: int) -> None:
    tiles = block_tiles(bound, block_q, block_kv)
    dense = bound.to_dense()
    np.testing.assert_array_equal(_dense_of_tiles(tiles), dense)
    turned = tiles.transpose()
    assert turned.tile_map.shape == dense.T.shape
    np.testing.assert_array_equal(_dense_of_tiles(turned), dense.T)
    direct = bound.T.tiles(block_kv, block_q)
    for name in ("indptr", "indices", "count", "is_full"):
        np.testing.assert_array_equal(getattr(turned.tile_map, name), getattr(direct, name))


def test_lane_and_row_masks_are_the_patterns(bound: BoundMask) -> None:
    tiles = block_tiles(bound, 32, 128)
    bits = np.unpackbits(tiles.patterns.bits, axis=2, bitorder="little").astype(bool)
    lanes, words = tiles.lane_masks(), tiles.row_masks()
    assert lanes.shape == (tiles.n_patterns, 128)
    assert words.shape == (tiles.n_patterns, 32, 2)
    query, key = np.arange(32, dtype=np.uint64), np.arange(128)
    np.testing.assert_array_equal((lanes[:, None, :] >> query[None, :, None]) & np.uint64(1), bits)
    np.testing.assert_array_equal((words[:, :, key // 64] >> (key % 64).astype(np.uint64)) & np.uint64(1), bits)


def test_row_masks_of_narrow_tiles_are_padded() -> None:
    tiles = block_tiles(m.causal().bind(16), 16, 16)
    np.testing.assert_array_equal(tiles.row_masks()[0, :, 0], (np.uint64(2) << np.arange(16, dtype=np.uint64)) - 1)


@pytest.mark.parametrize("block_q", [1, 4, 16, 32, 64])
def test_gathered_tiles_hold_every_edge(bound: BoundMask, block_q: int) -> None:
    tiles = gathered_tiles(bound, block_q)
    dense = bound.to_dense()
    assert tiles.nnz == bound.nnz
    assert (tiles.lanes != 0).all()
    np.testing.assert_array_equal(_dense_of_edges(bound.shape, *tiles.edges()), dense)
    for block in range(len(tiles.indptr) - 1):
        columns = tiles.columns[tiles.indptr[block] : tiles.indptr[block + 1]]
        assert (np.diff(columns) > 0).all()
    turned = tiles.transpose(32)
    np.testing.assert_array_equal(_dense_of_edges(turned.shape, *turned.edges()), dense.T)


def test_gathered_columns_of_single_queries_store_no_bits() -> None:
    bound = _random(50, 300, 0.1, 0)
    tiles = gathered_tiles(bound, 1)
    assert tiles.nnz == len(tiles.columns) == len(tiles.lanes) == bound.nnz
    assert tiles.nbytes == tiles.indptr.nbytes + tiles.columns.nbytes
    assert tiles.lanes.strides == (0,)
    np.testing.assert_array_equal(tiles.columns, bound.to_csr().indices)


def test_row_lists_hold_every_edge_in_every_form(bound: BoundMask) -> None:
    dense = bound.to_dense()
    forms = ["ranges", "edges", None] + (["offsets"] if bound.offsets is not None else [])
    for form in forms:
        rows = row_lists(bound, form)
        assert form in (None, rows.form)
        np.testing.assert_array_equal(_dense_of_rows(rows), dense)
        np.testing.assert_array_equal(rows.degrees(), dense.sum(axis=1))
        turned = rows.transpose()
        np.testing.assert_array_equal(_dense_of_rows(turned), dense.T)
        np.testing.assert_array_equal(turned.degrees(), dense.sum(axis=0))


def test_row_lists_choose_the_smallest_form() -> None:
    assert row_lists(m.window(200, 0).bind(4096)).form == "offsets"
    assert row_lists(m.window(200, 0).bind(10**7)).nbytes < 100
    assert row_lists((m.documents([100] * 20) & m.causal()).bind(2000)).form == "ranges"
    assert row_lists(_random(500, 500, 0.01, 0)).form == "edges"


def _dense_of_hybrid(layout: HybridLayout) -> np.ndarray:
    gathered = _dense_of_edges(layout.gathered.shape, *layout.gathered.edges())
    return _dense_of_tiles(layout.tiles) + gathered + _dense_of_rows(layout.leftovers)


@pytest.mark.parametrize(
    ("block_q", "block_kv", "tile_threshold", "column_threshold"),
    [(16, 16, 40, 3), (32, 64, 300, 2), (64, 16, 10**9, 4), (64, 64, 1, 1), (16, 128, 500, 10**9), (16, 32, 10**9, 1)]
    + [(1, 64, 64, 1), (8, 16, 40, 1), (2, 32, 20, 2)],
)
def test_hybrid_split_holds_every_edge_once(
    bound: BoundMask, block_q: int, block_kv: int, tile_threshold: int, column_threshold: int
) -> None:
    layout = hybrid_split(bound, block_q, block_kv, tile_threshold, column_threshold)
    dense = bound.to_dense()
    np.testing.assert_array_equal(_dense_of_hybrid(layout), dense)
    if block_q >= 16 and block_kv <= 64:
        np.testing.assert_array_equal(_dense_of_hybrid(layout.transpose()), dense.T)
    tile_map = layout.tiles.tile_map
    assert (tile_map.is_full | (tile_map.count >= tile_threshold)).all()
    assert (np.bitwise_count(layout.gathered.lanes) >= column_threshold).all()
    assert sum(layout.nnz) == bound.nnz
    # Nothing that a threshold takes in was left out: no such tile is missing, no such column single.
    every = bound.tiles(block_q, block_kv)
    assert tile_map.n_tiles == (every.is_full | (every.count >= tile_threshold)).sum()
    row, column = np.nonzero(_dense_of_rows(layout.leftovers))
    shared = np.unique(row // block_q * bound.kv_len + column, return_counts=True)[1]
    assert (shared < column_threshold).all()


def test_a_threshold_is_the_least_that_is_taken_in() -> None:
    dense = np.zeros((32, 32), bool)
    dense[:5, :8] = True  # 40 edges of one tile
    dense[20:23, 17] = True  # 3 queries of one column
    for tile_threshold, column_threshold, wanted in ((40, 3, (40, 3, 0)), (41, 4, (0, 40, 3)), (41, 6, (0, 0, 43))):
        assert hybrid_split(m.from_dense(dense).bind(), 16, 16, tile_threshold, column_threshold).nnz == wanted


def test_hybrid_split_is_the_same_from_patterns_and_from_rows(
    bound: BoundMask, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = []
    for share in (0.0, 2.0):
        monkeypatch.setattr(hybrid_module, "_PATTERN_SHARE", share)
        layouts.append(hybrid_split(bound, 16, 32, 100, 3))
    for name in ("indptr", "columns", "lanes"):
        np.testing.assert_array_equal(getattr(layouts[0].gathered, name), getattr(layouts[1].gathered, name))
    np.testing.assert_array_equal(layouts[0].leftovers.columns, layouts[1].leftovers.columns)


def test_hybrid_items_cover_every_list_once(bound: BoundMask) -> None:
    layout = hybrid_split(bound, 16, 16, 60, 3)
    costs = layout.entry_costs(tile=256.0, column=8.0, edge=1.0)
    tiles, gathered = layout.tiles.tile_map.n_tiles, len(layout.gathered.columns)
    edges = layout.leftovers.nnz
    assert costs.sum(dtype=np.float64) == pytest.approx(256 * tiles + 8 * gathered + edges)
    plan = schedule(layout.entry_indptr(), costs, workers=8)
    items = layout.items(plan)
    for start, stop, length in (
        (items.tile_start, items.tile_stop, tiles),
        (items.column_start, items.column_stop, gathered),
        (items.edge_start, items.edge_stop, edges),
    ):
        covered = np.zeros(length, np.int64)
        for first, last in zip(start, stop, strict=True):
            covered[first:last] += 1
        assert (covered == 1).all()
    # An item's stretches belong to its own unit.
    row_block = plan.unit
    assert (items.tile_start >= layout.tiles.tile_map.indptr[row_block]).all()
    assert (items.tile_stop <= layout.tiles.tile_map.indptr[row_block + 1]).all()
    assert (items.column_stop <= layout.gathered.indptr[row_block + 1]).all()
    assert (items.edge_stop <= layout.leftovers.indptr[np.minimum((row_block + 1) * 16, bound.q_len)]).all()
    recomputed = 256 * (items.tile_stop - items.tile_start) + 8 * (items.column_stop - items.column_start)
    np.testing.assert_allclose(plan.cost, recomputed + (items.edge_stop - items.edge_start), rtol=1e-6)


def test_row_chunks_are_aligned_and_bounded() -> None:
    degrees = np.random.default_rng(0).integers(0, 50, 1003)
    chunks = list(row_chunks(degrees, 16, limit=2000))
    assert [stop for _, stop in chunks[:-1]] == [start for start, _ in chunks[1:]]
    assert (chunks[0][0], chunks[-1][1]) == (0, 1003)
    assert all(start % 16 == 0 for start, _ in chunks)
    assert all((degrees[start:stop] + 1).sum() <= 2000 for start, stop in chunks)
    assert list(row_chunks(np.full(40, 1000), 16, limit=10)) == [(0, 16), (16, 32), (32, 40)]


def _check_schedule(plan: Schedule, indptr: np.ndarray) -> None:
    n_units = len(indptr) - 1
    covered = np.zeros(indptr[-1], np.int64)
    for unit, start, stop in zip(plan.unit, plan.start, plan.stop, strict=True):
        assert indptr[unit] <= start <= stop <= indptr[unit + 1]
        covered[start:stop] += 1
    assert (covered == 1).all()
    assert (np.diff(plan.cost) <= 0).all()
    pieces = np.bincount(plan.unit, minlength=n_units)
    assert (pieces >= 1).all()
    empty = np.diff(indptr) == 0
    assert (pieces[empty] == 1).all()
    assert ((plan.stop > plan.start) | empty[plan.unit]).all()
    np.testing.assert_array_equal(plan.slot >= 0, pieces[plan.unit] > 1)
    assert sorted(plan.slot[plan.slot >= 0]) == list(range(plan.n_slots))
    np.testing.assert_array_equal(plan.merge_unit, np.flatnonzero(pieces > 1))
    for unit, first, last in zip(plan.merge_unit, plan.merge_indptr[:-1], plan.merge_indptr[1:], strict=True):
        own = np.flatnonzero(plan.unit == unit)
        own = own[np.argsort(plan.start[own])]
        np.testing.assert_array_equal(plan.slot[own], np.arange(first, last))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("workers", [1, 7, 132])
def test_schedule_covers_every_entry_once(seed: int, workers: int) -> None:
    rng = np.random.default_rng(seed)
    degrees = np.minimum(rng.pareto(0.7, 300) * 3, 20_000).astype(np.int64)
    indptr = np.concatenate(([0], np.cumsum(degrees)))
    cost: np.ndarray | float = rng.random(int(indptr[-1])).astype(np.float32) if seed % 2 else 1.5
    for copies in (1, 32):
        plan = schedule(indptr, cost, workers=workers, copies=copies, item_cost=0.5)
        _check_schedule(plan, indptr)
        assert plan.balance(workers) < 1.3


def test_schedule_splits_one_long_unit_evenly() -> None:
    plan = schedule(np.array([0, 1000]), 1.0, workers=4, max_split=8)
    assert plan.n_items == 8
    assert set((plan.stop - plan.start).tolist()) == {125}
    assert plan.balance(4) == pytest.approx(1.0)
    assert schedule(np.array([0, 1000]), 1.0, workers=4, max_split=1).n_slots == 0
    assert schedule(np.array([0, 1000]), 1.0, workers=4, min_piece=400.0).n_items == 3
    assert schedule(np.array([0, 1000]), 1.0, workers=4).balance(4) == pytest.approx(1.0, abs=0.1)


def test_schedule_of_many_copies_splits_nothing() -> None:
    assert schedule(np.array([0, 1000, 1010]), 1.0, workers=4, copies=64).n_slots == 0


def test_schedule_with_one_huge_entry_and_without_entries() -> None:
    indptr = np.array([0, 5, 5, 9])
    cost = np.array([1, 1000, 1, 1, 1, 1, 1, 1, 1], np.float32)
    _check_schedule(schedule(indptr, cost, workers=16), indptr)
    empty = schedule(np.zeros(4, np.int64), np.zeros(0, np.float32), workers=16)
    _check_schedule(empty, np.zeros(4, np.int64))
    assert empty.balance(16) == 1.0


def test_balance_of_many_items_is_near_the_simulated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    indptr = np.concatenate(([0], np.cumsum(rng.integers(1, 40, 5000))))
    plan = schedule(indptr, 1.0, workers=13, copies=3)
    exact = plan.balance(13)
    monkeypatch.setattr("sparsec.layout.scheduling._SIMULATED_ITEMS", 500)
    assert exact <= plan.balance(13) < exact + 0.02


def test_scattered_rows_are_not_all_read_in_search_of_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    own_rows = BoundMask.rows

    def rows(bound: BoundMask, start: int = 0, stop: int | None = None) -> RowRanges:
        read.append((bound.q_len if stop is None else stop) - start)
        return own_rows(bound, start, stop)

    monkeypatch.setattr(BoundMask, "rows", rows)
    scattered = row_lists(m.random_edges(2, 0).bind(40_000))
    assert scattered.form == "edges"
    assert scattered.nnz == 80_000
    assert sum(read) < 2_000
    assert row_lists(m.documents([30_000, 10_000]).bind(40_000)).form == "ranges"


def test_residue_order_lists_classes() -> None:
    assert residue_order(10, 3).tolist() == [0, 3, 6, 9, 1, 4, 7, 2, 5, 8]
    assert residue_order(3, 5).tolist() == [0, 1, 2]


REORDERED = {
    "dilated": (m.dilated(24, 3), 3),
    "strided": (m.strided(6), 3),
    "single": (m.window(-6, 6), 3),
    "causal-dilated": (m.dilated(40, 4) & m.causal(), 2),
    "longformer": (m.dilated(24, 2) | m.global_tokens([0, 5, 77]), 2),
    "holes": ((m.dilated(24, 2) | m.global_tokens(4)) & ~m.window(2, 2), 2),
    "named": (m.longformer(24, 3, dilation=2), 2),
    "prefix": (m.dilated(24, 2) | m.prefix(5), 2),
    "not-a-multiple": (m.window(3, 3), 2),
    "empty": (m.window(-500, 500), 2),
}


@pytest.mark.parametrize("name", REORDERED)
@pytest.mark.parametrize("length", [96, 131])
def test_reordered_by_residue_classes(name: str, length: int) -> None:
    mask, period = REORDERED[name]
    order = residue_order(length, period)
    bound = mask.bind(length)
    result = reordered(bound, Ordering("residue", order, order))
    np.testing.assert_array_equal(result.to_dense(), bound.to_dense()[np.ix_(order, order)])


def test_reordered_dilation_stores_no_edges() -> None:
    order = residue_order(2**16, 4)
    bound = (m.longformer(32, 9, dilation=4) | m.dilated(1024, 64)).bind(2**16)
    result = reordered(bound, Ordering("residue 4", order, order))
    assert result.nnz == bound.nnz
    assert len(repr(result)) < 1000


@pytest.mark.parametrize("axes", ["q", "kv", "both", "none"])
def test_reordered_by_any_order(bound: BoundMask, axes: str) -> None:
    rng = np.random.default_rng(5)
    q_order = rng.permutation(bound.q_len).astype(np.int32) if axes in ("q", "both") else None
    kv_order = rng.permutation(bound.kv_len).astype(np.int32) if axes in ("kv", "both") else None
    result = reordered(bound, Ordering("random", q_order, kv_order)).to_dense()
    dense = bound.to_dense()
    dense = dense if q_order is None else dense[q_order]
    np.testing.assert_array_equal(result, dense if kv_order is None else dense[:, kv_order])


def test_layouts_tell_their_size() -> None:
    bound = _random(200, 200, 0.1, 0)
    layout = hybrid_split(bound, 16, 16, 60, 3)
    assert layout.nbytes == layout.tiles.nbytes + layout.gathered.nbytes + layout.leftovers.nbytes
    assert isinstance(layout.gathered, GatheredTiles)
    assert layout.gathered.nbytes == layout.gathered.indptr.nbytes + 12 * len(layout.gathered.columns)
    plan = schedule(layout.entry_indptr(), layout.entry_costs(1.0, 1.0, 1.0), workers=3)
    assert plan.nbytes > 0
    assert layout.items(plan).nbytes == 6 * 8 * plan.n_items
