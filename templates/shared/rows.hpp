// Exact attention of one query over a list of keys: the engine of `row_traversal`, and of the leftovers of `hybrid`.
//
// Vector lanes lie along head_dim. Keys are taken VL at a time: their dot products are reduced together, then softmax and
// the weighted sum of V follow; the rows of keys LOOKAHEAD places further on are prefetched meanwhile, across the ends of
// queries. Exactly one dot product per key; a key touches only the queries that attend it. fp32 accumulation throughout.
//
// Decides grouping, prefetching and the online softmax of a row. Knows nothing of where a list of keys comes from.
#pragma once

#include <cmath>
#include <type_traits>

#include "arguments.hpp"
#include "edge_numbers.hpp"
#include "score.hpp"
#include "simd.hpp"

namespace sx {

constexpr int LOOKAHEAD = 32;
constexpr int SHORT = VL < 8 ? 4 : 8;  // queries of so few keys stay in registers
constexpr int MAX_HEADS_SHARING = 8;  // query heads side by side over one key head
constexpr int MAX_DIM = 256;  // of head_dim and v_dim

#if defined(SX_COUNT_DOT_PRODUCTS)
inline std::atomic<int64_t> dot_products{0};
SX_INLINE void count_dot_products(int64_t n) { dot_products.fetch_add(n, std::memory_order_relaxed); }
#else
SX_INLINE void count_dot_products(int64_t) {}
#endif

// Where the rows of K and V of one head lie.
template <class T> struct KeyRows {
  const T *k, *v;
  int64_t k_pitch, v_pitch;
};

template <class T> class RowEngine {
 public:
  RowEngine(int64_t head_dim, int64_t v_dim, float scale, const Score& modifier)
      : modifier_(modifier), raw_scale_(scale), head_dim_(head_dim), v_dim_(v_dim),
        // As in TileEngine: a negative scale is taken into q; a zero one must not turn -inf into NaN; a modifier leaves
        // nothing to scale.
        sign_(scale < 0 && !HAS_SCORE_MOD ? -1.0f : 1.0f), scale_(HAS_SCORE_MOD ? 1.0f : std::fabs(scale)),
        log2_scale_(std::fmax(scale_, 1e-30f) * LOG2_E) {}

  // Takes up the query at place `token` of the sequence.
  void begin(const T* q, int64_t token) {
    q_token_ = (int32_t)token;
    for (int64_t x = 0; x < head_dim_; x += VL)
      store(q_ + x, (x + VL <= head_dim_ ? load_f32(q + x) : load_f32_partial(q + x, (int)(head_dim_ - x))) * sign_);
#if defined(SX_BF16_DOT)
    if constexpr (std::is_same_v<T, bf16>)
      for (int64_t x = 0; x < head_dim_; x += VL) store_as(q_half_ + x, load(q_ + x));
#endif
    for (int64_t x = 0; x < v_dim_; x += VL) store(acc_ + x, vf{});
    m_ = NEG_INF;
    l_ = vf{};
  }

  // Takes up a query some of whose keys were added elsewhere: maximum (in scores), sum, unnormalised output.
  void resume(const T* q, int64_t token, float m, float l, const float* acc) {
    begin(q, token);
    m_ = m;
    l_[0] = l;
    std::memcpy(acc_, acc, v_dim_ * 4);
  }

  // Adds the keys `tokens[0:n]`; tokens up to `tokens[ahead]` may be looked at early.
  void add(const KeyRows<T>& rows, const int32_t* tokens, int64_t n, int64_t ahead, RowEdges edges) {
    add_to(this, 1, rows, tokens, n, ahead, edges);
  }

  // Adds the keys to `heads` queries of one key head, which fetch each of them once.
  static void add_to(RowEngine* engines, int heads, const KeyRows<T>& rows, const int32_t* tokens, int64_t n, int64_t ahead,
                     RowEdges edges) {
    const int64_t head_dim = engines->head_dim_, vectors = (head_dim + VL - 1) / VL;
    if (head_dim % VL == 0 && engines->v_dim_ == head_dim) {
      if (vectors == 1) return add_all<1>(engines, heads, rows, tokens, n, ahead, edges);
      if (vectors == 2) return add_all<2>(engines, heads, rows, tokens, n, ahead, edges);
      if (vectors == 4) return add_all<4>(engines, heads, rows, tokens, n, ahead, edges);
      if (vectors == 8) return add_all<8>(engines, heads, rows, tokens, n, ahead, edges);
    }
    add_all<0>(engines, heads, rows, tokens, n, ahead, edges);
  }

  // A whole query of 1 ≤ n ≤ SHORT keys in registers, where the dimensions allow it: begin, add and finish in one.
  SX_INLINE bool attend_short(const T* q, const KeyRows<T>& rows, const int32_t* tokens, int64_t n, int64_t ahead, T* out,
                              float* lse) const {
    if (HAS_SCORE_MOD || n > SHORT || n == 0 || v_dim_ != head_dim_) return false;
    if (head_dim_ == 2 * VL) return attend_short<2>(q, rows, tokens, n, ahead, out, lse);
    if (head_dim_ == 4 * VL) return attend_short<4>(q, rows, tokens, n, ahead, out, lse);
    if (head_dim_ == 8 * VL) return attend_short<8>(q, rows, tokens, n, ahead, out, lse);
    return false;
  }

  // Writes the normalised row and its log-sum-exp (where not null).
  template <class Out> void finish(Out* out, float* lse) const {
    const float l = sum(), inverse = l == 0 ? 0.0f : 1.0f / l;
    int64_t x = 0;
    for (; x + VL <= v_dim_; x += VL) store_as(out + x, load(acc_ + x) * inverse);
    if (x < v_dim_) store_partial(out + x, load(acc_ + x) * inverse, (int)(v_dim_ - x));
    if (lse) *lse = l == 0 ? NEG_INF : m_ * scale_ + log2(splat(l))[0] * (1 / LOG2_E);
  }

  // The running state: maximum (in scores), sum, and unnormalised output.
  float maximum_score() const { return m_; }
  float sum() const { return horizontal_sum(l_); }
  const float* accumulator() const { return acc_; }

  // A saved state is [maximum, sum, output...]; joining it is exact.
  void save(float* to) const {
    to[0] = m_;
    to[1] = sum();
    std::memcpy(to + 2, acc_, v_dim_ * 4);
  }
  void join(const float* from) {
    if (from[1] == 0) return;
    const float highest = m_ > from[0] ? m_ : from[0];
    const float mine = m_ == NEG_INF ? 0.0f : std::exp2((m_ - highest) * log2_scale_);
    const float theirs = std::exp2((from[0] - highest) * log2_scale_);
    m_ = highest;
    l_ *= mine;
    l_[0] += from[1] * theirs;
    for (int64_t c = 0; c < v_dim_; ++c) acc_[c] = acc_[c] * mine + from[2 + c] * theirs;
  }

 private:
  template <int VECTORS>
  SX_INLINE bool attend_short(const T* q, const KeyRows<T>& rows, const int32_t* tokens, int64_t n, int64_t ahead, T* out,
                              float* lse) const {
    look_ahead<VECTORS>(rows, tokens, n, ahead);
    switch (n) {
      case 1: attend_exactly<VECTORS, 1>(q, rows, tokens, out, lse); return true;
      case 2: attend_exactly<VECTORS, 2>(q, rows, tokens, out, lse); return true;
      case 3: attend_exactly<VECTORS, 3>(q, rows, tokens, out, lse); return true;
      case 4: attend_exactly<VECTORS, 4>(q, rows, tokens, out, lse); return true;
      case 5: attend_exactly<VECTORS, 5>(q, rows, tokens, out, lse); return true;
      case 6: attend_exactly<VECTORS, 6>(q, rows, tokens, out, lse); return true;
      case 7: attend_exactly<VECTORS, 7>(q, rows, tokens, out, lse); return true;
      case 8: attend_exactly<VECTORS, 8>(q, rows, tokens, out, lse); return true;
      default: return false;
    }
  }
  template <int VECTORS, int N>
  SX_INLINE void attend_exactly(const T* q, const KeyRows<T>& rows, const int32_t* tokens, T* out, float* lse) const {
    constexpr int PERIOD = N == 1 ? 1 : N == 2 ? 2 : N <= 4 ? 4 : 8;  // lanes repeat with this period
    count_dot_products(N);
    vf partial[PERIOD];
    {
      vf query[VECTORS];
#pragma GCC unroll 8
      for (int x = 0; x < VECTORS; ++x) query[x] = load_f32(q + x * VL) * sign_;
#pragma GCC unroll 8
      for (int i = 0; i < PERIOD; ++i) {
        partial[i] = vf{};
        if (i < N) {
          const T* k = rows.k + tokens[i] * rows.k_pitch;
#pragma GCC unroll 8
          for (int x = 0; x < VECTORS; ++x) partial[i] += query[x] * load_f32(k + x * VL);
        }
      }
    }
    vf s = horizontal_sums<PERIOD>(partial);
    uint32_t live = 0;
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) live |= (uint32_t)(i % PERIOD < N) << i;
    if (N < PERIOD) s = select_bits(live, s, splat(NEG_INF));
    vf m = s;
#pragma GCC unroll 3
    for (int by = 1; by < PERIOD; by *= 2) m = maximum(rotate(m, by), m);
    vf weights = exp2((s - m) * log2_scale_);
    vf l = weights;
#pragma GCC unroll 3
    for (int by = 1; by < PERIOD; by *= 2) l += rotate(l, by);
    weights = weights / l;
    vf acc[VECTORS];
#pragma GCC unroll 8
    for (int x = 0; x < VECTORS; ++x) acc[x] = vf{};
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const T* v = rows.v + tokens[i] * rows.v_pitch;
      const vf weight = splat_lane(weights, i);
#pragma GCC unroll 8
      for (int x = 0; x < VECTORS; ++x) acc[x] += weight * load_f32(v + x * VL);
    }
#pragma GCC unroll 8
    for (int x = 0; x < VECTORS; ++x) store_as(out + x * VL, acc[x]);
    if (lse) *lse = m[0] * scale_ + log2(l)[0] * (1 / LOG2_E);
  }

  // VECTORS > 0: head_dim and v_dim are both VECTORS · VL.
  template <int VECTORS>
  static void add_all(RowEngine* engines, int heads, const KeyRows<T>& rows, const int32_t* tokens, int64_t n, int64_t ahead,
                      RowEdges edges) {
    for (int64_t first = 0; first < n; first += VL) {
      const int count = (int)(n - first < VL ? n - first : VL);
      engines->template look_ahead<VECTORS>(rows, tokens + first, count, ahead - first);
      for (int h = 0; h < heads; ++h) engines[h].template step<VECTORS>(rows, tokens + first, count, edges.from(first));
    }
  }
  // Prefetches what is needed LOOKAHEAD keys after tokens[0:n], as far as tokens[ahead].
  template <int VECTORS>
  SX_INLINE void look_ahead(const KeyRows<T>& rows, const int32_t* tokens, int64_t n, int64_t ahead) const {
    for (int64_t i = LOOKAHEAD, last = i + n < ahead ? i + n : ahead; i < last; ++i) {
      prefetch<VECTORS>(rows.k + tokens[i] * rows.k_pitch, head_dim_);
      prefetch<VECTORS>(rows.v + tokens[i] * rows.v_pitch, v_dim_);
    }
  }
  // Into the second-level cache: the first cannot have enough lines on their way.
  template <int VECTORS> SX_INLINE static void prefetch(const T* row, int64_t n) {
    const char* at = (const char*)row;
    if constexpr (VECTORS > 0) {
#pragma GCC unroll 16
      for (size_t x = 0; x < VECTORS * VL * sizeof(T); x += 64) __builtin_prefetch(at + x, 0, 2);
    } else {
      for (int64_t x = 0; x < n * (int64_t)sizeof(T); x += 64) __builtin_prefetch(at + x, 0, 2);
    }
  }

  // q · k as VL partial sums.
  template <int VECTORS> SX_INLINE vf dot(const T* k) const {
    vf sum{};
#if defined(SX_BF16_DOT)
    if constexpr (std::is_same_v<T, bf16> && VECTORS > 0 && VECTORS % 2 == 0) {
#pragma GCC unroll 8
      for (int x = 0; x < VECTORS * VL; x += 2 * VL) sum = dot_bf16(sum, load_as<vu>(q_half_ + x), load_as<vu>(k + x));
      return sum;
    }
#endif
    if constexpr (VECTORS > 0) {
#pragma GCC unroll 8
      for (int x = 0; x < VECTORS * VL; x += VL) sum += load(q_ + x) * load_f32(k + x);
    } else {
      int64_t x = 0;
      for (; x + VL <= head_dim_; x += VL) sum += load(q_ + x) * load_f32(k + x);
      if (x < head_dim_) sum += load(q_ + x) * load_f32_partial(k + x, (int)(head_dim_ - x));
    }
    return sum;
  }

  // The scores of n ≤ N keys, one a lane; -inf behind them.
  template <int VECTORS, int N> SX_INLINE vf scores(const KeyRows<T>& rows, const int32_t* tokens, int n, RowEdges edges) const {
    vf partial[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) partial[i] = i < n ? dot<VECTORS>(rows.k + tokens[i] * rows.k_pitch) : vf{};
    vf sums = horizontal_sums<N>(partial);
    if constexpr (HAS_SCORE_MOD) {
      vi places{};
      for (int i = 0; i < n; ++i) places[i] = tokens[i];
      if constexpr (Score::NEEDS_EDGES) sums = modifier_.value(sums * raw_scale_, q_token_, places, edges.take(n));
      else sums = modifier_.value(sums * raw_scale_, q_token_, places, 0);
    }
    return select_bits((1u << n) - 1, sums, splat(NEG_INF));
  }
  template <int VECTORS> SX_INLINE vf few_scores(const KeyRows<T>& rows, const int32_t* tokens, int n, RowEdges edges) const {
    if (n <= 4) return scores<VECTORS, 4>(rows, tokens, n, edges);
    if constexpr (VL > 8) if (n <= 8) return scores<VECTORS, 8>(rows, tokens, n, edges);
    return scores<VECTORS, VL>(rows, tokens, n, edges);
  }

  template <int VECTORS> SX_INLINE void step(const KeyRows<T>& rows, const int32_t* tokens, int n, RowEdges edges) {
    count_dot_products(n);
    const vf s = n == VL ? scores<VECTORS, VL>(rows, tokens, n, edges) : few_scores<VECTORS>(rows, tokens, n, edges);
    if (any_greater(s, splat(m_ + RESCALE_LOG2 / log2_scale_))) raise_maximum(horizontal_max(s));
    const float base = m_ == NEG_INF ? 0.0f : m_ * -log2_scale_;
    alignas(64) float p[VL];
    const vf weights = exp2(s * log2_scale_ + base);
    l_ += weights;
    store(p, weights);
    if constexpr (VECTORS > 0) {
      vf acc[VECTORS];
#pragma GCC unroll 8
      for (int x = 0; x < VECTORS; ++x) acc[x] = vf{};
      for (int i = 0; i < n; ++i) {
        const T* v = rows.v + tokens[i] * rows.v_pitch;
#pragma GCC unroll 8
        for (int x = 0; x < VECTORS; ++x) acc[x] += p[i] * load_f32(v + x * VL);
      }
#pragma GCC unroll 8
      for (int x = 0; x < VECTORS; ++x) store(acc_ + x * VL, load(acc_ + x * VL) + acc[x]);
    } else {
      for (int i = 0; i < n; ++i) {
        const T* v = rows.v + tokens[i] * rows.v_pitch;
        int64_t x = 0;
        for (; x + VL <= v_dim_; x += VL) store(acc_ + x, load(acc_ + x) + p[i] * load_f32(v + x));
        if (x < v_dim_) store(acc_ + x, load(acc_ + x) + p[i] * load_f32_partial(v + x, (int)(v_dim_ - x)));
      }
    }
  }

  void raise_maximum(float peak) {
    const float highest = m_ > peak ? m_ : peak;
    const float shrink = m_ == NEG_INF ? 0.0f : std::exp2((m_ - highest) * log2_scale_);
    m_ = highest;
    l_ *= shrink;
    for (int64_t x = 0; x < v_dim_; x += VL) store(acc_ + x, load(acc_ + x) * shrink);
  }

  const Score& modifier_;
  const float raw_scale_;
  int32_t q_token_ = 0;
  const int64_t head_dim_, v_dim_;
  const float sign_, scale_, log2_scale_;
  float m_;
  vf l_;
  alignas(64) float q_[MAX_DIM + VL];
  alignas(64) float acc_[MAX_DIM + VL];
#if defined(SX_BF16_DOT)
  alignas(64) T q_half_[MAX_DIM + VL];
#endif
};

}  // namespace sx
