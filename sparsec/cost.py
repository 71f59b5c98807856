"""What a launch should take: a cost for every tile, gathered column, edge and unit of work, on any device.

This file decides the formulas and their coefficients; each coefficient says where it was measured or read. The same
costs order a schedule, choose among candidates and are told by `explain`. It must not know how candidates are made, nor
any record: a measurement, where there is one, wins over everything here.

Costs are nanoseconds on one worker (a core, a streaming multiprocessor); an `Estimate` divides them among workers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sparsec.analysis import MaskProfile
from sparsec.backends.base import Problem, Work
from sparsec.device import Device
from sparsec.layout import BlockTiles, GatheredTiles

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one launch, or a whole plan, should take.

    Attributes:
        us: Wall time, microseconds.
        compute_us: Arithmetic and fetching of keys, spread evenly over the workers.
        idle_us: What uneven items add to that.
        memory_us: The least time in which q, k, v, out and the index arrays can be moved; `us` is never below it.
        launch_us: Starting the work.
        flops: Useful floating-point operations (4·nnz·head_dim a head where v_dim = head_dim).
    """

    us: float
    compute_us: float
    idle_us: float
    memory_us: float
    launch_us: float
    flops: float

    @property
    def limiter(self) -> str:
        """What most of the time goes to, for a person."""
        parts = {
            "moving q, k, v and out": self.memory_us if self.memory_us >= self.compute_us + self.idle_us else 0.0,
            "uneven work": self.idle_us,
            "starting the kernel": self.launch_us,
            "arithmetic and fetching keys": self.compute_us,
        }
        return max(parts, key=lambda name: parts[name])

    def __add__(self, other: Estimate) -> Estimate:
        """Two launches, one after the other."""
        return Estimate(
            self.us + other.us,
            self.compute_us + other.compute_us,
            self.idle_us + other.idle_us,
            self.memory_us + other.memory_us,
            self.launch_us + other.launch_us,
            self.flops + other.flops,
        )


class CostModel(Protocol):
    """Nanoseconds on one worker, for one head of one batch element."""

    workers: int

    def tiles(self, tiles: BlockTiles, heads: int = 1) -> FloatArray:
        """Of each tile, for so many heads that are packed into it."""
        ...

    def rough_tiles(self, profile: MaskProfile) -> float:
        """Of all tiles together, from the profile alone."""
        ...

    def columns(self, gathered: GatheredTiles, heads: int = 1) -> float:
        """Of a gathered column, on average, likewise."""
        ...

    def edge(self, span_keys: float, heads_sharing: int = 1) -> float:
        """Of a single edge whose keys are picked from among about so many, and fetched once for so many heads."""
        ...

    def unit(self, block_q: int, *, is_rows: bool, is_scattered: bool = False) -> float:
        """Of taking up and writing out a block of queries, which may be scattered over the sequence."""
        ...


@cache
def model_digest() -> str:
    """Of this model: factors that were measured of another are not comparable."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def cost_model(problem: Problem, device: Device) -> CostModel:
    """The costs of a problem on a device, by its own calibration where it has one."""
    model: CostModel = _Cpu(problem, device) if device.kind == "cpu" else _Gpu(problem, device)
    if not device.factors:
        return model
    return _Calibrated(model, device.factor(f"tiles_{problem.dtype}"), device.factor(f"rows_{problem.dtype}"))


class _Calibrated:
    """A model times what was measured over what it estimated: for tiles and for single edges."""

    def __init__(self, model: CostModel, tiles: float, rows: float) -> None:
        self.workers = model.workers
        self._model, self._tiles, self._rows = model, tiles, rows

    def tiles(self, tiles: BlockTiles, heads: int = 1) -> FloatArray:
        costs: FloatArray = self._model.tiles(tiles, heads) * np.float32(self._tiles)
        return costs

    def rough_tiles(self, profile: MaskProfile) -> float:
        return self._model.rough_tiles(profile) * self._tiles

    def columns(self, gathered: GatheredTiles, heads: int = 1) -> float:
        return self._model.columns(gathered, heads) * self._tiles

    def edge(self, span_keys: float, heads_sharing: int = 1) -> float:
        return self._model.edge(span_keys, heads_sharing) * self._rows

    def unit(self, block_q: int, *, is_rows: bool, is_scattered: bool = False) -> float:
        factor = self._rows if is_rows else self._tiles
        return self._model.unit(block_q, is_rows=is_rows, is_scattered=is_scattered) * factor


def estimate(work: Work, problem: Problem, device: Device, heads: int) -> Estimate:
    """What a launch over `work` should take, for so many heads of every batch element."""
    busy_us = float(work.schedule.cost.sum(dtype=np.float64)) * work.schedule.copies * 1e-3
    workers = cost_model(problem, device).workers
    compute_us = busy_us / workers
    idle_us = compute_us * (work.schedule.balance(workers) - 1.0)
    memory_us = (problem.tensor_bytes * heads / problem.q_heads + work.nbytes) / device.memory_bandwidth * 1e6
    us = max(compute_us + idle_us, memory_us) + device.launch_us
    flops = problem.flops(work.bound.nnz) * heads / problem.q_heads
    return Estimate(us, compute_us, idle_us, memory_us, device.launch_us, flops)


def dense_estimate(problem: Problem, device: Device, share: float) -> Estimate:
    """What torch's own attention should take on a `share` of all pairs (1 full, ½ causal).

    Source: on 2 cores of a Zen 4 processor torch 2.13's SDPA reaches 68 % of the fp32 and 34 % of the bf16 peak, and
    takes up every key of every query head in about 1.4 cycles a dimension besides, which one query bears alone; on an
    H200 its best back end reaches about two thirds of the matrix peak.
    """
    matrix = device.matrix_flops.get(problem.dtype, device.vector_flops)
    if device.kind == "cpu":
        rate = 0.68 * device.vector_flops if problem.dtype == "fp32" else 0.34 * matrix
    else:
        rate = 0.66 * matrix
    flops = problem.flops(problem.q_len * problem.kv_len) * share
    compute_us = flops / rate * 1e6
    if device.kind == "cpu":
        dims = problem.batch * problem.q_heads * problem.kv_len * (problem.head_dim + problem.v_dim)
        compute_us += dims * _DENSE_KEY_CYCLES / (device.clock_hz * device.units) * 1e6
    memory_us = problem.tensor_bytes / device.memory_bandwidth * 1e6
    launch_us = device.launch_us
    return Estimate(max(compute_us, memory_us) + launch_us, compute_us, 0.0, memory_us, launch_us, flops)


# What torch's own attention takes on a CPU to take up a key, per dimension.
_DENSE_KEY_CYCLES = 1.4

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


class _Cpu:
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


# GPU kernels, until a device has records. Shares of the matrix peak that published kernels of this kind reach: about
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


class _Gpu:
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
