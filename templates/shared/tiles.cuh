// A block of queries and its keys on matrix units: what the tiled templates have in common.
//
// The rows of a block are its queries, each once for every head of a pack: the heads share keys and bit patterns. A warp
// has 16 rows of them, or 32, and keeps their state in registers as the matrix units lay it out. Keys come SX_STEP at a
// time, first those of full tiles, then of partial ones, then gathered columns; each is a row of K and of V, fetched by
// its own address into one of SX_STAGES stages of shared memory, SX_STAGES - 1 steps before it is used.
//
// Specialised by -D on: SX_T and SX_OUT (element types of the inputs and the output), SX_HEAD_DIM, SX_V_DIM, SX_Q_BYTES,
// SX_K_BYTES, SX_V_BYTES and SX_OUT_BYTES (bytes of a row that a lane moves at once), SX_BLOCK_Q, SX_PACK, SX_BLOCK_KV,
// SX_STEP, SX_STAGES, SX_WARPS, SX_GATHERS (where there are gathered columns),
// SX_SCORE (where a header says how scores are modified), SX_PREDICATE (where a header says which query attends which
// key of a partial tile, instead of patterns), SX_SHARED_BYTES and SX_ARGUMENT_BYTES (what the host thinks).
#pragma once
#include "shared/launch.cuh"
#include "shared/matrix.cuh"
#include "shared/states.cuh"
#if defined(SX_SCORE)
#include "score_generated.cuh"
#endif
#if defined(SX_PREDICATE)
#include "mask_generated.cuh"
#endif

namespace sx {

using T = SX_T;
using Out = SX_OUT;
constexpr int kHeadDim = SX_HEAD_DIM, kVDim = SX_V_DIM;
constexpr int kKWidth = (kHeadDim + 15) / 16 * 16, kVWidth = (kVDim + 15) / 16 * 16;
constexpr int kPack = SX_PACK, kBlockQ = SX_BLOCK_Q, kRows = kBlockQ * kPack;
constexpr int kBlockKv = SX_BLOCK_KV, kStep = SX_STEP, kTileSteps = kBlockKv / kStep;
constexpr int kWarps = SX_WARPS, kThreads = 32 * kWarps, kStages = SX_STAGES;
// Matrices of 16 rows that a warp has.
constexpr int kParts = kRows / (16 * kWarps);
static_assert(kParts * 16 * kWarps == kRows && kTileSteps * kStep == kBlockKv, "rows and keys are whole matrices");
constexpr int kStateWords = kVDim + 2;
#if defined(SX_GATHERS)
constexpr bool kGathers = true;
#else
constexpr bool kGathers = false;
#endif

// The index arrays of a launch; the host's side of it is `TileLists` in backends/cuda_tiles.py.
struct TileLists {
  const int* item_unit;  // [items]: the block of queries
  const int* item_slot;  // where its state goes; -1: the item is the whole block
  const i64* item_tile;  // its first tile; then come as many full ones, then as many partial ones
  const int* item_full;
  const int* item_partial;
  const int* tile_column;
  const int* tile_pattern;      // null where a predicate says it
  const i64* patterns;          // [patterns, kBlockQ, words]: bit j of a query's words says that it attends key j
  const i64* item_column;       // its gathered columns: item_column ... item_column_stop - 1
  const i64* item_column_stop;
  const int* gathered_columns;
  const i64* gathered_lanes;    // bit i says that query i of the block attends the column
  const i64* item_edge;         // its single edges, by row
  const i64* item_edge_stop;
  const i64* row_indptr;
  const int* row_first;
  const int* q_order;           // position -> token, or null
  const int* kv_order;
  const int* batches;           // [batch elements]
  const int* heads;             // [head packs]: the first head of each
  const int* merge_unit;        // split blocks
  const i64* merge_indptr;      // their slots
  int n_items, n_slots, n_merges, n_heads, abreast, q_len, kv_len, group;
  int first_query;  // what a score modifier is told of query 0
  const void* tables[kMaxTables];  // of the score modifier, then of the predicate
};

struct Arguments {
  TileLists lists;
  Tensor q, k, v, out;
  float* lse;  // [batch, heads, queries] by the strides, or null
  i64 lse_batch, lse_head;
  float* partial;  // [copies, slots, kRows, kStateWords]
  float scale;     // of the scores, above 0; times log2(e), unless they are modified
  unsigned flip;   // sign bits of two elements where the scale is below 0: q's are turned round
};

// Shared memory.

// Rows of WIDTH elements, 16 bytes a chunk. The matrix loads take one chunk of each of eight rows at once: chunks change
// their places, or rows are an odd number of chunks apart, so that no two of the eight share a bank.
template <int WIDTH> struct Staged {
  static constexpr int kChunks = WIDTH / 8;
  static constexpr bool kIsSwizzled = kChunks % 8 == 0;
  static constexpr int kRowBytes = (kIsSwizzled ? kChunks : kChunks + 1) * 16;
  static SX_INLINE int offset(int row, int chunk) { return row * kRowBytes + (kIsSwizzled ? chunk ^ (row & 7) : chunk) * 16; }
};
using KRows = Staged<kKWidth>;
using VRows = Staged<kVWidth>;

constexpr int kQueryBytes = kRows * KRows::kRowBytes;
// Of a stage: keys, values, the queries of gathered columns, the tokens of modified scores.
constexpr int kValuesAt = kStep * KRows::kRowBytes;
constexpr int kLanesAt = kValuesAt + kStep * VRows::kRowBytes;
constexpr int kTokensAt = kLanesAt + (kGathers ? kStep * 8 : 0);
#if defined(SX_SCORE)
constexpr int kStageBytes = kTokensAt + kStep * 4;
#else
constexpr int kStageBytes = kTokensAt;
#endif
// Rows of 16-bit output pass through the same memory in the end, a chunk further apart than they are long.
constexpr bool kPassesOutput = sizeof(Out) == 2;
constexpr int kOutRowBytes = kPassesOutput ? kVWidth * 2 + 16 : 0;
static_assert(kQueryBytes + kStages * kStageBytes <= SX_SHARED_BYTES && kRows * kOutRowBytes <= SX_SHARED_BYTES,
              "host and device differ in the shared memory");

// Eight lanes copy a row.
constexpr int kCopiers = 8;
constexpr int kRowsAtOnce = kThreads / kCopiers;
// Of a step's keys, those that a lane copies.
constexpr int kOwnKeys = (kStep + kRowsAtOnce - 1) / kRowsAtOnce;

// A lane's part of the copy of a row of DIM elements, which becomes WIDTH of them, the rest zeros.
template <int DIM, int WIDTH, int BYTES> SX_INLINE void copy_row(unsigned char* rows, int row, const T* from, bool is_live) {
  constexpr int kPieces = WIDTH * 2 / BYTES, kLive = DIM * 2 / BYTES;
#pragma unroll(BYTES == 16 ? 4 : 1)
  for (int piece = threadIdx.x % kCopiers; piece < kPieces; piece += kCopiers) {
    unsigned char* to = rows + Staged<WIDTH>::offset(row, piece * BYTES / 16) + piece * BYTES % 16;
    copy_async<BYTES>(to, (const char*)from + piece * BYTES, is_live && piece < kLive);
  }
}

// Rows.

SX_INLINE i64 token_at(const int* order, int position) { return order ? __ldg(order + position) : position; }

// Row `row` of a block: which query, which head of the pack.
struct Row {
  bool is_inside;
  i64 token, head;
};
SX_INLINE Row row_of(const Arguments& a, const Copy& copy, int unit, int row) {
  const int position = unit * kBlockQ + row / kPack;
  const bool is_inside = position < a.lists.q_len;
  return {is_inside, is_inside ? token_at(a.lists.q_order, position) : 0, copy.head + row % kPack};
}

// The first of the rows of this warp, and where in a matrix of 16 rows and in a pair of columns this lane is.
SX_INLINE int warp_row() { return (int)threadIdx.x / 32 * 16 * kParts; }
SX_INLINE int lane_row() { return (int)threadIdx.x % 32 / 4; }
SX_INLINE int lane_column() { return (int)threadIdx.x % 4 * 2; }

// The state of the warp's rows, as the accumulators of the matrix units lie: of each part rows lane_row() and 8 more; of
// each eight columns lane_column() and the next. A lane's total is that of its own keys until the end.
struct State {
  float peak[kParts][2], total[kParts][2], sum[kParts][kVWidth / 8][4];

  SX_INLINE void clear() {
#pragma unroll
    for (int m = 0; m < kParts; ++m) {
      peak[m][0] = peak[m][1] = negative_infinity(), total[m][0] = total[m][1] = 0.0f;
#pragma unroll
      for (int n = 0; n < kVWidth / 8; ++n) sum[m][n][0] = sum[m][n][1] = sum[m][n][2] = sum[m][n][3] = 0.0f;
    }
  }
};

// The queries of the warp's rows: kept in registers where scores, weights and sums leave room for them.
constexpr bool kHoldsQueries = kParts * (kVWidth / 2 + kStep / 2 + kKWidth / 4) <= (kParts == 1 ? 152 : 160);
struct Queries {
  unsigned part[kHoldsQueries ? kKWidth / 16 : 1][kParts][4];

  // Columns 16 k ... 16 k + 15.
  SX_INLINE void load(const unsigned char* rows, int k, unsigned flip) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kParts; ++m) {
      unsigned(&to)[4] = part[kHoldsQueries ? k : 0][m];
      load_matrices(to, rows + KRows::offset(warp_row() + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] ^= flip;
    }
  }
};

// Keys.

enum Kind { kFull, kPartial, kGathered };

// The keys that an item's rows meet, kStep at a time.
struct Stream {
  i64 first_tile, first_column;
  int n_full, n_tiles, n_columns, n_steps;

  SX_INLINE Stream(const TileLists& lists, int item) {
    first_tile = lists.item_tile[item], first_column = 0, n_columns = 0;
    n_full = lists.item_full[item], n_tiles = n_full + lists.item_partial[item];
    if constexpr (kGathers) {
      first_column = lists.item_column[item];
      n_columns = (int)(lists.item_column_stop[item] - first_column);
    }
    n_steps = n_tiles * kTileSteps + ceil_div(n_columns, kStep);
  }
  SX_INLINE Kind kind(int step) const {
    const int tile = step / kTileSteps;
    return tile < n_full ? kFull : !kGathers || tile < n_tiles ? kPartial : kGathered;
  }
  // Of a gathered step, its first column.
  SX_INLINE int column(int step) const { return (step - n_tiles * kTileSteps) * kStep; }

  // The tokens of the keys of a step that this lane copies; -1 where there is none.
  SX_INLINE void look_up(const TileLists& lists, int step, int (&tokens)[kOwnKeys]) const {
    if (step >= n_steps) return;
    const bool is_tile = kind(step) != kGathered;
    const int stop = is_tile ? lists.kv_len : n_columns;
    int first = column(step);
    if (is_tile) first = __ldg(lists.tile_column + first_tile + step / kTileSteps) * kBlockKv + step % kTileSteps * kStep;
#pragma unroll
    for (int u = 0; u < kOwnKeys; ++u) {
      const int key = first + (int)threadIdx.x / kCopiers + u * kRowsAtOnce;
      tokens[u] = -1;
      if (key >= stop) continue;
      tokens[u] = is_tile ? key : __ldg(lists.gathered_columns + first_column + key);
      if (lists.kv_order) tokens[u] = __ldg(lists.kv_order + tokens[u]);
    }
  }
};

// Starts the copies of a step's keys into a stage.
SX_INLINE void fetch_keys(const Arguments& a, const T* k_rows, const T* v_rows, const Stream& stream, int step,
                          const int (&tokens)[kOwnKeys], unsigned char* stage) {
#pragma unroll
  for (int u = 0; u < kOwnKeys; ++u) {
    const int row = (int)threadIdx.x / kCopiers + u * kRowsAtOnce;
    if (kStep % kRowsAtOnce != 0 && row >= kStep) continue;
    const bool is_live = tokens[u] >= 0;
    const i64 token = is_live ? tokens[u] : 0;
    copy_row<kHeadDim, kKWidth, SX_K_BYTES>(stage, row, k_rows + token * a.k.row, is_live);
    copy_row<kVDim, kVWidth, SX_V_BYTES>(stage + kValuesAt, row, v_rows + token * a.v.row, is_live);
#if defined(SX_SCORE)
    if (threadIdx.x % kCopiers == 0) ((int*)(stage + kTokensAt))[row] = tokens[u];
#endif
  }
  if constexpr (kGathers) {
    if (stream.kind(step) == kGathered) {
      for (int row = threadIdx.x; row < kStep; row += kThreads) {
        const int column = stream.column(step) + row;
        const bool is_live = column < stream.n_columns;
        const i64* lanes = a.lists.gathered_lanes + stream.first_column + (is_live ? column : 0);
        copy_async<8>(stage + kLanesAt + row * 8, lanes, is_live);
      }
    }
  }
}

// Which of a step's pairs are attended.
struct Mask {
  Kind kind;
  unsigned long long words[kParts][2];  // of a partial tile: for each of the lane's rows its keys, from the lane's own on
  const unsigned char* lanes;           // of gathered columns: for each key its queries

  SX_INLINE Mask(const TileLists& lists, const Stream& stream, int unit, int step, const unsigned char* stage) {
    kind = stream.kind(step), lanes = stage + kLanesAt;
    if (kind != kPartial) return;
    const int offset = step % kTileSteps * kStep;
#if defined(SX_PREDICATE)
    const int tile = __ldg(lists.tile_column + stream.first_tile + step / kTileSteps);
    const int first_key = tile * kBlockKv + offset + lane_column();
#pragma unroll
    for (int m = 0; m < kParts; ++m) words[m][0] = words[m][1] = 0;
    // Not unrolled: a predicate may be long, and no register's number depends on n.
#pragma unroll 1
    for (int n = 0; n < kStep; n += 8) {
#pragma unroll
      for (int m = 0; m < kParts; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int query = unit * kBlockQ + (warp_row() + 16 * m + 8 * half + lane_row()) / kPack;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = first_key + n + e;
            const bool attends = key < lists.kv_len && Predicate::holds(lists.tables, query, key);
            words[m][half] |= (unsigned long long)attends << (n + e);
          }
        }
      }
    }
#else
    constexpr int kWords = (kBlockKv + 63) / 64;
    const i64 pattern = __ldg(lists.tile_pattern + stream.first_tile + step / kTileSteps);
#pragma unroll
    for (int m = 0; m < kParts; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = (warp_row() + 16 * m + 8 * half + lane_row()) / kPack;
        const i64 word = __ldg(lists.patterns + (pattern * kBlockQ + query) * kWords + offset / 64);
        words[m][half] = (unsigned long long)word >> (offset % 64 + lane_column());
      }
    }
#endif
  }

  // Scores of pairs that are not attended become -inf.
  SX_INLINE void apply(float (&scores)[kParts][kStep / 8][4]) const {
    if (kind == kPartial) {
#pragma unroll
      for (int m = 0; m < kParts; ++m) {
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (!(words[m][i / 2] >> (8 * n + i % 2) & 1)) scores[m][n][i] = negative_infinity();
        }
      }
    }
    if constexpr (kGathers) {
      if (kind != kGathered) return;
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
        const uint4 both = *(const uint4*)(lanes + (8 * n + lane_column()) * 8);
#pragma unroll
        for (int m = 0; m < kParts; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int query = (warp_row() + 16 * m + 8 * half + lane_row()) / kPack;
            const unsigned first = query < 32 ? both.x : both.y, second = query < 32 ? both.z : both.w;
            if (!(first >> query % 32 & 1)) scores[m][n][2 * half] = negative_infinity();
            if (!(second >> query % 32 & 1)) scores[m][n][2 * half + 1] = negative_infinity();
          }
        }
      }
    }
  }
};

#if defined(SX_SCORE)
// What the modifier makes of a step's scores, in natural units.
SX_INLINE void modify(const Arguments& a, const Copy& copy, int unit, const unsigned char* stage, float (&scores)[kParts][kStep / 8][4]) {
  const int* tokens = (const int*)(stage + kTokensAt);
#pragma unroll
  for (int m = 0; m < kParts; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Row row = row_of(a, copy, unit, warp_row() + 16 * m + 8 * half + lane_row());
      const int q_idx = a.lists.first_query + (int)row.token;
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[m][n][2 * half + e];
          const int token = tokens[8 * n + lane_column() + e];
          if (token >= 0)
            score = Score::value(a.lists.tables, score * a.scale, (int)copy.batch, (int)row.head, q_idx, token);
        }
      }
    }
  }
}
#endif

// Turns scores into weights, and lowers the state to the new peaks; scale takes scores to units of log 2.
SX_INLINE void weigh(State& state, float (&scores)[kParts][kStep / 8][4], float scale) {
  float shrink[kParts][2];
  bool is_higher = false;
#pragma unroll
  for (int m = 0; m < kParts; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = negative_infinity();
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) top = fmaxf(top, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      top = fmaxf(state.peak[m][half], top * scale);
      // No key so far: -inf less -inf is not a number, and less 0 a weight of 0.
      const float base = top == negative_infinity() ? 0.0f : top;
      shrink[m][half] = power_of_two(state.peak[m][half] - base);
      is_higher |= top > state.peak[m][half];
      state.peak[m][half] = top;
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& weight = scores[m][n][2 * half + e];
          weight = power_of_two(fmaf(weight, scale, -base));
          total += weight;
        }
      }
      state.total[m][half] = fmaf(state.total[m][half], shrink[m][half], total);
    }
  }
  // Rare after the first keys.
  if (!__any_sync(kAllLanes, is_higher)) return;
#pragma unroll
  for (int m = 0; m < kParts; ++m) {
#pragma unroll
    for (int n = 0; n < kVWidth / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state.sum[m][n][i] *= shrink[m][i / 2];
    }
  }
}

// The state after the keys of a step.
SX_INLINE void attend(const Arguments& a, const Copy& copy, int unit, const Stream& stream, int step, Queries& queries,
                      const unsigned char* query_rows, const unsigned char* stage, State& state) {
  const int lane = threadIdx.x % 32;
  // Patterns are on their way while the scores are worked out.
  const Mask mask(a.lists, stream, unit, step, stage);
  float scores[kParts][kStep / 8][4] = {};
#pragma unroll
  for (int k = 0; k < kKWidth / 16; ++k) {
    if constexpr (!kHoldsQueries) queries.load(query_rows, k, a.flip);
#pragma unroll
    for (int n = 0; n < kStep / 16; ++n) {
      // 16 keys at 16 columns: keys are the columns of the second factor.
      unsigned keys[4];
      load_matrices(keys, stage + KRows::offset(16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < kParts; ++m) {
        const unsigned(&mine)[4] = queries.part[kHoldsQueries ? k : 0][m];
        multiply_add(T(), scores[m][2 * n], mine, keys[0], keys[1]);
        multiply_add(T(), scores[m][2 * n + 1], mine, keys[2], keys[3]);
      }
    }
  }
#if defined(SX_SCORE)
  modify(a, copy, unit, stage, scores);
  mask.apply(scores);
  weigh(state, scores, kLog2E);
#else
  mask.apply(scores);
  weigh(state, scores, a.scale);
#endif
#pragma unroll
  for (int k = 0; k < kStep / 16; ++k) {
    // An accumulator of 16 keys lies as the first factor does.
    unsigned weights[kParts][4];
#pragma unroll
    for (int m = 0; m < kParts; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&pair)[4] = scores[m][2 * k + i / 2];
        weights[m][i] = Elements<T>::pack(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kVWidth / 16; ++n) {
      unsigned values[4];
      load_transposed(values, stage + kValuesAt + VRows::offset(16 * k + lane % 16, 2 * n + lane / 16));
#pragma unroll
      for (int m = 0; m < kParts; ++m) {
        multiply_add(T(), state.sum[m][2 * n], weights[m], values[0], values[1]);
        multiply_add(T(), state.sum[m][2 * n + 1], weights[m], values[2], values[3]);
      }
    }
  }
}

// The state after all tiles and gathered columns of an item.
SX_INLINE void attend_all(const Arguments& a, const Copy& copy, int item, unsigned char* memory, State& state) {
  const Stream stream(a.lists, item);
  if (stream.n_steps == 0) return;
  const int unit = a.lists.item_unit[item];
  const T* k_rows = a.k.at<T>(copy.batch, copy.head / a.lists.group);
  const T* v_rows = a.v.at<T>(copy.batch, copy.head / a.lists.group);
  unsigned char* stages = memory + kQueryBytes;
  for (int row = (int)threadIdx.x / kCopiers; row < kRows; row += kRowsAtOnce) {
    const Row query = row_of(a, copy, unit, row);
    const T* from = a.q.at<T>(copy.batch, query.head) + query.token * a.q.row;
    copy_row<kHeadDim, kKWidth, SX_Q_BYTES>(memory, row, from, query.is_inside);
  }
  // The tokens of the next step are looked up while this one's rows are under way.
  int ahead[kOwnKeys];
  stream.look_up(a.lists, 0, ahead);
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < stream.n_steps) {
      fetch_keys(a, k_rows, v_rows, stream, step, ahead, stages + step * kStageBytes);
      stream.look_up(a.lists, step + 1, ahead);
    }
    end_copies();
  }
  Queries queries;
  if constexpr (kHoldsQueries) {
    wait_copies<kStages - 2>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kKWidth / 16; ++k) queries.load(memory, k, a.flip);
  }
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < stream.n_steps; ++step) {
    wait_copies<kStages - 2>();
    // All have this step's keys, and none looks at the last step's any more.
    __syncthreads();
    const int coming = step + kStages - 1;
    if (coming < stream.n_steps) {
      const int into = stage == 0 ? kStages - 1 : stage - 1;
      fetch_keys(a, k_rows, v_rows, stream, coming, ahead, stages + into * kStageBytes);
      stream.look_up(a.lists, coming + 1, ahead);
    }
    end_copies();
    attend(a, copy, unit, stream, step, queries, memory, stages + stage * kStageBytes, state);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
}

// Writes what became of an item: output and log-sum-exp of its rows, or their state.
SX_INLINE void finish(const Arguments& a, const Copy& copy, int item, unsigned char* memory, State& state) {
  const int unit = a.lists.item_unit[item], slot = a.lists.item_slot[item];
#pragma unroll
  for (int m = 0; m < kParts; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& total = state.total[m][half];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
    }
  }
  // Others may still look at the last step's keys.
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kParts; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = warp_row() + 16 * m + 8 * half + lane_row();
      const float peak = state.peak[m][half], total = state.total[m][half];
      const Row row = row_of(a, copy, unit, local);
      float* saved = a.partial + ((copy.index * a.lists.n_slots + slot) * kRows + local) * kStateWords;
      if (slot >= 0 && lane_column() == 0) saved[0] = peak, saved[1] = total;
      if (slot < 0 && a.lse && row.is_inside && lane_column() == 0)
        a.lse[copy.batch * a.lse_batch + row.head * a.lse_head + row.token] = lse_of(peak, total);
      const float factor = slot >= 0 ? 1.0f : inverse_of(total);
      if (slot >= 0 || !kPassesOutput) {
        // Four lanes write a sector at a time.
        float* to = slot >= 0 ? saved + 2 : (float*)a.out.at<Out>(copy.batch, row.head) + row.token * a.out.row;
#pragma unroll
        for (int n = 0; n < kVWidth / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = 8 * n + lane_column() + e;
            if (row.is_inside && (kVWidth == kVDim || column < kVDim)) to[column] = state.sum[m][n][2 * half + e] * factor;
          }
        }
      } else {
        Out* to = (Out*)(memory + local * kOutRowBytes);
#pragma unroll
        for (int n = 0; n < kVWidth / 8; ++n) {
          const float pair[2] = {state.sum[m][n][2 * half] * factor, state.sum[m][n][2 * half + 1] * factor};
          Writer<Out, 2>::write(to + 8 * n + lane_column(), pair);
        }
      }
    }
  }
  if (slot >= 0 || !kPassesOutput) return;
  __syncwarp();
  constexpr int kPieces = kVDim * (int)sizeof(Out) / SX_OUT_BYTES;
  constexpr int kPiecesAtOnce = kPieces < 32 ? kPieces : 32, kOutRows = 32 / kPiecesAtOnce;
  const int lane = threadIdx.x % 32, first = lane / kPiecesAtOnce;
  if (first >= kOutRows) return;
  for (int local = warp_row() + first; local < warp_row() + 16 * kParts; local += kOutRows) {
    const Row row = row_of(a, copy, unit, local);
    if (!row.is_inside) continue;
    char* to = (char*)(a.out.at<Out>(copy.batch, row.head) + row.token * a.out.row);
    for (int piece = lane % kPiecesAtOnce; piece < kPieces; piece += kPiecesAtOnce)
      move<SX_OUT_BYTES>(to + piece * SX_OUT_BYTES, memory + local * kOutRowBytes + piece * SX_OUT_BYTES);
  }
}

// Rows that a block of `merge` takes, a warp each.
constexpr int kMergeWarps = 4;

// Joins the pieces of each split block of queries in their order: deterministic.
SX_INLINE void merge_pieces(const Arguments& a) {
  constexpr int kBlocks = kRows / kMergeWarps;
  unsigned index;
  const Copy copy = copy_of(a.lists, a.lists.n_merges * kBlocks, &index);
  const int merged = index / kBlocks, local = (int)(index % kBlocks) * kMergeWarps + (int)threadIdx.x / 32;
  const Row row = row_of(a, copy, a.lists.merge_unit[merged], local);
  if (!row.is_inside) return;
  const i64 first = a.lists.merge_indptr[merged], n = a.lists.merge_indptr[merged + 1] - first;
  const float* states = a.partial + ((copy.index * a.lists.n_slots + first) * kRows + local) * kStateWords;
  Out* to = a.out.at<Out>(copy.batch, row.head) + row.token * a.out.row;
  const int lane = threadIdx.x % 32;
  const float2 joined = join_states<kVDim>(states, (int)n, kRows * kStateWords, lane, 32, [&](int column, float sum, float total) {
    sum *= inverse_of(total);
    Writer<Out, 1>::write(to + column, &sum);
  });
  if (lane == 0 && a.lse)
    a.lse[copy.batch * a.lse_batch + row.head * a.lse_head + row.token] = lse_of(joined.x, joined.y);
}

}  // namespace sx
