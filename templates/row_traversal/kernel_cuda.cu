// row_traversal on NVIDIA GPUs: each query walks its own keys, so the work is exactly nnz dot products.
//
// The bins of rows are in rows.cuh. Specialised by -D on: SX_T and SX_OUT (element types of the inputs and the output),
// SX_HEAD_DIM, SX_V_DIM, SX_K_BYTES and SX_V_BYTES (bytes of a row that a lane fetches at once), SX_LANES (a team),
// SX_KEYS (keys a team has in flight), SX_PACK (query heads that share each row of K and V fetched), SX_WARPS (a
// block), SX_RESIDENT (blocks that a multiprocessor is to hold), SX_FORM (of the rows), SX_SCORE (where a header says how
// scores are modified).
#if defined(SX_BACKWARD)
#include "row_traversal/backward.cuh"
#else
#include "row_traversal/rows.cuh"
#include "shared/states.cuh"

namespace sx {

using T = SX_T;
using Out = SX_OUT;
constexpr int kPack = SX_PACK, kVDim = SX_V_DIM;
using K = Slice<T, SX_HEAD_DIM, SX_K_BYTES>;
using V = Slice<T, SX_V_DIM, SX_V_BYTES>;

// The host's side of it is `ForwardArguments` in backends/cuda_calls.py.
struct Arguments {
  Lists lists;
  Tensor q, k, v, out;
  float* lse;  // [batch, heads, rows] by the strides, or null
  i64 lse_batch, lse_head;
  float* partial;  // [copies, slots, kPack, 2 + v_dim]: peak, total, weighted sum
  float scale;     // of the scores; times log2(e), unless they are modified
};

using State = TeamState<V, kPack, kKeys>;

SX_INLINE void write_row(const Arguments& a, const Copy& copy, i64 token, const State& state, int lane) {
#pragma unroll
  for (int p = 0; p < kPack; ++p) {
    float values[V::kSize];
    const float inverse = inverse_of(state.total[p]);
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) values[i] = state.sum[p][i] * inverse;
    V::store(a.out.at<Out>(copy.batch, copy.head + p) + token * a.out.row, values, lane);
    if (a.lse && lane == 0)
      a.lse[copy.batch * a.lse_batch + (copy.head + p) * a.lse_head + token] = lse_of(state.peak[p], state.total[p]);
  }
}

// The state after a team's next keys. While their rows are on their way, those after them are looked up: of the same row,
// or, after its last, of the row `ahead`.
template <bool IS_FULL>
SX_INLINE void attend(const Arguments& a, const Copy& copy, const Job& job, const T* k_rows, const T* v_rows,
                      const float (&query)[kPack][K::kSize], i64 token, bool is_last, Keys<SX_FORM>& keys,
                      Keys<SX_FORM>& ahead, int lane, State& state) {
  typename K::Raw k[kKeys];
  typename V::Raw v[kKeys];
  bool is_live[kKeys];
  int tokens[kKeys], edges[kKeys];
#pragma unroll
  for (int u = 0; u < kKeys; ++u) {
    tokens[u] = keys.tokens[u], edges[u] = keys.edge(u);
    is_live[u] = IS_FULL || tokens[u] >= 0;
    K::fetch_row(k[u], k_rows + tokens[u] * a.k.row, lane, is_live[u]);
  }
#pragma unroll
  for (int u = 0; u < kKeys; ++u) V::fetch_row(v[u], v_rows + tokens[u] * a.v.row, lane, is_live[u]);
  if (is_last)
    ahead.advance(a.lists, job);
  else
    keys.advance(a.lists, job);

  float scores[kPack][kKeys];
#pragma unroll
  for (int u = 0; u < kKeys; ++u) {
    float values[K::kSize];
    K::read(k[u], values);
#pragma unroll
    for (int p = 0; p < kPack; ++p) scores[p][u] = K::dot(query[p], values);
  }
#pragma unroll
  for (int p = 0; p < kPack; ++p) {
#pragma unroll
    for (int u = 0; u < kKeys; ++u) scores[p][u] = team_sum(scores[p][u]);
  }
#if defined(SX_SCORE)
#pragma unroll
  for (int p = 0; p < kPack; ++p) {
#pragma unroll
    for (int u = 0; u < kKeys; ++u)
      if (is_live[u])
        scores[p][u] = Score::value(a.lists.tables, scores[p][u] * a.scale, (int)copy.batch, (int)copy.head + p, a.lists.first_query + (int)token, tokens[u], edges[u]);
  }
  state.attend(scores, is_live, v, kLog2E);
#else
  state.attend(scores, is_live, v, a.scale);
#endif
}

constexpr int kStateWords = kVDim + 2;

// Joins `n` states of one head, `stride` floats apart, in their order; the block shares the columns.
SX_INLINE void join(const Arguments& a, const Copy& copy, int p, i64 token, const float* states, int n, i64 stride, float* to) {
  Out* row = a.out.at<Out>(copy.batch, copy.head + p) + token * a.out.row;
  const float2 joined = join_states<kVDim>(states, n, stride, threadIdx.x, blockDim.x, [&](int column, float sum, float total) {
    if (to) {
      to[2 + column] = sum;
    } else {
      sum *= inverse_of(total);
      Writer<Out, 1>::write(row + column, &sum);
    }
  });
  if (threadIdx.x == 0) {
    if (to)
      to[0] = joined.x, to[1] = joined.y;
    else if (a.lse)
      a.lse[copy.batch * a.lse_batch + (copy.head + p) * a.lse_head + token] = lse_of(joined.x, joined.y);
  }
}

}  // namespace sx

extern "C" __global__ void __launch_bounds__(SX_WARPS * 32, SX_RESIDENT) forward(const __grid_constant__ sx::Arguments a) {
  using namespace sx;
  static_assert(sizeof(Arguments) == SX_ARGUMENT_BYTES, "host and device differ in the arguments");
  __shared__ float states[kWarps][kPack][kStateWords];
  const int warp = threadIdx.x / 32, team = threadIdx.x % 32 / kLanes, lane = threadIdx.x % kLanes;
  unsigned index;
  const Copy copy = copy_of(a.lists, n_jobs(a.lists), &index);
  const Job job = job_of(a.lists, (int)index, warp, team);
  const i64 kv_head = copy.head / a.lists.group;
  const T* k_rows = a.k.at<T>(copy.batch, kv_head);
  const T* v_rows = a.v.at<T>(copy.batch, kv_head);
  State state;

  Keys<SX_FORM> keys, ahead;
  keys.open(a.lists, job, job.entry);
  keys.advance(a.lists, job);
  for (int i = 0; i < job.n_rows; ++i, keys = ahead) {
    // The next row's list is looked up, and its first keys fetched, while this row's are in use.
    ahead.open(a.lists, job, i + 1 < job.n_rows ? job.entry + (i + 1) * job.stride : job.end);
    const bool is_row = keys.row >= 0;
    const i64 token = is_row ? token_of(a.lists, keys.row) : 0;
    float query[kPack][K::kSize];
#pragma unroll
    for (int p = 0; p < kPack; ++p)
      K::load(query[p], a.q.at<T>(copy.batch, copy.head + p) + token * a.q.row, lane, is_row);
    state.clear();

    const int trips = most_of_teams(keys.trips), full = least_of_teams(keys.full);
    if (trips == 0) ahead.advance(a.lists, job);
    for (int trip = 0; trip < trips; ++trip) {
      // While every team has all its keys, nothing is asked of each.
      if (trip < full)
        attend<true>(a, copy, job, k_rows, v_rows, query, token, trip + 1 == trips, keys, ahead, lane, state);
      else
        attend<false>(a, copy, job, k_rows, v_rows, query, token, trip + 1 == trips, keys, ahead, lane, state);
    }

    if (job.bin == Job::kTeam) {
      if (is_row) write_row(a, copy, token, state, lane);
    } else {
      state.join_teams();
      if (job.bin == Job::kWarp) {
        if (is_row && team == 0) write_row(a, copy, token, state, lane);
      } else if (team == 0) {
#pragma unroll
        for (int p = 0; p < kPack; ++p) {
          float* mine = states[warp][p];
          if (lane == 0) mine[0] = state.peak[p], mine[1] = state.total[p];
          V::each(lane, [&](int column, int i) { mine[2 + column] = state.sum[p][i]; });
        }
      }
    }
  }
  if (job.bin != Job::kPiece) return;

  __syncthreads();
  const int row = a.lists.piece_row[job.entry], slot = a.lists.piece_slot[job.entry];
  for (int p = 0; p < kPack; ++p) {
    float* to = slot < 0 ? nullptr : a.partial + ((copy.index * a.lists.n_slots + slot) * kPack + p) * kStateWords;
    join(a, copy, p, token_of(a.lists, row), states[0][p], kWarps, kPack * kStateWords, to);
  }
}

// Joins the pieces of each split row in their order: deterministic. One block a row and head.
extern "C" __global__ void __launch_bounds__(128) merge(const __grid_constant__ sx::Arguments a) {
  using namespace sx;
  unsigned index;
  const Copy copy = copy_of(a.lists, a.lists.n_merges * kPack, &index);
  const int merged = index / kPack, p = index % kPack;
  const i64 first = a.lists.merge_indptr[merged], n = a.lists.merge_indptr[merged + 1] - first;
  const float* states = a.partial + ((copy.index * a.lists.n_slots + first) * kPack + p) * kStateWords;
  join(a, copy, p, token_of(a.lists, a.lists.merge_row[merged]), states, (int)n, kPack * kStateWords, nullptr);
}
#endif
