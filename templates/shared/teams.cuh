// What a team of lanes does with rows of K and V: SX_LANES lanes fetch one together, and keep one running state.
#pragma once
#include "shared/device.cuh"

namespace sx {

constexpr int kLanes = SX_LANES;
constexpr int kTeams = 32 / SX_LANES;

// Sums over the lanes of a team; every lane has the result.
SX_INLINE float team_sum(float x) {
#pragma unroll
  for (int lane = 1; lane < kLanes; lane *= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

// The part of a row that one lane holds: vectors lane, lane + kLanes, ... of BYTES bytes each.
template <class T, int DIM, int BYTES> struct Slice {
  static constexpr int kWidth = BYTES / (int)sizeof(T);  // elements a vector
  static constexpr int kVectors = DIM / kWidth;          // of a row
  static constexpr int kParts = (kVectors + kLanes - 1) / kLanes;
  static constexpr int kSize = kParts * kWidth;          // elements a lane
  static_assert(DIM % kWidth == 0, "a row is whole vectors");
  using Raw = Vector<BYTES>[kParts];

  static SX_INLINE bool has(int part, int lane) { return kVectors % kLanes == 0 || part * kLanes + lane < kVectors; }
  static SX_INLINE int element(int part, int lane) { return (part * kLanes + lane) * kWidth; }

  static SX_INLINE void fetch_row(Raw& to, const T* row, int lane, bool is_live) {
#pragma unroll
    for (int c = 0; c < kParts; ++c) {
      clear(to[c]);
      if (is_live && has(c, lane)) fetch(to[c], row + element(c, lane));
    }
  }
  static SX_INLINE void read(const Raw& from, float (&to)[kSize]) {
#pragma unroll
    for (int c = 0; c < kParts; ++c) Elements<T>::read(from[c], to + c * kWidth);
  }
  static SX_INLINE void load(float (&to)[kSize], const T* row, int lane, bool is_live) {
    Raw raw;
    fetch_row(raw, row, lane, is_live);
    read(raw, to);
  }
  template <class O> static SX_INLINE void store(O* row, const float (&from)[kSize], int lane) {
#pragma unroll
    for (int c = 0; c < kParts; ++c)
      if (has(c, lane)) Writer<O, kWidth>::write(row + element(c, lane), from + c * kWidth);
  }
  // Calls `use(column, index)` for each element of the row that this lane holds.
  template <class Use> static SX_INLINE void each(int lane, const Use& use) {
#pragma unroll
    for (int c = 0; c < kParts; ++c) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e)
        if (has(c, lane)) use(element(c, lane) + e, c * kWidth + e);
    }
  }
  static SX_INLINE float dot(const float (&a)[kSize], const float (&b)[kSize]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum = fmaf(a[i], b[i], sum);
    return sum;
  }
  static SX_INLINE void add(float (&to)[kSize], float weight, const float (&from)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) to[i] = fmaf(weight, from[i], to[i]);
  }
};

// The state of a team's keys so far, for each of PACK heads: the highest score in units of log 2, the sum of the weights
// 2^(score - peak), and the weighted sum of values, of which a lane holds its slice.
template <class V, int PACK, int KEYS> struct TeamState {
  float peak[PACK], total[PACK], sum[PACK][V::kSize];

  SX_INLINE void clear() {
#pragma unroll
    for (int p = 0; p < PACK; ++p) {
      peak[p] = negative_infinity(), total[p] = 0.0f;
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) sum[p][i] = 0.0f;
    }
  }
  SX_INLINE void shrink(int p, float top) {
    // No key so far: -inf less -inf is not a number, and less 0 a weight of 0.
    const float by = power_of_two(peak[p] - (top == negative_infinity() ? 0.0f : top));
    peak[p] = top, total[p] *= by;
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) sum[p][i] *= by;
  }

  // Adds KEYS keys: `scores` are q . k.
  SX_INLINE void attend(const float (&scores)[PACK][KEYS], const bool (&is_live)[KEYS], const typename V::Raw (&v)[KEYS], float scale) {
    float weights[PACK][KEYS];
#pragma unroll
    for (int p = 0; p < PACK; ++p) {
      float top = peak[p];
#pragma unroll
      for (int u = 0; u < KEYS; ++u) top = fmaxf(top, is_live[u] ? scores[p][u] * scale : negative_infinity());
      // Rare after the first keys: skipped unless some query of the warp meets a higher score.
      if (top > peak[p]) shrink(p, top);
      const float base = top == negative_infinity() ? 0.0f : top;
#pragma unroll
      for (int u = 0; u < KEYS; ++u) {
        weights[p][u] = is_live[u] ? power_of_two(fmaf(scores[p][u], scale, -base)) : 0.0f;
        total[p] += weights[p][u];
      }
    }
#pragma unroll
    for (int u = 0; u < KEYS; ++u) {
      float values[V::kSize];
      V::read(v[u], values);
#pragma unroll
      for (int p = 0; p < PACK; ++p) V::add(sum[p], weights[p][u], values);
    }
  }

  // The state of all teams of the warp together, in every team.
  SX_INLINE void join_teams() {
#pragma unroll
    for (int p = 0; p < PACK; ++p) {
      float top = peak[p];
#pragma unroll
      for (int lane = kLanes; lane < 32; lane *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lane));
      shrink(p, top);
#pragma unroll
      for (int lane = kLanes; lane < 32; lane *= 2) {
        total[p] += __shfl_xor_sync(kAllLanes, total[p], lane);
#pragma unroll
        for (int i = 0; i < V::kSize; ++i) sum[p][i] += __shfl_xor_sync(kAllLanes, sum[p][i], lane);
      }
    }
  }
};

}  // namespace sx
