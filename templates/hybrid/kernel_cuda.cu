// hybrid on NVIDIA GPUs: a block of queries meets its single edges on vector units, then its contiguous tiles and its
// gathered columns on matrix units, all in one launch and one state.
//
// What shared/tiles.cuh says, and SX_LANES (a team, which fetches one row of K or V of a single edge together) and SX_KEYS
// (single edges that a team has in flight).
#include "shared/tiles.cuh"
#include "shared/teams.cuh"

namespace sx {

constexpr int kKeys = SX_KEYS;
using K = Slice<T, kHeadDim, SX_K_BYTES>;
using V = Slice<T, kVDim, SX_V_BYTES>;
using Singles = TeamState<V, kPack, kKeys>;

static_assert(kRows * kStateWords * 4 <= SX_SHARED_BYTES, "the states of single edges pass through shared memory");

// The state of a query's single edges begin ... end - 1, for each head of the pack.
SX_INLINE void walk(const Arguments& a, const Copy& copy, i64 query, i64 begin, i64 end, Singles& state) {
  const int team = threadIdx.x % 32 / kLanes, lane = threadIdx.x % kLanes;
  const T* k_rows = a.k.at<T>(copy.batch, copy.head / a.lists.group);
  const T* v_rows = a.v.at<T>(copy.batch, copy.head / a.lists.group);
  float queries[kPack][K::kSize];
#pragma unroll
  for (int p = 0; p < kPack; ++p) K::load(queries[p], a.q.at<T>(copy.batch, copy.head + p) + query * a.q.row, lane, true);
  for (i64 first = begin; first < end; first += kTeams * kKeys) {
    typename K::Raw k[kKeys];
    typename V::Raw v[kKeys];
    bool is_live[kKeys];
    i64 tokens[kKeys];
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      const i64 edge = first + u * kTeams + team;
      is_live[u] = edge < end;
      tokens[u] = is_live[u] ? token_at(a.lists.kv_order, __ldg(a.lists.row_first + edge)) : 0;
    }
#pragma unroll
    for (int u = 0; u < kKeys; ++u) K::fetch_row(k[u], k_rows + tokens[u] * a.k.row, lane, is_live[u]);
#pragma unroll
    for (int u = 0; u < kKeys; ++u) V::fetch_row(v[u], v_rows + tokens[u] * a.v.row, lane, is_live[u]);
    float scores[kPack][kKeys];
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      float values[K::kSize];
      K::read(k[u], values);
#pragma unroll
      for (int p = 0; p < kPack; ++p) scores[p][u] = team_sum(K::dot(queries[p], values));
    }
#if defined(SX_SCORE)
    const int q_idx = a.lists.first_query + (int)query;
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
#pragma unroll
      for (int u = 0; u < kKeys; ++u)
        if (is_live[u])
          scores[p][u] = Score::value(a.lists.tables, scores[p][u] * a.scale, (int)copy.batch, (int)copy.head + p, q_idx, (int)tokens[u]);
    }
    state.attend(scores, is_live, v, kLog2E);
#else
    state.attend(scores, is_live, v, a.flip ? -a.scale : a.scale);
#endif
  }
  state.join_teams();
}

// The state after an item's single edges. A warp walks those of its own rows; their states pass through shared memory
// into the places that the matrix units have for them.
SX_INLINE void attend_singles(const Arguments& a, const Copy& copy, int item, unsigned char* memory, State& state) {
  const i64 first = a.lists.item_edge[item], last = a.lists.item_edge_stop[item];
  if (first >= last) return;
  const int team = threadIdx.x % 32 / kLanes, lane = threadIdx.x % kLanes;
  float* states = (float*)memory;
  for (int row = warp_row(); row < warp_row() + 16 * kParts; row += kPack) {
    const int position = a.lists.item_unit[item] * kBlockQ + row / kPack;
    Singles singles;
    singles.clear();
    if (position < a.lists.q_len) {
      const i64 low = __ldg(a.lists.row_indptr + position), high = __ldg(a.lists.row_indptr + position + 1);
      const i64 begin = low < first ? first : low, end = high < last ? high : last;
      if (begin < end) walk(a, copy, token_at(a.lists.q_order, position), begin, end, singles);
    }
    if (team != 0) continue;
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
      float* to = states + (row + p) * kStateWords;
      if (lane == 0) to[0] = singles.peak[p], to[1] = singles.total[p];
      V::each(lane, [&](int column, int i) { to[2 + column] = singles.sum[p][i]; });
    }
  }
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kParts; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* from = states + (warp_row() + 16 * m + 8 * half + lane_row()) * kStateWords;
      state.peak[m][half] = from[0];
      // The lanes that share a row add up their totals in the end.
      state.total[m][half] = lane_column() == 0 ? from[1] : 0.0f;
#pragma unroll
      for (int n = 0; n < kVWidth / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * n + lane_column() + e;
          if (kVWidth == kVDim || column < kVDim) state.sum[m][n][2 * half + e] = from[2 + column];
        }
      }
    }
  }
  // Keys are about to be copied to where others' states are.
  __syncthreads();
}

}  // namespace sx

extern "C" __global__ void __launch_bounds__(sx::kThreads, 1) forward(const __grid_constant__ sx::Arguments a) {
  using namespace sx;
  static_assert(sizeof(Arguments) == SX_ARGUMENT_BYTES, "host and device differ in the arguments");
  SX_SHARED_MEMORY(memory);
  unsigned item;
  const Copy copy = copy_of(a.lists, a.lists.n_items, &item);
  State state;
  state.clear();
  attend_singles(a, copy, (int)item, memory, state);
  attend_all(a, copy, (int)item, memory, state);
  finish(a, copy, (int)item, memory, state);
}

extern "C" __global__ void __launch_bounds__(sx::kMergeWarps * 32) merge(const __grid_constant__ sx::Arguments a) {
  sx::merge_pieces(a);
}
