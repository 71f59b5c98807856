"""What the GPU kernels should cost: of tiles on matrix units, and of rows that are fetched, by published figures.

This file decides the formulas and their coefficients, until a device has records; each coefficient says where it was
read.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsec.analysis import MaskProfile
from sparsec.backends.base import Problem
from sparsec.device import Device
from sparsec.layout import BlockTiles, GatheredTiles

FloatArray = npt.NDArray[np.float32]

# Shares of the matrix peak that published kernels of this kind reach: about
# 523 of 990 TFLOP/s for a sliding window and 598 for 128-blocks on an H100 (FlashAttention 3, MagiAttention).
_MATRIX_EFFICIENCY = 0.53
# A partial tile costs this much more than a full one.
_PARTIAL_FACTOR = 1.15
# Of a tile on matrix units; lower ones take as long.
_LEAST_ROWS = 16
# From here on a tile can use the warp-group instructions of Hopper and newer; below, it reaches this share of the peak
# (Spector et al., "GPUs Go Brrr", Hazy Research 2024: 62 % of an H100's).
_GROUP_ROWS, _BELOW_GROUP = 64, 0.62
# Rows of K and V that the second-level cache holds come at this share of the 64 bytes a clock that a multiprocessor can
# take: assumed, not measured. The fastest published kernel for token-granular top-k reads 4.1 TB/s of rows on an H100
# (523 TFLOP/s at 128 rows a key), which is a share of 0.27 and bounds it from below.
_CACHE_SHARE = 0.4
# Rows of K and V gathered per edge move at this share of the memory bandwidth (Fused3S on GH200: 2.5 of 4.0 TB/s).
_GATHER_SHARE = 0.62
# A thread block's start, prologue and epilogue.
_BLOCK_NS = 1500.0


class GpuModel:
    """Tile kernels on matrix units, row kernels bound by fetching."""

    def __init__(self, problem: Problem, device: Device) -> None:
        self.workers = device.units
        self._dims = problem.head_dim + problem.v_dim
        self._problem = problem
        matrix = device.matrix_flops.get(problem.dtype, device.vector_flops)
        self._flops_per_ns = matrix * _MATRIX_EFFICIENCY / device.units * 1e-9
        self._has_groups = bool({"wgmma", "tcgen05"} & set(device.features)) and problem.dtype != "fp32"
        self._vector_flops_per_ns = device.vector_flops * 0.5 / device.units * 1e-9
        self._key_bytes = self._dims * problem.itemsize
        self._far_ns = self._key_bytes / (device.memory_bandwidth * _GATHER_SHARE / device.units * 1e-9)
        self._near_ns = min(self._far_ns, self._key_bytes / (64.0 * device.clock_hz * _CACHE_SHARE * 1e-9))
        # Keys picked from all over: as much of them as the cache holds comes from there.
        held = min(1.0, device.l2_bytes / (problem.kv_len * self._key_bytes))
        self._picked_ns = held * self._near_ns + (1.0 - held) * self._far_ns

    def _key_ns(self, rows: int) -> float:
        """Of the arithmetic of one key in a tile of so many rows."""
        whole = max(rows, _LEAST_ROWS) * 2.0 * self._dims / self._flops_per_ns
        return whole / _BELOW_GROUP if self._has_groups and rows < _GROUP_ROWS else whole

    def tiles(self, tiles: BlockTiles, heads: int = 1) -> FloatArray:
        tile_map = tiles.tile_map
        # Neighbouring blocks of queries stream the same tiles: they come from the cache.
        full = tile_map.block_kv * max(self._key_ns(tile_map.block_q * heads), self._near_ns)
        return np.where(tile_map.is_full, np.float32(full), np.float32(full * _PARTIAL_FACTOR))

    def rough_tiles(self, profile: MaskProfile) -> float:
        return profile.fill(64).n_tiles * 64.0 * max(self._key_ns(64), self._near_ns)

    def columns(self, gathered: GatheredTiles, heads: int = 1) -> float:
        return max(self._key_ns(gathered.block_q * heads), self._picked_ns)

    def edge(self, span_keys: float, heads_sharing: int = 1) -> float:
        return max(self._far_ns / heads_sharing, 2.0 * self._dims / self._vector_flops_per_ns)

    def unit(self, block_q: int, *, is_rows: bool, is_scattered: bool = False) -> float:
        return _BLOCK_NS / 8 if is_rows else _BLOCK_NS
