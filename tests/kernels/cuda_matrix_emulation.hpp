// The warp-wide instructions of shared/matrix.cuh on this processor, written from the PTX ISA's tables alone.
//
// Fragments are gathered from all lanes into whole matrices, which are multiplied plainly. A copy overwrites its target
// with NaNs when it is started and fills it as late as it may, in the wait that must see it: what is read too early, or
// overwritten too early, does not go unseen. A load of eight rows that share a bank, or that leaves the block's memory,
// ends the process with a message.
#pragma once
#include <array>
#include <deque>

#define SX_SHARED_MEMORY(name) unsigned char* const name = emulated::shared_memory

namespace emulated {

struct AsyncCopy { void* to; const void* from; int bytes; bool is_live; };
struct Copies { std::vector<AsyncCopy> open; std::deque<std::vector<AsyncCopy>> ended; long block = -1; };
inline Copies copies[kMostThreads];

// This thread's copies; those that an earlier block left are forgotten with its memory.
inline Copies& my_copies() {
  Copies& mine = copies[block.current];
  if (mine.block != blocks_run) mine = Copies{{}, {}, blocks_run};
  return mine;
}

inline void require(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "block %u, thread %d: %s\n", block_index.x, block.current, what);
  abort();
}
inline void require_shared(const void* at, int bytes, int alignment) {
  const auto* byte = (const unsigned char*)at;
  require(byte >= shared_memory && byte + bytes <= shared_memory + shared_bytes, "an address outside the shared memory");
  require((uintptr_t)at % alignment == 0, "a shared address that is not aligned");
}

struct Operands { unsigned a[4], b[2]; float c[4]; };

// c += a b, of which this lane gets its four elements.
template <class Widen> void matrix_multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Widen widen) {
  Operands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  std::array<Operands, 32> all;
  gather(mine, all.data());
  const int lane = block.current % 32;
  for (int i = 0; i < 4; ++i) {
    // Accumulators: row groupID for c0, c1 and groupID + 8 for c2, c3; column threadID_in_group * 2 + (i & 1).
    const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + (i & 1);
    float sum = c[i];
    for (int k = 0; k < 16; ++k) {
      // A: of element i, row groupID where 0 <= i < 2 or 4 <= i < 6, else groupID + 8; column threadID_in_group * 2 +
      // (i & 1), and 8 more where i >= 4. Two elements a register, the lower first.
      const int a_element = (k % 8 & 1) + (row >= 8 ? 2 : 0) + (k >= 8 ? 4 : 0);
      const unsigned a_pair = all[row % 8 * 4 + k % 8 / 2].a[a_element / 2];
      // B: of element i, row threadID_in_group * 2 + (i & 1), and 8 more where i >= 2; column groupID.
      const int b_element = (k % 8 & 1) + (k >= 8 ? 2 : 0);
      const unsigned b_pair = all[column * 4 + k % 8 / 2].b[b_element / 2];
      sum += widen((unsigned short)(a_pair >> 16 * (a_element & 1))) * widen((unsigned short)(b_pair >> 16 * (b_element & 1)));
    }
    c[i] = sum;
  }
}

// Four 8 x 8 matrices of 16-bit elements: threads 8 i ... 8 i + 7 hold the row addresses of matrix i.
inline void load_matrices(unsigned (&to)[4], const void* row, bool is_transposed) {
  require_shared(row, 16, 16);
  std::array<const void*, 32> rows;
  gather(row, rows.data());
  const int lane = block.current % 32;
  for (int i = 0; i < 4; ++i) {
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r) banks |= 1u << (uintptr_t)rows[8 * i + r] / 16 % 8;
    require(banks == 0xff, "eight rows that share banks");
    unsigned short pair[2];
    for (int e = 0; e < 2; ++e) {
      // Each thread gets of row lane / 4 the elements lane % 4 * 2 and the next; transposed, of column lane / 4.
      const int across = lane % 4 * 2 + e, along = lane / 4;
      const auto* elements = (const unsigned short*)rows[8 * i + (is_transposed ? across : along)];
      pair[e] = elements[is_transposed ? along : across];
    }
    to[i] = pair[0] | (unsigned)pair[1] << 16;
  }
}

}  // namespace emulated

namespace sx {

inline void multiply_add(half, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulated::matrix_multiply_add(c, a, b0, b1, [](unsigned short bits) { return from_half(bits); });
}
inline void multiply_add(bfloat, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulated::matrix_multiply_add(c, a, b0, b1, [](unsigned short bits) { return __uint_as_float((unsigned)bits << 16); });
}
inline void load_matrices(unsigned (&to)[4], const void* row) { emulated::load_matrices(to, row, false); }
inline void load_transposed(unsigned (&to)[4], const void* row) { emulated::load_matrices(to, row, true); }

template <int BYTES> void copy_async(void* to, const void* from, bool is_live) {
  emulated::require_shared(to, BYTES, BYTES);
  emulated::require(!is_live || (uintptr_t)from % BYTES == 0, "a copy from an address that is not aligned");
  if (BYTES == 2) {
    *(unsigned short*)to = is_live ? *(const unsigned short*)from : 0;
    return;
  }
  static_assert(BYTES == 2 || BYTES == 4 || BYTES == 8 || BYTES == 16, "a copy has 4, 8 or 16 bytes");
  memset(to, 0xff, BYTES);
  emulated::my_copies().open.push_back({to, from, BYTES, is_live});
}
inline void end_copies() {
  auto& mine = emulated::my_copies();
  mine.ended.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int N> void wait_copies() {
  auto& mine = emulated::my_copies();
  for (; mine.ended.size() > N; mine.ended.pop_front())
    for (const auto& each : mine.ended.front()) {
      if (each.is_live)
        memcpy(each.to, each.from, each.bytes);
      else
        memset(each.to, 0, each.bytes);
    }
}

}  // namespace sx
