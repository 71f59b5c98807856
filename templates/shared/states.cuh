// What becomes of a state: output, log-sum-exp, and states of pieces joined in their order.
//
// In memory a state is its peak (the highest score, in units of log 2), its total (the sum of the weights
// 2^(score - peak)) and the weighted sum of values; -inf, 0 and 0 where no key was met.
#pragma once
#include "shared/device.cuh"

namespace sx {

// A sum that is not a number is not 0: it goes through to the output.
SX_INLINE float inverse_of(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }
SX_INLINE float lse_of(float peak, float total) {
  return total == 0.0f ? negative_infinity() : (peak + log2f(total)) * kLn2;
}

// Joins `n` states, `stride` floats apart, in their order; each of `workers` takes every so manyth of DIM columns and
// calls `write(column, sum, total)`. Returns peak and total.
template <int DIM, class Write>
SX_INLINE float2 join_states(const float* states, int n, i64 stride, int worker, int workers, const Write& write) {
  float peak = negative_infinity(), total = 0.0f;
  for (int i = 0; i < n; ++i) peak = fmaxf(peak, states[i * stride]);
  const float base = peak == negative_infinity() ? 0.0f : peak;
  for (int i = 0; i < n; ++i) total = fmaf(states[i * stride + 1], power_of_two(states[i * stride] - base), total);
  for (int column = worker; column < DIM; column += workers) {
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) sum = fmaf(states[i * stride + 2 + column], power_of_two(states[i * stride] - base), sum);
    write(column, sum, total);
  }
  return make_float2(peak, total);
}

}  // namespace sx
