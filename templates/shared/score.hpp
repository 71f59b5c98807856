// Score modifiers on vectors: the functions that printed expressions call, and the modifier of this build.
//
// A build without SX_SCORE_HEADER leaves scores alone (HAS_SCORE_MOD is false and nothing below costs anything). With it,
// the generated header defines `Score`: `value`, `slope` (the derivative by the score) and `scatter` (what scores add to the
// gradients of tables that are arguments) of a modifier that takes the scaled score, the batch element and head as scalars,
// and positions as scalars or vectors, whichever lies in lanes. NEEDS_EDGES says whether it reads the number of the edge.
#pragma once

#include <cmath>
#include <type_traits>

#include "simd.hpp"

namespace sx {

template <class X> constexpr bool is_vector = std::is_same_v<X, vf> || std::is_same_v<X, vi>;
template <class X> SX_INLINE vf as_vf(X x) {
  if constexpr (std::is_same_v<X, vf>) return x;
  else if constexpr (std::is_same_v<X, vi>) return __builtin_convertvector(x, vf);
  else return splat((float)x);
}
template <class X> SX_INLINE vi as_vi(X x) {
  if constexpr (std::is_same_v<X, vi>) return x;
  else if constexpr (std::is_same_v<X, vf>) return __builtin_convertvector(x, vi);
  else return (int32_t)x - vi{};
}
template <class F> SX_INLINE vf each_lane(vf x, F&& f) {
  for (int i = 0; i < VL; ++i) x[i] = f(x[i]);
  return x;
}

// Casts. A vector of bools holds 0 and -1; any other nonzero counts as true.
template <class X> SX_INLINE auto sx_to_float(X x) {
  if constexpr (is_vector<X>) return as_vf(x); else return (float)x;
}
template <class X> SX_INLINE auto sx_to_int(X x) {
  if constexpr (is_vector<X>) return as_vi(x); else return (int32_t)x;
}
template <class X> SX_INLINE auto sx_to_bool(X x) {
  if constexpr (is_vector<X>) return (vi)(x != 0); else return x != 0;
}

template <class C, class A, class B> SX_INLINE auto sx_where(C condition, A a, B b) {
  constexpr bool is_float = std::is_same_v<A, vf> || std::is_same_v<B, vf> || std::is_floating_point_v<A> || std::is_floating_point_v<B>;
  if constexpr (!is_vector<C> && !is_vector<A> && !is_vector<B>) return condition ? a : b;
  else if constexpr (is_float) {
    if constexpr (is_vector<C>) return (vf)(condition != 0 ? as_vf(a) : as_vf(b));
    else return condition ? as_vf(a) : as_vf(b);
  } else {
    if constexpr (is_vector<C>) return (vi)(condition != 0 ? as_vi(a) : as_vi(b));
    else return condition ? as_vi(a) : as_vi(b);
  }
}
template <class A, class B> SX_INLINE auto sx_min(A a, B b) { return sx_where(a < b, a, b); }
template <class A, class B> SX_INLINE auto sx_max(A a, B b) { return sx_where(a < b, b, a); }
template <class A> SX_INLINE auto sx_abs(A a) { return sx_where(a < 0, -a, a); }

// Rounded towards -inf; nothing divided by zero is asked for.
template <class A, class B> SX_INLINE auto sx_floordiv(A a, B b) {
  if constexpr (std::is_same_v<A, vf> || std::is_same_v<B, vf>) return each_lane(as_vf(a) / as_vf(b), [](float x) { return std::floor(x); });
  else if constexpr (std::is_floating_point_v<A> || std::is_floating_point_v<B>) return std::floor((float)a / (float)b);
  else {
    auto quotient = a / b;
    return quotient + sx_where((a % b != 0) & ((a < 0) != (b < 0)), -1, 0);
  }
}
template <class A, class B> SX_INLINE auto sx_mod(A a, B b) { return a - sx_floordiv(a, b) * b; }

#define SX_LANEWISE(name, f)                                                                  \
  template <class X> SX_INLINE auto name(X x) {                                               \
    if constexpr (is_vector<X>) return each_lane(as_vf(x), [](float y) { return (float)f(y); }); \
    else return (float)f((float)x);                                                           \
  }
SX_LANEWISE(sx_floor, std::floor)
SX_LANEWISE(sx_sqrt, std::sqrt)
SX_LANEWISE(sx_sin, std::sin)
SX_LANEWISE(sx_cos, std::cos)
#undef SX_LANEWISE

template <class X> SX_INLINE auto sx_exp2(X x) {
  if constexpr (!is_vector<X>) return std::exp2((float)x);
  else return exp2(sx_where(as_vf(x) > 127.9f, 127.9f, x));  // saturates; NaN goes through
}
template <class X> SX_INLINE auto sx_exp(X x) { return sx_exp2(sx_to_float(x) * LOG2_E); }
template <class X> SX_INLINE auto sx_log2(X x) {
  if constexpr (!is_vector<X>) return std::log2((float)x);
  else return each_lane(as_vf(x), [](float y) { return std::log2(y); });
}
template <class X> SX_INLINE auto sx_log(X x) { return sx_log2(x) * (1 / LOG2_E); }
template <class X> SX_INLINE auto sx_rsqrt(X x) { return 1.0f / sx_sqrt(x); }
template <class A, class B> SX_INLINE auto sx_pow(A a, B b) {
  if constexpr (!is_vector<A> && !is_vector<B>) return std::pow((float)a, (float)b);
  else { vf x = as_vf(a), y = as_vf(b); for (int i = 0; i < VL; ++i) x[i] = std::pow(x[i], y[i]); return x; }
}
// Both by e^-|x|, which cannot overflow.
template <class X> SX_INLINE auto sx_sigmoid(X x) {
  auto small = sx_exp(-sx_abs(sx_to_float(x)));
  return sx_where(x >= 0, 1.0f / (1.0f + small), small / (1.0f + small));
}
// tanh(x) = x · P(x²) / Q(x²) where |x| ≤ 8.3, and the value at 8.3 beyond. P and Q, lowest power first, are a rational least
// squares fit driven to minimax: relative error 1e-8, and 3e-7 in fp32 arithmetic, towards 0 too.
constexpr float TANH_END = 8.3f;
constexpr float TANH_P[] = {1.0f, 0.1342586726f, 3.54916486e-3f, 2.15084165e-5f, 1.46481218e-8f};
constexpr float TANH_Q[] = {1.0f, 0.4675919116f, 2.60799341e-2f, 3.37394304e-4f, 8.29505836e-7f};
SX_INLINE vf reciprocal(vf x) {
#if defined(SX_AVX512)
  const vf near = (vf)_mm512_rcp14_ps((__m512)x);
  return near * (2.0f - x * near);  // a Newton step: 14 bits become 28
#else
  return 1.0f / x;
#endif
}
template <class X> SX_INLINE auto sx_tanh(X x) {
  if constexpr (!is_vector<X>) return std::tanh((float)x);
  else {
    vf y = maximum(splat(-TANH_END), as_vf(x));  // NaN goes through
    y = y > TANH_END ? splat(TANH_END) : y;
    const vf y2 = y * y;
    vf p = splat(TANH_P[4]), q = splat(TANH_Q[4]);
#pragma GCC unroll 4
    for (int i = 3; i >= 0; --i) { p = p * y2 + TANH_P[i]; q = q * y2 + TANH_Q[i]; }
    return y * p * reciprocal(q);
  }
}

// Look-ups: an index counts from the end where negative, and is kept inside, so that lanes beyond the ends are harmless.
template <class I> SX_INLINE auto sx_wrap_index(I index, int32_t size) { return sx_where(index < 0, index + size, index); }
template <class I> SX_INLINE auto sx_clamp_index(I index, int32_t size) { return sx_min(sx_max(index, 0), size - 1); }
template <class E, class I> SX_INLINE auto sx_load(const E* table, I index) {
  if constexpr (!is_vector<I>) { if constexpr (std::is_same_v<E, double>) return (float)table[index]; else return table[index]; }
  else if constexpr (std::is_floating_point_v<E>) { vf x; for (int i = 0; i < VL; ++i) x[i] = (float)table[index[i]]; return x; }
  else { vi x; for (int i = 0; i < VL; ++i) x[i] = (int32_t)table[index[i]]; return x; }
}

// The gradient of what a modified score was made of; 0 where that of the score is 0, though the factor be infinite.
SX_INLINE vf sx_chained(vf d_value, vf factor) { return d_value == 0 ? vf{} : d_value * factor; }

// to[index] += x for the lanes whose bit is set, one after the other: lanes may share an index.
template <class I> SX_INLINE void sx_scatter(float* to, I index, vf x, uint32_t live) {
  if constexpr (!is_vector<I>) {
    to[index] += horizontal_sum(select_bits(live, x, vf{}));
  } else {
    alignas(64) float each[VL];
    alignas(64) int32_t at[VL];
    store(each, x);
    std::memcpy(at, &index, sizeof at);
    for (; live; live &= live - 1) to[at[__builtin_ctz(live)]] += each[__builtin_ctz(live)];
  }
}

}  // namespace sx

#if defined(SX_SCORE_HEADER)
#include SX_SCORE_HEADER
namespace sx { constexpr bool HAS_SCORE_MOD = true; }
#else
namespace sx {
constexpr bool HAS_SCORE_MOD = false;
struct Score {
  static constexpr bool NEEDS_EDGES = false;
  static constexpr int LIVE_TABLES = 0;
  Score(const void* const*, int32_t, int32_t) {}
  template <class At> void take_gradients(At&&) {}
  template <class Q, class K, class E> SX_INLINE vf value(vf score, Q, K, E) const { return score; }
  template <class Q, class K, class E> SX_INLINE vf slope(vf, Q, K, E) const { return splat(1.0f); }
  template <class Q, class K, class E> SX_INLINE void scatter(vf, vf, Q, K, E, uint32_t) const {}
};
}  // namespace sx
#endif
