"""What the CPU kernels should cost: cycles of the C++ of `templates/`, by tile, column, edge and unit.

This file decides the formulas and their coefficients; each coefficient says where it was measured.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsec.analysis import MaskProfile
from sparsec.backends.base import Problem
from sparsec.device import Device
from sparsec.layout import BlockTiles, GatheredTiles

FloatArray = npt.NDArray[np.float32]

# The CPU kernels' costs, in clock cycles. Measured on Zen 4 with AVX-512 (one 512-bit multiply-add a cycle), one
# thread, head_dim 32 to 128, all inputs in cache; other processors scale by clock, vector width and multiply-add rate.
# Share of the multiply-add peak by the number of query vectors a register block holds:
_VECTOR_EFFICIENCY = {
    "fp32": (0.83, 0.87, 0.90, 0.94),
    "fp16": (0.72, 0.78, 0.85, 0.91),
    "bf16": (0.72, 0.78, 0.83, 0.88),
}
# Softmax of one vector of scores: maximum, 2^x, sum, stores.
_SOFTMAX_CYCLES = 14.0
# Taking up a block of queries and writing it out, per query and dimension.
_PACK_CYCLES = 0.9
# A tile whose pattern must be looked through, per key.
_PATTERN_CYCLES = 1.0
# The row kernel: per row, per edge, and per edge and vector of head_dim or v_dim. A row that goes on where tiles left
# it costs the same again.
_ROW_CYCLES, _EDGE_CYCLES, _EDGE_VECTOR_CYCLES = 110.0, 5.0, 2.4
# Keys fetched from beyond the second- and the third-level cache arrive at about so many bytes a cycle and core.
_L3_BYTES_PER_CYCLE, _MEMORY_BYTES_PER_CYCLE = 60.0, 12.0
# Consecutive keys of a pattern that share one decision about live query vectors (CHUNK_STEP of tiles.hpp).
_CHUNK = 8


class CpuModel:
    """The C++ kernels of `templates/`."""

    def __init__(self, problem: Problem, device: Device) -> None:
        self.workers = device.units
        self._problem, self._device = problem, device
        self._ns_per_cycle = 1e9 / device.clock_hz
        if "avx512f" in device.features:
            self._lanes = 16
        elif "avx2" in device.features:
            self._lanes = 8
        else:
            self._lanes = 4
        self._dims = problem.head_dim + problem.v_dim
        has_dot = problem.dtype == "bf16" and "avx512_bf16" in device.features
        # Multiply-adds a lane and cycle: two with bf16 dot products.
        per_cycle = device.vector_flops / (2 * device.units * device.clock_hz * self._lanes)
        self._cycles_per_dim = 1.0 / (per_cycle * (2.0 if has_dot else 1.0))

    def _vector_key_ns(self, vectors: npt.NDArray[np.integer]) -> FloatArray:
        """Of one key and a register block of `vectors` query vectors, together."""
        efficiency = np.array([1.0, *_VECTOR_EFFICIENCY[self._problem.dtype]])
        per_vector = self._dims * self._cycles_per_dim / efficiency[vectors.clip(0, 4)] + _SOFTMAX_CYCLES
        costs: FloatArray = (vectors * per_vector * self._ns_per_cycle).astype(np.float32)
        return costs

    def tiles(self, tiles: BlockTiles, heads: int = 1) -> FloatArray:
        assert heads == 1, "heads share rows on a CPU, not tiles"
        tile_map = tiles.tile_map
        vectors = -(-tile_map.block_q // self._lanes)
        full = tile_map.block_kv * float(self._vector_key_ns(np.array([vectors]))[0])
        if not tiles.n_patterns:
            return np.full(tile_map.n_tiles, full, np.float32)
        looking = np.float32(tile_map.block_kv * _PATTERN_CYCLES * self._ns_per_cycle)
        by_pattern = self._lanes_ns(tiles.lane_masks()) + looking
        costs: FloatArray = np.where(tiles.patterns.index < 0, np.float32(full), by_pattern[tiles.patterns.index])
        return costs

    def rough_tiles(self, profile: MaskProfile) -> float:
        # Inside a tile, keys are skipped a vector of queries at a time: 16 × 16 tiles are near that.
        vector_keys = profile.fill(16).n_tiles * 16.0 * 16 / self._lanes
        return vector_keys * float(self._vector_key_ns(np.array([4]))[0]) / 4

    def _lanes_ns(self, lanes: npt.NDArray[np.uint64]) -> FloatArray:
        """Of adding the keys of each row of `lanes [n, keys]` that some query attends, in chunks as the kernel does."""
        n, keys = lanes.shape
        # The keys nobody attends are skipped before chunks are formed: live keys move to the front.
        order = np.argsort(lanes == 0, axis=1, kind="stable")
        packed = np.take_along_axis(lanes, order, axis=1)
        padded = np.zeros((n, -(-keys // _CHUNK) * _CHUNK), np.uint64)
        padded[:, :keys] = packed
        chunks = padded.reshape(n, -1, _CHUNK)
        live_keys = (chunks != 0).sum(axis=2)
        spanned = _spanned_vectors(np.bitwise_or.reduce(chunks, axis=2), self._lanes)
        costs: FloatArray = (self._vector_key_ns(spanned) * live_keys).sum(axis=1, dtype=np.float32)
        return costs

    def columns(self, gathered: GatheredTiles, heads: int = 1) -> float:
        assert heads == 1, "heads share rows on a CPU, not tiles"
        lanes = gathered.lanes
        if not len(lanes):
            return 0.0
        sample = lanes[: len(lanes) // _CHUNK * _CHUNK][: 1 << 16].reshape(-1, _CHUNK)
        total = self._lanes_ns(sample if len(sample) else lanes.reshape(1, -1)).sum()
        fetched = self._fetch_ns(len(lanes) / max(len(gathered.indptr) - 1, 1) * 16)
        return float(total) / max(sample.size, 1 if len(sample) else len(lanes)) + fetched

    def edge(self, span_keys: float, heads_sharing: int = 1) -> float:
        cycles = _EDGE_CYCLES + self._dims / self._lanes * _EDGE_VECTOR_CYCLES * self._row_slowdown()
        return cycles * self._ns_per_cycle + self._fetch_ns(span_keys) / heads_sharing

    def _row_slowdown(self) -> float:
        return 1.0 if self._problem.dtype == "fp32" else 0.95

    def _fetch_ns(self, span_keys: float) -> float:
        """Of fetching the K and V rows of one key picked from among `span_keys`, where they exceed the L2 cache."""
        row_bytes = self._dims * self._problem.itemsize
        if span_keys * row_bytes <= self._device.l2_bytes:
            return 0.0
        is_far = span_keys * row_bytes > self._device.l3_bytes / 2
        return row_bytes / (_MEMORY_BYTES_PER_CYCLE if is_far else _L3_BYTES_PER_CYCLE) * self._ns_per_cycle

    def unit(self, block_q: int, *, is_rows: bool, is_scattered: bool = False) -> float:
        cycles = _ROW_CYCLES * block_q if is_rows else _PACK_CYCLES * self._dims * block_q + 200.0
        # Rows of q and out in no order are fetched without help from the hardware's prefetcher.
        fetched = 2.0 * block_q * self._fetch_ns(float(self._problem.q_len)) if is_scattered else 0.0
        return cycles * self._ns_per_cycle + fetched


def _spanned_vectors(lanes: npt.NDArray[np.uint64], width: int) -> npt.NDArray[np.int64]:
    """From the first to the last live vector of `width` queries."""
    n_vectors = 64 // width
    mask = np.uint64((1 << width) - 1)
    live = np.stack([(lanes >> np.uint64(i * width)) & mask != 0 for i in range(n_vectors)], axis=-1)
    first = live.argmax(axis=-1)
    last = n_vectors - 1 - live[..., ::-1].argmax(axis=-1)
    spanned: npt.NDArray[np.int64] = np.where(live.any(axis=-1), last - first + 1, 0)
    return spanned
