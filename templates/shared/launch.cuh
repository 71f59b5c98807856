// Which part of a launch a block takes: a batch element, the heads that share keys, a job of theirs.
#pragma once
#include "shared/device.cuh"

namespace sx {

// Of a score modifier.
constexpr int kMaxTables = 16;

// One batch element and head pack.
struct Copy {
  i64 index, batch, head;
};

// Packs that share keys take the same jobs side by side, so that one finds in the cache what another has fetched.
template <class Lists> SX_INLINE Copy copy_of(const Lists& lists, unsigned n_jobs, unsigned* job) {
  const unsigned inner = blockIdx.x % lists.abreast, rest = blockIdx.x / lists.abreast;
  const unsigned index = rest / n_jobs * lists.abreast + inner;
  *job = rest % n_jobs;
  return {index, lists.batches[index / lists.n_heads], lists.heads[index % lists.n_heads]};
}

SX_INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace sx
