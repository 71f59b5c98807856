// Gradients of one query over a list of keys: the backward counterpart of `rows.hpp`, by the formulas of
// `tile_gradient.hpp`.
//
// Vector lanes lie along the dimensions. Two dot products a key (scores and dP) give P and dS; then the key's rows of K, dK
// and dV are gone through once. Whoever calls sees to it that no two threads add to the same rows.
#pragma once

#include "rows.hpp"

namespace sx {

// Where the rows of K and V of one head lie, and the fp32 rows their gradients are added to.
template <class T> struct GradientRows {
  const T *k, *v;
  float *dk, *dv;
  int64_t k_pitch, v_pitch, dk_pitch, dv_pitch;
};

template <class T> class RowGradient {
 public:
  RowGradient(int64_t head_dim, int64_t v_dim, float scale, const Score& modifier)
      : modifier_(modifier), head_dim_(head_dim), v_dim_(v_dim), scale_(scale) {}

  // Takes up the query at place `token`, with dQ = 0 or with what other keys have given (`dq`, scaled).
  void begin(const T* q, const T* d_out, float lse, float delta, int64_t token, const float* dq = nullptr) {
    q_token_ = (int32_t)token;
    widen(q_, q, head_dim_);
    widen(do_, d_out, v_dim_);
    for (int64_t x = 0; x < head_dim_; x += VL) store(dq_ + x, dq && scale_ != 0 ? load(dq + x) * (1 / scale_) : vf{});
    lse_ = lse == NEG_INF ? 0.0f : lse;
    delta_ = delta;
  }

  // Adds the keys `tokens[0:n]`; tokens up to `tokens[ahead]` may be looked at early.
  void add(const GradientRows<T>& rows, const int32_t* tokens, int64_t n, int64_t ahead, RowEdges edges) {
    if (head_dim_ == v_dim_ && head_dim_ == 2 * VL) add_all<2>(rows, tokens, n, ahead, edges);
    else if (head_dim_ == v_dim_ && head_dim_ == 4 * VL) add_all<4>(rows, tokens, n, ahead, edges);
    else if (head_dim_ == v_dim_ && head_dim_ == 8 * VL) add_all<8>(rows, tokens, n, ahead, edges);
    else add_all<0>(rows, tokens, n, ahead, edges);
  }

  template <class Out> void finish(Out* dq) const {
    int64_t x = 0;
    for (; x + VL <= head_dim_; x += VL) store_as(dq + x, load(dq_ + x) * scale_);
    if (x < head_dim_) store_partial(dq + x, load(dq_ + x) * scale_, (int)(head_dim_ - x));
  }

 private:
  SX_INLINE static void prefetch(const void* row, int64_t bytes) {
    for (int64_t x = 0; x < bytes; x += 64) __builtin_prefetch((const char*)row + x, 0, 2);
  }

  template <int VECTORS> void add_all(const GradientRows<T>& rows, const int32_t* tokens, int64_t n, int64_t ahead, RowEdges edges) {
    const int64_t head_dim = VECTORS ? VECTORS * VL : head_dim_, v_dim = VECTORS ? VECTORS * VL : v_dim_;
    for (int64_t first = 0; first < n; first += VL) {
      const int count = (int)(n - first < VL ? n - first : VL);
      for (int64_t i = first + VL, last = i + count < ahead ? i + count : ahead; i < last; ++i) {
        prefetch(rows.k + tokens[i] * rows.k_pitch, head_dim * sizeof(T));
        prefetch(rows.v + tokens[i] * rows.v_pitch, v_dim * sizeof(T));
        prefetch(rows.dk + tokens[i] * rows.dk_pitch, head_dim * 4);
        prefetch(rows.dv + tokens[i] * rows.dv_pitch, v_dim * 4);
      }
      step<VECTORS>(rows, tokens + first, count, edges.from(first));
    }
  }

  template <int VECTORS> SX_INLINE vf dot(const float* a, const T* b, int64_t n) const {
    vf sum{};
    if constexpr (VECTORS > 0) {
#pragma GCC unroll 8
      for (int x = 0; x < VECTORS * VL; x += VL) sum += load(a + x) * load_f32(b + x);
    } else {
      int64_t x = 0;
      for (; x + VL <= n; x += VL) sum += load(a + x) * load_f32(b + x);
      if (x < n) sum += load(a + x) * load_f32_partial(b + x, (int)(n - x));
    }
    return sum;
  }

  // a · b of n ≤ N rows b, one a lane; only the first n lanes mean anything.
  template <int VECTORS, int N>
  SX_INLINE vf products(const float* a, const T* b, int64_t pitch, const int32_t* tokens, int n, int64_t dim) const {
    vf partial[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) partial[i] = i < n ? dot<VECTORS>(a, b + tokens[i] * pitch, dim) : vf{};
    return horizontal_sums<N>(partial);
  }
  template <int VECTORS>
  SX_INLINE vf few_products(const float* a, const T* b, int64_t pitch, const int32_t* tokens, int n, int64_t dim) const {
    if (n <= 4) return products<VECTORS, 4>(a, b, pitch, tokens, n, dim);
    if constexpr (VL > 8) if (n <= 8) return products<VECTORS, 8>(a, b, pitch, tokens, n, dim);
    return products<VECTORS, VL>(a, b, pitch, tokens, n, dim);
  }

  template <int VECTORS> SX_INLINE void step(const GradientRows<T>& rows, const int32_t* tokens, int n, RowEdges edges) {
    alignas(64) float p[VL], ds[VL], scaled_ds[VL];
    const vf s = few_products<VECTORS>(q_, rows.k, rows.k_pitch, tokens, n, head_dim_);
    const vf d_score = few_products<VECTORS>(do_, rows.v, rows.v_pitch, tokens, n, v_dim_) - delta_;
    if constexpr (HAS_SCORE_MOD) {
      vi places{};
      for (int i = 0; i < n; ++i) places[i] = tokens[i];
      const vf scaled = s * scale_;
      const auto edge = [&] {
        if constexpr (Score::NEEDS_EDGES) return edges.take(n);
        else return 0;
      }();
      const vf probability = exp2((modifier_.value(scaled, q_token_, places, edge) - lse_) * LOG2_E);
      store(p, probability);
      const vf d_value = probability * d_score;
      store(ds, sx_chained(d_value, modifier_.slope(scaled, q_token_, places, edge)));
      modifier_.scatter(d_value, scaled, q_token_, places, edge, (1u << (n - 1)) * 2 - 1);
    } else {
      const vf probability = exp2((s * scale_ - lse_) * LOG2_E);
      store(p, probability);
      store(ds, probability * d_score);
    }
    store(scaled_ds, load(ds) * scale_);
    if constexpr (VECTORS > 0) {
      vf dq[VECTORS];
#pragma GCC unroll 8
      for (int x = 0; x < VECTORS; ++x) dq[x] = load(dq_ + x * VL);
      for (int i = 0; i < n; ++i) {
        const T* k = rows.k + tokens[i] * rows.k_pitch;
        float *dk = rows.dk + tokens[i] * rows.dk_pitch, *dv = rows.dv + tokens[i] * rows.dv_pitch;
#pragma GCC unroll 8
        for (int x = 0; x < VECTORS; ++x) {
          dq[x] += ds[i] * load_f32(k + x * VL);
          store(dk + x * VL, load(dk + x * VL) + scaled_ds[i] * load(q_ + x * VL));
          store(dv + x * VL, load(dv + x * VL) + p[i] * load(do_ + x * VL));
        }
      }
#pragma GCC unroll 8
      for (int x = 0; x < VECTORS; ++x) store(dq_ + x * VL, dq[x]);
    } else {
      // The rows of dK and dV are padded to whole vectors.
      for (int i = 0; i < n; ++i) {
        const T* k = rows.k + tokens[i] * rows.k_pitch;
        float *dk = rows.dk + tokens[i] * rows.dk_pitch, *dv = rows.dv + tokens[i] * rows.dv_pitch;
        for (int64_t x = 0; x < head_dim_; x += VL) {
          const vf key = x + VL <= head_dim_ ? load_f32(k + x) : load_f32_partial(k + x, (int)(head_dim_ - x));
          store(dq_ + x, load(dq_ + x) + ds[i] * key);
          store(dk + x, load(dk + x) + scaled_ds[i] * load(q_ + x));
        }
        for (int64_t x = 0; x < v_dim_; x += VL) store(dv + x, load(dv + x) + p[i] * load(do_ + x));
      }
    }
  }

  const Score& modifier_;
  int32_t q_token_ = 0;
  const int64_t head_dim_, v_dim_;
  const float scale_;
  float lse_ = 0, delta_ = 0;
  alignas(64) float q_[MAX_DIM + VL], do_[MAX_DIM + VL], dq_[MAX_DIM + VL];
};

}  // namespace sx
