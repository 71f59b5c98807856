// The numbers that edges have in the mask's own order, for score modifiers that read them.
//
// Decides how the number of each (query, key) of a strip is found from what the layouts store. Knows nothing of scores. A
// modifier that reads none costs nothing: every type below is then empty.
#pragma once

#include "arguments.hpp"
#include "score.hpp"

namespace sx {

// Edges of one query: numbered one by one, or consecutively from `first`.
struct RowEdges {
  const int32_t* numbers = nullptr;
  int32_t first = 0;
  RowEdges from(int64_t n) const { return {numbers ? numbers + n : nullptr, (int32_t)(first + n)}; }
  // Those of the next n ≤ VL edges; any behind them.
  SX_INLINE vi take(int n) const {
    if (!numbers) return iota() + first;
    vi v{};
    for (int i = 0; i < n; ++i) v[i] = numbers[i];
    return v;
  }
};
// Single edges from `at` on, counted as the row lists store them.
SX_INLINE RowEdges row_edges(const Arguments& a, int64_t at) { return {a.row_edges ? a.row_edges + at : nullptr, (int32_t)at}; }

// For the keys of a strip, the edge of each query of a block.
template <int KEYS, int QUERIES, bool EXISTS> class StripEdges {
 public:
  SX_INLINE vi at(int key, int vector) const { return load_as<vi>(numbers_ + key * QUERIES + vector * VL); }
  // Of a key within a tile: consecutive for each query, as its keys come one by one; `next` is moved on.
  SX_INLINE void put(int key, vi* next, int64_t block_q, uint64_t lanes) {
    for (int v = 0; v < block_q / VL; ++v) {
      std::memcpy(numbers_ + key * QUERIES + v * VL, next + v, sizeof(vi));
      const uint32_t bits = (uint32_t)(lanes >> (v * VL)) & ((1u << (VL - 1)) * 2 - 1);
      next[v] += (vi)select_bits(bits, (vf)(vi{} + 1), vf{});
    }
  }
  // Of a gathered key: listed for the queries that attend it.
  SX_INLINE void put(int key, const int32_t* listed, uint64_t lanes) {
    for (; lanes; lanes &= lanes - 1) numbers_[key * QUERIES + __builtin_ctzll(lanes)] = *listed++;
  }

 private:
  alignas(64) int32_t numbers_[KEYS * QUERIES] = {};
};
template <int KEYS, int QUERIES> class StripEdges<KEYS, QUERIES, false> {
 public:
  SX_INLINE int32_t at(int, int) const { return 0; }
  template <class... Where> SX_INLINE void put(Where&&...) {}
};

// The next edge of each query of a block while a tile's keys are gone through.
struct TileEdges {
  explicit TileEdges(const Arguments& a, int64_t tile) {
    if constexpr (Score::NEEDS_EDGES) std::memcpy(next, a.tile_edges + tile * a.block_q, a.block_q * sizeof(int32_t));
  }
  vi next[Score::NEEDS_EDGES ? 64 / VL : 1];
};

}  // namespace sx
