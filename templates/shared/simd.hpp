// Vectors of floats, as wide as the target has them.
//
// Decides how sparsec's CPU kernels spell arithmetic: GCC/Clang vector types for everything the language can express, and
// one line of intrinsics where it cannot (maximum, 2^x, transposed loads, half-precision conversion, bf16 dot products).
// Knows nothing of attention.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sx {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define SX_AVX512 1
constexpr int VL = 16;          // floats a vector
constexpr int BLOCK_VECTORS = 4;  // vectors of queries a register block: 6 × 4 accumulators of 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
#define SX_AVX2 1
constexpr int VL = 8;
constexpr int BLOCK_VECTORS = 2;
#elif defined(__aarch64__)
#define SX_NEON 1
constexpr int VL = 4;
constexpr int BLOCK_VECTORS = 4;
#else
constexpr int VL = 4;
constexpr int BLOCK_VECTORS = 2;
#endif

#if defined(SX_AVX512) && defined(__AVX512BF16__)
#define SX_BF16_DOT 1
#endif

#define SX_INLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
// fp16 as a type that converts; GCC has _Float16 in C++ on Arm only from version 13.
#if defined(__aarch64__)
typedef __fp16 half;
#else
typedef _Float16 half;
#endif

constexpr float NEG_INF = -__builtin_inff();
constexpr float LOG2_E = 1.4426950408889634f;
// Online softmax raises its reference point only when a score exceeds it by this many powers of two, so that rescaling is
// rare; weights stay below 2^8 and sums far below overflow. Exact either way: the reference point cancels.
constexpr float RESCALE_LOG2 = 8.0f;

template <class V, class P> SX_INLINE V load_as(const P* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
SX_INLINE vf load(const float* p) { return load_as<vf>(p); }
SX_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
SX_INLINE vf splat(float x) { return x - vf{}; }
SX_INLINE vu splat_u(uint32_t x) { return x - vu{}; }

SX_INLINE vi iota() {
  vi v{};
  for (int i = 0; i < VL; ++i) v[i] = i;
  return v;
}

// The larger of each pair; the second operand where either is NaN.
SX_INLINE vf maximum(vf a, vf b) {
#if defined(SX_AVX512)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(SX_AVX2)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// `yes` where the lane's bit (lane i: bit i) is set, else `no`.
SX_INLINE vf select_bits(uint32_t bits, vf yes, vf no) {
#if defined(SX_AVX512)
  return (vf)_mm512_mask_blend_ps((__mmask16)bits, (__m512)no, (__m512)yes);
#else
  vu lane = splat_u(1) << (vu)iota();
  vi chosen = (splat_u(bits) & lane) != 0;
  return chosen ? yes : no;
#endif
}

SX_INLINE bool any_greater(vf a, vf b) {
#if defined(SX_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(SX_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#elif defined(SX_NEON)
  return vmaxvq_u32((uint32x4_t)(a > b)) != 0;
#else
  vi greater = a > b;
  int32_t any = 0;
  for (int i = 0; i < VL; ++i) any |= greater[i];
  return any != 0;
#endif
}

// Coefficients of p(r) ≈ 2^r on [0, 1) with p(0) = 1, highest power first: weighted least squares driven to minimax,
// relative error 1.4e-7 in fp32 arithmetic. Half precision takes the same: its log-sum-exp is fp32 too.
constexpr float EXP2_FIT[] = {0.00186713169f, 0.00901702690f, 0.0557999155f, 0.240164449f, 0.693151312f, 1.0f};

// 2^x for x in [-inf, 128): 0 below -126, exactly 1 at 0, NaN at NaN.
SX_INLINE vf exp2(vf x) {
#if defined(SX_AVX512)
  // r = x - floor(x), 0 at -inf; scalef multiplies by 2^floor(x), giving 0 at -inf.
  vf r = (vf)_mm512_reduce_ps((__m512)x, 0x09);
#else
  vf clamped = maximum(splat(-127.0f), x);  // NaN passes: it is the second operand
  vi whole = __builtin_convertvector(clamped, vi);
  whole += __builtin_convertvector(whole, vf) > clamped;  // towards -inf: true is -1
  vf r = clamped - __builtin_convertvector(whole, vf);
#endif
  vf p = splat(EXP2_FIT[0]);
#pragma GCC unroll 8
  for (int i = 1; i < 6; ++i) p = p * r + EXP2_FIT[i];
#if defined(SX_AVX512)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  vf result = p * (vf)((whole + 127) << 23);
  return x < -126.0f ? vf{} : result;
#endif
}

// log2(x) for finite x > 0 and for NaN: error 1e-7 of the result or absolute, by x = 2^e · f with f in [√½, √2) and the series of
// log((1 + t) / (1 - t)) in t = (f - 1) / (f + 1).
SX_INLINE vf log2(vf x) {
  vi bits = (vi)x - 0x3f3504f3;
  vf exponent = __builtin_convertvector(bits >> 23, vf);
  vf f = (vf)((bits & 0x007fffff) + 0x3f3504f3);
  vf t = (f - 1.0f) / (f + 1.0f), t2 = t * t;
  vf series = ((t2 * (2.0f / 9) + 2.0f / 7) * t2 + 2.0f / 5) * t2 + 2.0f / 3;
  vf result = (series * t2 + 2.0f) * t * LOG2_E + exponent;
  return x != x ? x : result;
}

// VL consecutive numbers of any dtype as floats.
SX_INLINE vf load_f32(const float* p) { return load(p); }
SX_INLINE vf load_f32(const bf16* p) {
  return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16);
}
SX_INLINE float to_f32(float x) { return x; }
SX_INLINE float to_f32(bf16 x) { uint32_t u = (uint32_t)x.bits << 16; float f; std::memcpy(&f, &u, 4); return f; }
SX_INLINE float to_f32(fp16 x) { half h; std::memcpy(&h, &x, 2); return (float)h; }
SX_INLINE vf load_f32(const fp16* p) {
#if defined(SX_AVX512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(SX_AVX2) && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(SX_NEON)
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
#else
  vf v{};
  for (int i = 0; i < VL; ++i) v[i] = to_f32(p[i]);
  return v;
#endif
}

// Rounded to nearest, ties to even.
SX_INLINE void store_as(float* p, vf v) { store(p, v); }
SX_INLINE vu bf16_bits(vf v) {
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (vu)(v != v ? (vi)((u >> 16) | 0x40u) : (vi)rounded);
}
SX_INLINE void store_as(bf16* p, vf v) {
  vh h = __builtin_convertvector(bf16_bits(v), vh);
  std::memcpy(p, &h, sizeof h);
}
SX_INLINE void store_as(fp16* p, vf v) {
#if defined(SX_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(SX_AVX2) && defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(SX_NEON)
  vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  for (int i = 0; i < VL; ++i) { half h = (half)v[i]; std::memcpy(p + i, &h, 2); }
#endif
}
template <class T> SX_INLINE T from_f32(float x) {
  T parts[VL];
  store_as(parts, splat(x));
  return parts[0];
}

// The first `n` < VL numbers, zeros behind them.
template <class T> SX_INLINE vf load_f32_partial(const T* p, int n) {
#if defined(SX_AVX512)
  const uint32_t bits = (1u << n) - 1;
  if constexpr (sizeof(T) == 4) return (vf)_mm512_maskz_loadu_ps((__mmask16)bits, (const float*)p);
  alignas(32) T parts[VL];
  _mm256_store_si256((__m256i*)parts, _mm256_maskz_loadu_epi16((__mmask16)bits, p));
  return load_f32(parts);
#endif
  vf v{};
  for (int i = 0; i < n; ++i) v[i] = to_f32(p[i]);
  return v;
}
template <class T> SX_INLINE void store_partial(T* p, vf v, int n) {
  T parts[VL];
  store_as(parts, v);
  for (int i = 0; i < n; ++i) p[i] = parts[i];
}
// n numbers as floats, times `factor`; zeros behind them to the end of the last vector.
template <class T> inline void widen(float* to, const T* from, int64_t n, float factor = 1.0f) {
  for (int64_t x = 0; x < n; x += VL)
    store(to + x, (x + VL <= n ? load_f32(from + x) : load_f32_partial(from + x, (int)(n - x))) * factor);
}
SX_INLINE int64_t whole_vectors(int64_t n) { return (n + VL - 1) / VL * VL; }

// Row i of `rows` becomes column i: a VL × VL transpose by log2(VL) rounds of interleaving.
template <class V> SX_INLINE V interleave_low(V a, V b) {
#if defined(SX_AVX512)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(SX_AVX2)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
template <class V> SX_INLINE V interleave_high(V a, V b) {
#if defined(SX_AVX512)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(SX_AVX2)
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}
template <class V> SX_INLINE void transpose(V (&rows)[VL]) {
  for (int width = 1; width < VL; width *= 2) {
    V next[VL];
    for (int i = 0; i < VL / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + VL / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + VL / 2]);
    }
    for (int i = 0; i < VL; ++i) rows[i] = next[i];
  }
}

// Lane i gets lane (i + by) % VL; `by` is a constant after inlining.
SX_INLINE vf rotate(vf v, int by) {
  vf r;
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) r[i] = v[(i + by) % VL];
  return r;
}
// Every lane gets lane `i`, a constant after inlining.
SX_INLINE vf splat_lane(vf v, int i) {
  vf r;
#pragma GCC unroll 16
  for (int j = 0; j < VL; ++j) r[j] = v[i];
  return r;
}

// Sums of N ≤ VL vectors (N a power of two): the sum of rows[i] in lane i, and again every N lanes. Each round adds halves
// while interleaving two vectors, which leaves the lanes in natural order.
template <int N> SX_INLINE vf horizontal_sums(vf (&rows)[N]) {
#pragma GCC unroll 4
  for (int half = N / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) rows[i] = interleave_low(rows[i], rows[i + half]) + interleave_high(rows[i], rows[i + half]);
  vf total = rows[0];
#pragma GCC unroll 4
  for (int by = VL / 2; by >= N; by /= 2) total += rotate(total, by);
  return total;
}
SX_INLINE float horizontal_sum(vf v) {
#if defined(SX_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < VL; ++i) total += v[i];
  return total;
#endif
}
SX_INLINE float horizontal_max(vf v) {
#if defined(SX_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < VL; ++i) best = best > v[i] ? best : v[i];
  return best;
#endif
}

#if defined(SX_BF16_DOT)
// acc + a.lo·b.lo + a.hi·b.hi for pairs of bf16 in 32-bit lanes.
SX_INLINE vf dot_bf16(vf acc, vu a, vu b) {
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
// Two vectors as pairs of bf16: lane i holds `low[i]` and, above it, `high[i]`.
SX_INLINE vu pair_bf16(vf low, vf high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vu)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

// to[i] = low[i] and, above it, high[i]; zeros above where `high` is null.
SX_INLINE void pair_rows(uint32_t* to, const bf16* low, const bf16* high, int64_t n) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                         39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  int64_t x = 0;
  if (high)
    for (; x + 2 * VL <= n; x += 2 * VL) {
      const __m512i a = _mm512_loadu_si512(low + x), b = _mm512_loadu_si512(high + x);
      _mm512_storeu_si512(to + x, _mm512_permutex2var_epi16(a, first, b));
      _mm512_storeu_si512(to + x + VL, _mm512_permutex2var_epi16(a, second, b));
    }
  for (; x < n; ++x) to[x] = low[x].bits | (high ? (uint32_t)high[x].bits << 16 : 0);
}
#endif

}  // namespace sx
