// The backward pass of row_traversal on NVIDIA GPUs: every sum in a fixed order, without atomics; those for a score
// modifier's tables in integers, which may come in any (tables.cuh).
//
// With P the weights and dS = P (dP - delta), dP = dO . v, delta = dO . O - dLSE: a query owns its row of dQ and walks
// its keys (SX_DQ 1); a key owns its rows of dK and dV and walks the queries that attend it, over the transposed lists
// (SX_DQ 0). Either side fetches two rows for each edge and reduces two products; the words `own` and `stream` are the
// same for both.
#pragma once
#include "row_traversal/rows.cuh"

namespace sx {

using T = SX_T;
using Out = SX_OUT;
constexpr bool kIsDq = SX_DQ;
constexpr int kPack = SX_PACK, kHeadDim = SX_HEAD_DIM, kVDim = SX_V_DIM;
using One = Slice<T, SX_HEAD_DIM, SX_K_BYTES>;  // q and k
using Two = Slice<T, SX_V_DIM, SX_V_BYTES>;     // v and dO

// The host's side of it is `GradientArguments` in backends/cuda_gradients.py.
struct Arguments {
  Lists lists;
  Tensor own_1, own_2, stream_1, stream_2;  // q, dO, k, v; or k, v, q, dO
  Tensor into_1, into_2;                    // dQ; or dK, dV
  Tensor out;
  const float* lse;      // [batch, heads, queries] by the strides
  const float* d_lse;    // likewise, or null
  float* delta;          // likewise
  i64 lse_batch, lse_head, d_lse_batch, d_lse_head, delta_batch, delta_head;
  const int* head_indptr;   // of an own head's stream heads; where queries own rows, the head of keys is theirs
  const int* stream_heads;
  float* partial;        // [copies, slots, kPack, kWords]
  void* sums[kMaxTables];  // of the gradients of a score modifier's live tables; null where none is wanted
  float scale;
};

// A team's sums; a lane holds its slices.
constexpr int kWords = kIsDq ? kHeadDim : kHeadDim + kVDim;
struct Sums {
  float one[kPack][One::kSize], two[kIsDq ? 1 : kPack][Two::kSize];

  SX_INLINE void clear() {
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
#pragma unroll
      for (int i = 0; i < One::kSize; ++i) one[p][i] = 0.0f;
      if constexpr (!kIsDq) {
#pragma unroll
        for (int i = 0; i < Two::kSize; ++i) two[p][i] = 0.0f;
      }
    }
  }
  template <int N> static SX_INLINE void over_teams(float (&sums)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int lane = kLanes; lane < 32; lane *= 2) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], lane);
    }
  }
  SX_INLINE void join_teams() {
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
      over_teams(one[p]);
      if constexpr (!kIsDq) over_teams(two[p]);
    }
  }
};

// What a query knows of its softmax: the log-sum-exp, and delta. One without keys has nothing to recompute.
struct Statistics {
  float lse, delta;
};
SX_INLINE Statistics statistics(const Arguments& a, i64 batch, i64 head, i64 token) {
  const float lse = __ldg(a.lse + batch * a.lse_batch + head * a.lse_head + token);
  return {lse == negative_infinity() ? 0.0f : lse, a.delta[batch * a.delta_batch + head * a.delta_head + token]};
}

// One column of the gradients of a row; dQ is written, dK and dV are added to.
SX_INLINE void finish_column(const Arguments& a, const Copy& copy, int p, i64 token, int column, float sum) {
  if (column < kHeadDim) {
    sum *= a.scale;
    Out* to = a.into_1.at<Out>(copy.batch, copy.head + p) + token * a.into_1.row + column;
    if constexpr (kIsDq)
      Writer<Out, 1>::write(to, &sum);
    else
      *(float*)to += sum;
  } else {
    a.into_2.at<float>(copy.batch, copy.head + p)[token * a.into_2.row + column - kHeadDim] += sum;
  }
}

SX_INLINE void write_row(const Arguments& a, const Copy& copy, i64 token, const Sums& sums, int lane) {
#pragma unroll
  for (int p = 0; p < kPack; ++p) {
    if constexpr (kIsDq) {
      float scaled[One::kSize];
#pragma unroll
      for (int i = 0; i < One::kSize; ++i) scaled[i] = sums.one[p][i] * a.scale;
      One::store(a.into_1.at<Out>(copy.batch, copy.head + p) + token * a.into_1.row, scaled, lane);
    } else {
      One::each(lane, [&](int column, int i) { finish_column(a, copy, p, token, column, sums.one[p][i]); });
      Two::each(lane, [&](int column, int i) { finish_column(a, copy, p, token, kHeadDim + column, sums.two[p][i]); });
    }
  }
}

// Adds up `n` sums of one head, `stride` floats apart, in their order; the block shares the columns.
SX_INLINE void join_sums(const Arguments& a, const Copy& copy, int p, i64 token, const float* sums, int n, i64 stride, float* to) {
  for (int column = threadIdx.x; column < kWords; column += blockDim.x) {
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) sum += sums[i * stride + column];
    if (to)
      to[column] = sum;
    else
      finish_column(a, copy, p, token, column, sum);
  }
}

// Where the scores of a row and its partners stand.
struct Places {
  const void* const* tables;
  int batch, head, own;  // of the first head of a pack; the own token
  int stream[kKeys], edge[kKeys];

  SX_INLINE int query(int u) const { return kIsDq ? own : stream[u]; }
  SX_INLINE int key(int u) const { return kIsDq ? stream[u] : own; }
};

#if defined(SX_SCORE)
// The modified score and its derivative; a partner that is not there has no place.
SX_INLINE float modified(const Places& at, int p, int u, float score, float* slope) {
  *slope = 0.0f;
  if (at.stream[u] < 0) return score;
  *slope = Score::slope(at.tables, score, at.batch, at.head + p, at.query(u), at.key(u), at.edge[u]);
  return Score::value(at.tables, score, at.batch, at.head + p, at.query(u), at.key(u), at.edge[u]);
}
#endif

// What a team has for the gradients of a score modifier's tables; its first lane alone adds to them.
struct TableSums {
#if defined(SX_SCATTER)
  void* const* sums;
  bool is_adder;
  float kept[kPack][Score::kKept ? Score::kKept : 1];

  SX_INLINE void clear() {
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
#pragma unroll
      for (float& sum : kept[p]) sum = 0.0f;
    }
  }
  SX_INLINE void add(const Places& at, int p, int u, float d_value, float score) {
    if (is_adder && d_value != 0.0f)
      Score::scatter(at.tables, sums, d_value, score, at.batch, at.head + p, at.query(u), at.key(u), at.edge[u], kept[p]);
  }
  SX_INLINE void finish(const void* const* tables, int batch, int head, int q_idx) {
#pragma unroll
    for (int p = 0; p < kPack; ++p)
      if (is_adder) Score::scatter_kept(tables, sums, batch, head + p, q_idx, kept[p]);
  }
#else
  SX_INLINE void clear() {}
  SX_INLINE void add(const Places&, int, int, float, float) {}
  SX_INLINE void finish(const void* const*, int, int, int) {}
#endif
};

// Adds kKeys partners of a row.
SX_INLINE void add(
    const Places& at, Sums& sums, TableSums& of_tables, const float (&own_1)[kPack][One::kSize], const float (&own_2)[kPack][Two::kSize],
    const typename One::Raw (&one)[kKeys], const typename Two::Raw (&two)[kKeys], const bool (&is_live)[kKeys],
    const Statistics (&of)[kIsDq ? kPack : kKeys], float scale) {
  float scores[kPack][kKeys], products[kPack][kKeys];
#pragma unroll
  for (int u = 0; u < kKeys; ++u) {
    float values_1[One::kSize], values_2[Two::kSize];
    One::read(one[u], values_1);
    Two::read(two[u], values_2);
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
      scores[p][u] = One::dot(own_1[p], values_1);
      products[p][u] = Two::dot(own_2[p], values_2);
    }
  }
#pragma unroll
  for (int u = 0; u < kKeys; ++u) {
    float values_1[One::kSize], values_2[Two::kSize];
    One::read(one[u], values_1);
    if constexpr (!kIsDq) Two::read(two[u], values_2);
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
      const Statistics known = of[kIsDq ? p : u];
      const float score = team_sum(scores[p][u]), product = team_sum(products[p][u]);
      // The difference first: both may be large.
#if defined(SX_SCORE)
      float slope;
      const float above = modified(at, p, u, score * scale, &slope) - known.lse;
#else
      const float above = fmaf(score, scale, -known.lse);
#endif
      const float weight = is_live[u] ? power_of_two(above * kLog2E) : 0.0f;
      const float d_value = weight == 0.0f ? 0.0f : weight * (product - known.delta);
#if defined(SX_SCORE)
      of_tables.add(at, p, u, d_value, score * scale);
      One::add(sums.one[p], chained(d_value, slope), values_1);
#else
      One::add(sums.one[p], d_value, values_1);
#endif
      if constexpr (!kIsDq) Two::add(sums.two[p], weight, values_2);
    }
  }
}

}  // namespace sx

// delta of every row of the launch's heads, a team each.
extern "C" __global__ void __launch_bounds__(SX_WARPS * 32, 1) prepare(const __grid_constant__ sx::Arguments a) {
  using namespace sx;
  const int warp = threadIdx.x / 32, team = threadIdx.x % 32 / kLanes, lane = threadIdx.x % kLanes;
  unsigned index;
  const Copy copy = copy_of(a.lists, ceil_div(a.lists.row_len, kWarps * kTeams), &index);
  const int row = ((int)index * kWarps + warp) * kTeams + team;
  const bool is_row = row < a.lists.row_len;
  const i64 token = is_row ? token_of(a.lists, row) : 0;
#pragma unroll
  for (int p = 0; p < kPack; ++p) {
    const i64 head = copy.head + p;
    float out[Two::kSize], d_out[Two::kSize];
    Two::load(out, a.out.at<T>(copy.batch, head) + token * a.out.row, lane, is_row);
    Two::load(d_out, a.own_2.at<T>(copy.batch, head) + token * a.own_2.row, lane, is_row);
    float delta = team_sum(Two::dot(out, d_out));
    if (is_row && lane == 0) {
      if (a.d_lse) delta -= a.d_lse[copy.batch * a.d_lse_batch + head * a.d_lse_head + token];
      a.delta[copy.batch * a.delta_batch + head * a.delta_head + token] = delta;
    }
  }
}

extern "C" __global__ void __launch_bounds__(SX_WARPS * 32, SX_RESIDENT) backward(const __grid_constant__ sx::Arguments a) {
  using namespace sx;
  static_assert(sizeof(Arguments) == SX_ARGUMENT_BYTES, "host and device differ in the arguments");
  __shared__ float states[kWarps][kPack][kWords];
  const int warp = threadIdx.x / 32, team = threadIdx.x % 32 / kLanes, lane = threadIdx.x % kLanes;
  unsigned index;
  const Copy copy = copy_of(a.lists, n_jobs(a.lists), &index);
  const Job job = job_of(a.lists, (int)index, warp, team);
  const int own_head = (int)(copy.index % a.lists.n_heads);
  const int first_stream = kIsDq ? 0 : a.head_indptr[own_head], last_stream = kIsDq ? 1 : a.head_indptr[own_head + 1];
  Sums sums;
  TableSums of_tables;
#if defined(SX_SCATTER)
  of_tables.sums = a.sums;
#endif

  Keys<SX_FORM> keys, ahead;
  keys.open(a.lists, job, job.entry);
  keys.advance(a.lists, job);
  for (int i = 0; i < job.n_rows; ++i, keys = ahead) {
    ahead.open(a.lists, job, i + 1 < job.n_rows ? job.entry + (i + 1) * job.stride : job.end);
    ahead.advance(a.lists, job);
    const bool is_row = keys.row >= 0;
    const i64 token = is_row ? token_of(a.lists, keys.row) : 0;
    float own_1[kPack][One::kSize], own_2[kPack][Two::kSize];
    Statistics of[kIsDq ? kPack : kKeys];
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
      const i64 head = copy.head + p;
      One::load(own_1[p], a.own_1.at<T>(copy.batch, head) + token * a.own_1.row, lane, is_row);
      Two::load(own_2[p], a.own_2.at<T>(copy.batch, head) + token * a.own_2.row, lane, is_row);
      if constexpr (kIsDq) of[p] = statistics(a, copy.batch, head, token);
    }
    sums.clear();
    of_tables.clear();
#if defined(SX_SCATTER)
    of_tables.is_adder = is_row && lane == 0;
#endif

    const int trips = most_of_teams(keys.trips);
    for (int stream = first_stream; stream < last_stream; ++stream) {
      const i64 head = kIsDq ? copy.head / a.lists.group : a.stream_heads[stream];
      const T* rows_1 = a.stream_1.at<T>(copy.batch, head);
      const T* rows_2 = a.stream_2.at<T>(copy.batch, head);
      Keys<SX_FORM> walked = keys;
      for (int trip = 0; trip < trips; ++trip) {
        typename One::Raw one[kKeys];
        typename Two::Raw two[kKeys];
        bool is_live[kKeys];
        Places at{a.lists.tables, (int)copy.batch, kIsDq ? (int)copy.head : (int)head, (int)token};
#pragma unroll
        for (int u = 0; u < kKeys; ++u) {
          at.stream[u] = walked.tokens[u], at.edge[u] = walked.edge(u);
          is_live[u] = walked.tokens[u] >= 0;
          One::fetch_row(one[u], rows_1 + walked.tokens[u] * a.stream_1.row, lane, is_live[u]);
        }
#pragma unroll
        for (int u = 0; u < kKeys; ++u)
          Two::fetch_row(two[u], rows_2 + walked.tokens[u] * a.stream_2.row, lane, is_live[u]);
        if constexpr (!kIsDq) {
#pragma unroll
          for (int u = 0; u < kKeys; ++u)
            of[u] = is_live[u] ? statistics(a, copy.batch, head, walked.tokens[u]) : Statistics{0.0f, 0.0f};
        }
        walked.advance(a.lists, job);
        add(at, sums, of_tables, own_1, own_2, one, two, is_live, of, a.scale);
      }
    }

    of_tables.finish(a.lists.tables, (int)copy.batch, (int)copy.head, (int)token);
    if (job.bin == Job::kTeam) {
      if (is_row) write_row(a, copy, token, sums, lane);
    } else {
      sums.join_teams();
      if (job.bin == Job::kWarp) {
        if (is_row && team == 0) write_row(a, copy, token, sums, lane);
      } else if (team == 0) {
#pragma unroll
        for (int p = 0; p < kPack; ++p) {
          One::each(lane, [&](int column, int i) { states[warp][p][column] = sums.one[p][i]; });
          if constexpr (!kIsDq)
            Two::each(lane, [&](int column, int i) { states[warp][p][kHeadDim + column] = sums.two[p][i]; });
        }
      }
    }
  }
  if (job.bin != Job::kPiece) return;

  __syncthreads();
  const int row = a.lists.piece_row[job.entry], slot = a.lists.piece_slot[job.entry];
  for (int p = 0; p < kPack; ++p) {
    float* to = slot < 0 ? nullptr : a.partial + ((copy.index * a.lists.n_slots + slot) * kPack + p) * kWords;
    join_sums(a, copy, p, token_of(a.lists, row), states[0][p], kWarps, kPack * kWords, to);
  }
}

// Adds up the pieces of each split row in their order. One block a row and head.
extern "C" __global__ void __launch_bounds__(128) add_up(const __grid_constant__ sx::Arguments a) {
  using namespace sx;
  unsigned index;
  const Copy copy = copy_of(a.lists, a.lists.n_merges * kPack, &index);
  const int merged = index / kPack, p = index % kPack;
  const i64 first = a.lists.merge_indptr[merged], n = a.lists.merge_indptr[merged + 1] - first;
  const float* sums = a.partial + ((copy.index * a.lists.n_slots + first) * kPack + p) * kWords;
  join_sums(a, copy, p, token_of(a.lists, a.lists.merge_row[merged]), sums, (int)n, kPack * kWords, nullptr);
}
