// Exact attention of one block of queries over any list of keys: the engine of `block_sparse` and `hybrid` on a CPU.
//
// Queries lie in vector lanes, keys are broadcast. Scores, running maximum and sum, probabilities and the transposed
// accumulator all have one lane a query, so softmax needs no horizontal operation, a mask is one bit a lane, and a key is
// read where it lies: contiguous tiles, gathered columns and reordered tokens cost the same, and K is never packed. Keys
// come in strips of up to STRIP; each strip is scored, exponentiated and multiplied with V while it is in the L1/L2 cache.
//
// Decides register blocking, skipping inside partial tiles, conversion of half precision, and the online softmax.
// Knows nothing of schedules or of where a list of keys comes from. fp32 accumulation throughout.
#pragma once

#include <cmath>
#include <type_traits>

#include "arguments.hpp"
#include "edge_numbers.hpp"
#include "score.hpp"
#include "simd.hpp"

namespace sx {

constexpr int STRIP = 96;         // keys a strip
constexpr int CHUNK_STEP = 8;     // keys that share one decision about which query vectors are live
constexpr int MAX_BLOCK_Q = 64;
constexpr uint32_t ALL_LANES = (1u << (VL - 1)) * 2 - 1;
constexpr int MAX_KEY_GROUP = 14;

// Keys (or value columns) a register block, by the number of query vectors beside them.
constexpr int group_of(int vectors) {
  return BLOCK_VECTORS == 4 ? (vectors == 4 ? 6 : vectors == 3 ? 8 : vectors == 2 ? 12 : 14) : (vectors == 2 ? 6 : 10);
}

template <class T> struct Dtype {  // how keys and values reach the arithmetic
  using Operand = float;           // what one broadcast carries
  static constexpr bool in_place = false;
  static constexpr int pack = 1;
};
template <> struct Dtype<float> {
  using Operand = float;
  static constexpr bool in_place = true;
  static constexpr int pack = 1;
};
#if defined(SX_BF16_DOT)
template <> struct Dtype<bf16> {
  using Operand = uint32_t;        // two neighbours along the summed dimension
  static constexpr bool in_place = true;
  static constexpr int pack = 2;
};
#endif

SX_INLINE vf broadcast(const float* p) { return splat(*p); }
SX_INLINE vu broadcast(const uint32_t* p) { uint32_t x; std::memcpy(&x, p, 4); return splat_u(x); }
SX_INLINE vf multiply_add(vf acc, vf a, vf b) { return a * b + acc; }
#if defined(SX_BF16_DOT)
SX_INLINE vf multiply_add(vf acc, vu a, vu b) { return dot_bf16(acc, a, b); }
#endif

// s[key][query] = k[key] · q[query] for KEYS keys and VECTORS vectors of queries; masked lanes get -inf.
template <int KEYS, int VECTORS, bool MASKED, class Operand>
static void score_block(const Operand* const* k, const Operand* qt, int64_t block_q, int64_t depth, const uint64_t* lanes,
                        int first_lane, float* s, float* peak) {
  using V = decltype(broadcast((const Operand*)nullptr));
  vf acc[KEYS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = vf{};
  const Operand* rows[KEYS];
#pragma GCC unroll 16
  for (int i = 0; i < KEYS; ++i) rows[i] = k[i];
  for (int64_t x = 0; x < depth; ++x, qt += block_q) {
    V q[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) q[j] = load_as<V>(qt + j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < KEYS; ++i) {
      V key = broadcast(rows[i] + x);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = multiply_add(acc[i][j], q[j], key);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < VECTORS; ++j) {
    vf highest = load(peak + j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < KEYS; ++i) {
      if constexpr (MASKED) {
        const uint32_t live = (uint32_t)(lanes[i] >> (first_lane + j * VL)) & ALL_LANES;
        acc[i][j] = select_bits(live, acc[i][j], splat(NEG_INF));
      }
      highest = maximum(acc[i][j], highest);
      store(s + i * block_q + j * VL, acc[i][j]);
    }
    store(peak + j * VL, highest);
  }
}

// acc[column][query] += Σ v[key][column] · p[key][query] for COLUMNS value columns and VECTORS vectors of queries. A strip is
// summed by itself before it is added: errors grow with the square root of the strips, not of the keys.
template <int COLUMNS, int VECTORS, class Operand>
static void value_block(const Operand* const* v, int64_t column, const Operand* p, int64_t block_q, int64_t keys, float* acc) {
  using V = decltype(broadcast((const Operand*)nullptr));
  vf o[COLUMNS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < COLUMNS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) o[i][j] = vf{};
  for (int64_t x = 0; x < keys; ++x, p += block_q) {
    const Operand* row = v[x] + column;
    V weight[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) weight[j] = load_as<V>(p + j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < COLUMNS; ++i) {
      V value = broadcast(row + i);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) o[i][j] = multiply_add(o[i][j], weight[j], value);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < COLUMNS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      float* to = acc + i * block_q + j * VL;
      store(to, load(to) + o[i][j]);
    }
}

// Keys [first, last) of a strip, all attended by no other than the query vectors [low, high).
struct Chunk { int first, last, low, high; };

// Cuts a strip into chunks; returns how many. Keys nobody attends were never added.
inline int find_chunks(Chunk* chunks, const uint64_t* lanes, int keys, int64_t n_queries) {
  int n = 0;
  for (int first = 0; first < keys; first += CHUNK_STEP) {
    const int last = first + CHUNK_STEP < keys ? first + CHUNK_STEP : keys;
    uint64_t live = 0;
    for (int i = first; i < last; ++i) live |= lanes[i];
    if (n_queries < 64) live &= (uint64_t(1) << n_queries) - 1;
    if (!live) continue;
    const int low = __builtin_ctzll(live) / VL, high = (63 - __builtin_clzll(live)) / VL + 1;
    if (n && chunks[n - 1].last == first && chunks[n - 1].low == low && chunks[n - 1].high == high) chunks[n - 1].last = last;
    else chunks[n++] = {first, last, low, high};
  }
  return n;
}

// Calls `body` with the number of vectors a register block takes, as a constant: `n`, or as many as fit.
template <class Body> SX_INLINE void with_vectors(int64_t n, Body&& body) {
  if (n == 1) body(std::integral_constant<int, 1>{});
  else if (n == 2 || BLOCK_VECTORS == 2) body(std::integral_constant<int, 2>{});
  else if constexpr (BLOCK_VECTORS == 4) {
    if (n == 3) body(std::integral_constant<int, 3>{}); else body(std::integral_constant<int, 4>{});
  }
}

// Calls `body` with group sizes, as constants, that add up to `n`: GROUP as often as it fits, then 8, 4, 2, 1.
template <int GROUP, class Body> SX_INLINE void in_groups(int64_t n, Body&& body) {
  for (; n >= GROUP; n -= GROUP) body(std::integral_constant<int, GROUP>{});
  if (GROUP > 8 && n >= 8) { body(std::integral_constant<int, 8>{}); n -= 8; }
  if (n >= 4) { body(std::integral_constant<int, 4>{}); n -= 4; }
  if (n >= 2) { body(std::integral_constant<int, 2>{}); n -= 2; }
  if (n >= 1) body(std::integral_constant<int, 1>{});
}

// `score_block` for the keys of a chunk and the queries that are live in it; rows of `s` are [block_q].
template <bool MASKED, class Operand>
void score_chunk(const Chunk& c, const Operand* const* k, const Operand* qt, int64_t block_q, int64_t depth, const uint64_t* lanes,
                 float* s, float* peak) {
  for (int low = c.low; low < c.high; low += BLOCK_VECTORS)
    with_vectors(c.high - low, [&](auto vectors) {
      constexpr int VECTORS = decltype(vectors)::value;
      int i = c.first;
      in_groups<group_of(VECTORS)>(c.last - c.first, [&](auto keys) {
        constexpr int KEYS = decltype(keys)::value;
        score_block<KEYS, VECTORS, MASKED>(k + i, qt + low * VL, block_q, depth, lanes + i, low * VL, s + i * block_q + low * VL,
                                           peak + low * VL);
        i += KEYS;
      });
    });
}

// `value_block` for all columns, the keys of a chunk and the queries that are live in it. PACK keys share an operand.
template <int PACK, class Operand>
void add_chunk(const Chunk& c, const Operand* const* v, const Operand* p, int64_t block_q, int64_t n_columns, float* acc) {
  const int first = c.first / PACK, keys = (c.last - c.first + PACK - 1) / PACK;
  for (int low = c.low; low < c.high; low += BLOCK_VECTORS)
    with_vectors(c.high - low, [&](auto vectors) {
      constexpr int VECTORS = decltype(vectors)::value;
      int64_t column = 0;
      in_groups<group_of(VECTORS)>(n_columns, [&](auto columns) {
        constexpr int COLUMNS = decltype(columns)::value;
        value_block<COLUMNS, VECTORS>(v + first, column, p + first * block_q + low * VL, block_q, keys,
                                      acc + column * block_q + low * VL);
        column += COLUMNS;
      });
    });
}

template <class T> class TileEngine {
  using Operand = typename Dtype<T>::Operand;
  static constexpr int PACK = Dtype<T>::pack;

 public:
  // `block_q` is a multiple of VL up to 64; `head_dim` and `v_dim` any.
  TileEngine(Scratch& scratch, int64_t block_q, int64_t head_dim, int64_t v_dim, float scale, const Score& modifier)
      : modifier_(modifier), raw_scale_(scale), block_q_(block_q), head_dim_(head_dim), v_dim_(v_dim),
        depth_((head_dim + PACK - 1) / PACK),
        // A negative scale is taken into q; a zero one must not turn -inf into NaN. A modifier takes scaled scores and
        // leaves nothing to scale.
        sign_(scale < 0 && !HAS_SCORE_MOD ? -1.0f : 1.0f), scale_(HAS_SCORE_MOD ? 1.0f : std::fabs(scale)),
        log2_scale_(std::fmax(scale_, 1e-30f) * LOG2_E) {
    padded_ = whole_vectors(depth_);
    int64_t rows = STRIP + MAX_KEY_GROUP + 2;
    int64_t v_padded = whole_vectors(v_dim) + VL;
    int64_t words = padded_ * block_q + v_padded * block_q + 3 * block_q + 2 * rows * block_q + rows * padded_ + rows * v_padded +
                    block_q * padded_ * PACK + block_q * v_padded;
    char* at = scratch.reserve(words * 4 + 16 * 64);
    auto take = [&](int64_t n) {
      char* p = at;
      at += (n * 4 + 63) / 64 * 64;
      return p;
    };
    qt_ = (Operand*)take(padded_ * block_q);
    acc_ = (float*)take(v_padded * block_q);
    m_ = (float*)take(block_q);
    l_ = (float*)take(block_q);
    peak_ = (float*)take(block_q);
    s_ = (float*)take(rows * block_q);
    p_ = (Operand*)take(rows * block_q);
    k_rows_ = (Operand*)take(rows * padded_);
    v_rows_ = (Operand*)take(rows * v_padded);
    q_rows_ = (float*)take(block_q * padded_ * PACK);
    unpacked_ = (float*)take(block_q * v_padded);
    v_pitch_ = v_padded;
  }

  // Takes up queries: `row(i)` is the address of query i, for i < n, and `token(i)` its place in the sequence.
  template <class Row, class Token> void begin(int64_t n, Row&& row, Token&& token) {
    if constexpr (HAS_SCORE_MOD)
      for (int64_t i = 0; i < block_q_; ++i) q_tokens_[i / VL][i % VL] = i < n ? (int32_t)token(i) : 0;
    n_ = n;
    vectors_ = (int)((n + VL - 1) / VL);
    const int64_t pitch = padded_ * PACK;
    for (int64_t i = 0; i < vectors_ * VL; ++i) {
      float* to = q_rows_ + i * pitch;
      int64_t x = 0;
      if (i < n) {
        widen(to, row(i), head_dim_, sign_);
        x = whole_vectors(head_dim_);
      }
      for (; x < pitch; x += VL) store(to + x, vf{});
    }
    for (int64_t lane = 0; lane < vectors_ * VL; lane += VL)
      for (int64_t x = 0; x < padded_; x += VL) pack_queries(lane, x, pitch);
    for (int64_t i = 0; i < vectors_ * VL; i += VL) { store(m_ + i, splat(NEG_INF)); store(l_ + i, vf{}); }
    std::memset(acc_, 0, v_dim_ * block_q_ * 4);
    keys_ = 0;
    masked_ = false;
    fresh_ = true;
  }

  // Adds one key, at place `token`, for the queries whose bit is set; `k` and `v` are its rows.
  SX_INLINE void add(const T* k, const T* v, int64_t token, uint64_t lanes) {
    k_[keys_] = k; v_[keys_] = v; lanes_[keys_] = lanes;
    if constexpr (HAS_SCORE_MOD) kv_tokens_[keys_] = (int32_t)token;
    masked_ = true;
    if (++keys_ == STRIP) flush();
  }
  // Adds one key for all queries.
  SX_INLINE void add(const T* k, const T* v, int64_t token) {
    k_[keys_] = k; v_[keys_] = v; lanes_[keys_] = ~uint64_t(0);
    if constexpr (HAS_SCORE_MOD) kv_tokens_[keys_] = (int32_t)token;
    if (++keys_ == STRIP) flush();
  }

  // The numbers of the edges of the key that is added next: within a tile, or gathered.
  SX_INLINE void number(TileEdges& tile, uint64_t lanes) {
    edges_.put(keys_, tile.next, block_q_, lanes);
  }
  SX_INLINE void number(const Arguments& a, int64_t column) {
    if constexpr (Score::NEEDS_EDGES)
      edges_.put(keys_, a.gathered_edges + a.gathered_edge_indptr[column], a.gathered_lanes[column]);
  }

  void flush() {
    if (!keys_) return;
    stage();
    const int keys = keys_;
    for (int i = 0; i < vectors_ * VL; i += VL) store(peak_ + i, splat(NEG_INF));
    n_chunks_ = 0;
    if (masked_) n_chunks_ = find_chunks(chunks_, lanes_, keys, n_);
    else chunks_[n_chunks_++] = {0, keys, 0, vectors_};
    if constexpr (HAS_SCORE_MOD) {
      for (int c = 0; c < n_chunks_; ++c) score<false>(chunks_[c]);
      for (int i = 0; i < vectors_ * VL; i += VL) store(peak_ + i, splat(NEG_INF));
      for (int c = 0; c < n_chunks_; ++c) modify(chunks_[c]);
    } else {
      for (int c = 0; c < n_chunks_; ++c) masked_ ? score<true>(chunks_[c]) : score<false>(chunks_[c]);
    }
    raise_maximum();
    for (int c = 0; c < n_chunks_; ++c) exponentiate(chunks_[c]);
    for (int c = 0; c < n_chunks_; ++c) add_chunk<PACK>(chunks_[c], vp_, p_, block_q_, v_dim_, acc_);
    keys_ = 0;
    masked_ = false;
    fresh_ = false;
  }

  // Joins another partial result of query i: maximum `m` (in scores), sum `l`, unnormalised `acc`.
  void join(int64_t i, float m, float l, const float* acc) {
    if (!(l > 0) && l == l) return;
    float highest = m > m_[i] ? m : m_[i];
    float mine = m_[i] == NEG_INF ? 0.0f : std::exp2((m_[i] - highest) * log2_scale_);
    float theirs = std::exp2((m - highest) * log2_scale_);
    m_[i] = highest;
    l_[i] = l_[i] * mine + l * theirs;
    for (int64_t c = 0; c < v_dim_; ++c) acc_[c * block_q_ + i] = acc_[c * block_q_ + i] * mine + acc[c] * theirs;
    fresh_ = false;
  }

  // Writes normalised rows: `row(i)` is where query i goes, `lse(i)` where its log-sum-exp goes (or null).
  template <class Row, class Lse> void finish(Row&& row, Lse&& lse) {
    flush();
    for (int64_t lane = 0; lane < n_; lane += VL) {
      vf l = load(l_ + lane);
      vf inverse = l != 0.0f ? 1.0f / l : vf{};  // NaN is not 0: it goes through
      int count = (int)(n_ - lane < VL ? n_ - lane : VL);
      vf log_sum = l == 0.0f ? splat(NEG_INF) : load(m_ + lane) * scale_ + log2(l) * (1 / LOG2_E);
      for (int i = 0; i < count; ++i)
        if (float* to = lse(lane + i)) *to = log_sum[i];
      for (int64_t c = 0; c < v_dim_; c += VL) {
        vf columns[VL];
        for (int j = 0; j < VL; ++j) columns[j] = load(acc_ + (c + j) * block_q_ + lane) * inverse;
        transpose(columns);
        for (int i = 0; i < count; ++i) {
          auto* to = row(lane + i) + c;
          if (c + VL <= v_dim_) store_as(to, columns[i]); else store_partial(to, columns[i], (int)(v_dim_ - c));
        }
      }
    }
  }

  // The state of query i, for one who goes on with it elsewhere; `unpack` first.
  float maximum_score(int64_t i) const { return m_[i]; }
  float sum(int64_t i) const { return l_[i]; }
  const float* accumulator(int64_t i) const { return unpacked_ + i * v_pitch_; }
  void unpack() {
    flush();
    for (int64_t lane = 0; lane < n_; lane += VL)
      for (int64_t c = 0; c < v_dim_; c += VL) {
        vf columns[VL];
        for (int j = 0; j < VL; ++j) columns[j] = load(acc_ + (c + j) * block_q_ + lane);
        transpose(columns);
        for (int i = 0; i < VL; ++i) store(unpacked_ + (lane + i) * v_pitch_ + c, columns[i]);
      }
  }

  void save(float* to) {
    flush();
    std::memcpy(to, m_, block_q_ * 4);
    std::memcpy(to + block_q_, l_, block_q_ * 4);
    std::memcpy(to + 2 * block_q_, acc_, v_dim_ * block_q_ * 4);
  }
  // Joins a saved state of the same queries.
  void join(const float* from) {
    for (int64_t lane = 0; lane < vectors_ * VL; lane += VL) {
      vf m = load(m_ + lane), other = load(from + lane);
      vf highest = maximum(m, other);
      vf base = highest == NEG_INF ? vf{} : highest;
      vf mine = exp2((m - base) * log2_scale_), theirs = exp2((other - base) * log2_scale_);
      store(m_ + lane, highest);
      store(l_ + lane, load(l_ + lane) * mine + load(from + block_q_ + lane) * theirs);
      for (int64_t c = 0; c < v_dim_; ++c) {
        float* to = acc_ + c * block_q_ + lane;
        store(to, load(to) * mine + load(from + (2 + c) * block_q_ + lane) * theirs);
      }
    }
  }

  // Query i in fp32, zero-padded to a multiple of VL.
  const float* query(int64_t i) const { return q_rows_ + i * padded_ * PACK; }

 private:
  void pack_queries(int64_t lane, int64_t x, int64_t pitch) {
    if constexpr (PACK == 1) {
      vf rows[VL];
      for (int i = 0; i < VL; ++i) rows[i] = load(q_rows_ + (lane + i) * pitch + x);
      transpose(rows);
      for (int j = 0; j < VL; ++j) store((float*)qt_ + (x + j) * block_q_ + lane, rows[j]);
    } else {
#if defined(SX_BF16_DOT)
      vu rows[VL];
      for (int i = 0; i < VL; ++i) {
        const float* from = q_rows_ + (lane + i) * pitch + 2 * x;
        rows[i] = (vu)_mm512_cvtne2ps_pbh((__m512)load(from + VL), (__m512)load(from));
      }
      transpose(rows);
      for (int j = 0; j < VL; ++j) std::memcpy(qt_ + (x + j) * block_q_ + lane, &rows[j], sizeof(vu));
#endif
    }
  }

  // Brings the strip's keys and values into the form the register blocks broadcast from.
  void stage() {
    const int keys = keys_;
    if constexpr (Dtype<T>::in_place) {
      const bool padded = PACK == 2 && head_dim_ % 2;  // the last pair must not read past the row
      for (int i = 0; i < keys; ++i) {
        if (!padded) { kp_[i] = (const Operand*)k_[i]; continue; }
        std::memcpy(k_rows_ + i * padded_, k_[i], head_dim_ * sizeof(T));
        std::memset((char*)(k_rows_ + i * padded_) + head_dim_ * sizeof(T), 0, sizeof(T));
        kp_[i] = k_rows_ + i * padded_;
      }
    } else {
      for (int i = 0; i < keys; ++i) kp_[i] = widened(k_rows_ + i * padded_, k_[i], head_dim_);
    }
    if constexpr (PACK == 2) {
#if defined(SX_BF16_DOT)
      for (int i = 0; i < keys; i += 2) {
        Operand* pairs = v_rows_ + (i / 2) * v_pitch_;
        pair_rows(pairs, v_[i], i + 1 < keys ? v_[i + 1] : nullptr, v_dim_);
        vp_[i / 2] = pairs;
      }
#endif
    } else if constexpr (Dtype<T>::in_place) {
      for (int i = 0; i < keys; ++i) vp_[i] = (const Operand*)v_[i];
    } else {
      for (int i = 0; i < keys; ++i) vp_[i] = widened(v_rows_ + i * v_pitch_, v_[i], v_dim_);
    }
    for (int i = keys; i < keys + MAX_KEY_GROUP; ++i) kp_[i] = kp_[0];
  }
  SX_INLINE static const Operand* widened(Operand* to, const T* from, int64_t n) {
    widen((float*)to, from, n);
    return to;
  }

  template <bool MASKED> void score(const Chunk& c) {
    score_chunk<MASKED>(c, kp_, qt_, block_q_, depth_, lanes_, s_, peak_);
  }

  // Applies the score modifier, then the mask, and finds the peaks anew.
  void modify(const Chunk& c) {
    for (int v = c.low; v < c.high; ++v) {
      vf highest = load(peak_ + v * VL);
      for (int i = c.first; i < c.last; ++i) {
        float* s = s_ + i * block_q_ + v * VL;
        vf modified = modifier_.value(load(s) * raw_scale_, q_tokens_[v], kv_tokens_[i], edges_.at(i, v));
        if (masked_) modified = select_bits((uint32_t)(lanes_[i] >> (v * VL)) & ALL_LANES, modified, splat(NEG_INF));
        highest = maximum(modified, highest);
        store(s, modified);
      }
      store(peak_ + v * VL, highest);
    }
  }

  // Moves the reference point of the exponentials where a strip's scores have outgrown it.
  void raise_maximum() {
    const float slack = RESCALE_LOG2 / log2_scale_;
    for (int v = 0; v < vectors_; ++v) {
      vf m = load(m_ + v * VL), peak = load(peak_ + v * VL);
      if (!any_greater(peak, m + slack)) continue;
      vf highest = maximum(m, peak);
      store(m_ + v * VL, highest);
      if (fresh_) continue;
      vf base = highest == NEG_INF ? vf{} : highest;
      vf shrink = exp2((m - base) * log2_scale_);
      store(l_ + v * VL, load(l_ + v * VL) * shrink);
      for (int64_t c = 0; c < v_dim_; ++c) {
        float* to = acc_ + c * block_q_ + v * VL;
        store(to, load(to) * shrink);
      }
    }
  }

  // p = exp(scale · (s - m)), summed into l, in the operand form of the value blocks.
  void exponentiate(const Chunk& c) {
    for (int v = c.low; v < c.high; ++v) {
      vf m = load(m_ + v * VL);
      vf base = (m == NEG_INF ? vf{} : m) * -log2_scale_;
      vf l{};  // of this strip, for the same reason as in value_block
      const float* s = s_ + v * VL;
      if constexpr (PACK == 1) {
        float* p = (float*)p_ + v * VL;
#pragma GCC unroll 4
        for (int i = c.first; i < c.last; ++i) {
          vf weight = exp2(load(s + i * block_q_) * log2_scale_ + base);
          l += weight;
          store(p + i * block_q_, weight);
        }
      } else {
#if defined(SX_BF16_DOT)
        uint32_t* p = (uint32_t*)p_ + v * VL;
#pragma GCC unroll 2
        for (int i = c.first; i < c.last; i += 2) {
          vf low = exp2(load(s + i * block_q_) * log2_scale_ + base);
          vf high = i + 1 < c.last ? exp2(load(s + (i + 1) * block_q_) * log2_scale_ + base) : vf{};
          l += low + high;
          vu pair = pair_bf16(low, high);
          std::memcpy(p + i / 2 * block_q_, &pair, sizeof pair);
        }
#endif
      }
      store(l_ + v * VL, load(l_ + v * VL) + l);
    }
  }

  const Score& modifier_;
  const float raw_scale_;
  vi q_tokens_[MAX_BLOCK_Q / VL];
  int32_t kv_tokens_[STRIP];
  StripEdges<STRIP, MAX_BLOCK_Q, Score::NEEDS_EDGES> edges_;
  const int64_t block_q_, head_dim_, v_dim_, depth_;
  const float sign_, scale_, log2_scale_;
  int64_t padded_, v_pitch_, n_ = 0;
  int vectors_ = 0, keys_ = 0, n_chunks_ = 0;
  bool masked_ = false, fresh_ = true;
  Operand* qt_;     // [depth, block_q]
  float* acc_;      // [v_dim, block_q]
  float *m_, *l_, *peak_;
  float* s_;        // [STRIP, block_q]
  Operand* p_;      // [STRIP / pack, block_q]
  Operand *k_rows_, *v_rows_;
  float* q_rows_;   // [block_q, head_dim padded]
  float* unpacked_; // [block_q, v_dim padded]
  const T *k_[STRIP], *v_[STRIP];
  uint64_t lanes_[STRIP + MAX_KEY_GROUP];
  const Operand *kp_[STRIP + MAX_KEY_GROUP], *vp_[STRIP];
  Chunk chunks_[STRIP / CHUNK_STEP];
};

}  // namespace sx
