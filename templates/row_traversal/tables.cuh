// Sums for the gradients of a score modifier's tables, in integers: exact, and so the same in whatever order they come.
//
// The host's side of it, which says how, is backends/table_gradients.py.
#pragma once
#include "shared/device.cuh"

namespace sx {

using u64 = unsigned long long;

constexpr int kDigitBits = 28, kSumWords = 11;

// Adds an fp32 number to the sum at `index`.
SX_INLINE void add_exactly(void* sums, i64 index, float x) {
  const unsigned bits = __float_as_uint(x);
  const int exponent = (int)(bits >> 23 & 255);
  const bool is_negative = bits >> 31;
  u64* at = (u64*)sums + index * kSumWords;
  if (exponent == 255) {
    atomicAdd(at + kSumWords - 1, x != x ? (1ull << 32) + 1 : is_negative ? 1ull << 32 : 1ull);
    return;
  }
  const int place = max(exponent, 1) - 1;
  const u64 wide = (u64)((bits & 0x7fffffu) | (exponent ? 0x800000u : 0u)) << place % kDigitBits;
  const u64 low = wide & ((1ull << kDigitBits) - 1), high = wide >> kDigitBits;
  at += place / kDigitBits;
  // Two's complement: what is taken away is added modulo 2^64.
  if (low) atomicAdd(at, is_negative ? 0 - low : low);
  if (high) atomicAdd(at + 1, is_negative ? 0 - high : high);
}

// The gradient of what a modified score was made of; 0 where that of the score is 0, though the factor be infinite.
SX_INLINE float chained(float d_value, float factor) { return d_value == 0.0f ? 0.0f : d_value * factor; }

}  // namespace sx
