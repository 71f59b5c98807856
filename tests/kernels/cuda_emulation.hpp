// A GPU of one multiprocessor, slow and exact in what it allows: CUDA C++ compiled for this processor.
//
// Every thread of a block is a fiber of its own. One runs until it waits for its warp or its block; threads that wait
// for others which never come (a shuffle or a barrier in a branch that not all take) end the process with a message.
// Blocks run one after the other.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define SX_INLINE inline __attribute__((always_inline))
#define __global__
#define __forceinline__ inline
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct Index { unsigned x, y, z; };

namespace emulated {

constexpr int kMostThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;

struct Barrier { int arrived = 0; long generation = 0; };
struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool has_started = false, is_done = true;
  std::vector<char> stack;
};
struct Block {
  Fiber fibers[kMostThreads];
  Barrier warps[kMostThreads / 32], all;
  char mail[kMostThreads][2][64];
  int n_threads = 0, current = 0;
  long progress = 0;
  jmp_buf scheduler;
  std::function<void()> body;
};
inline Block block;
// Of the block that runs: as much as the launch asked for, full of NaNs when the block starts.
alignas(128) inline unsigned char shared_memory[256 << 10];
inline int shared_bytes = 0;
inline long blocks_run = 0;
inline Index thread_index, block_index, block_size, grid_size;

inline void yield() {
  if (!_setjmp(block.fibers[block.current].resume)) _longjmp(block.scheduler, 1);
}
inline void wait(Barrier& barrier, int n) {
  const long generation = barrier.generation;
  ++block.progress;
  if (++barrier.arrived == n) {
    barrier.arrived = 0, ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}
inline void enter() {
  block.body();
  block.fibers[block.current].is_done = true;
  ++block.progress;
  _longjmp(block.scheduler, 1);
}
// Runs one thread until it waits.
inline void run_thread(int thread) {
  Fiber& fiber = block.fibers[thread];
  if (fiber.is_done) return;
  block.current = thread;
  thread_index = {(unsigned)thread, 0, 0};
  if (_setjmp(block.scheduler)) return;
  if (fiber.has_started) _longjmp(fiber.resume, 1);
  fiber.has_started = true;
  setcontext(&fiber.start);
}
inline void run_block() {
  const int n_warps = block.n_threads / 32;
  for (bool is_done = false; !is_done;) {
    const long before = block.progress;
    for (int nth = 0; nth < n_warps; ++nth) {
      // One warp runs as far ahead of the others as barriers let it: the first, or in every other block the last.
      const int warp = block_index.x % 2 ? n_warps - 1 - nth : nth;
      for (long progress = block.progress - 1; progress != block.progress;) {
        progress = block.progress;
        for (int lane = 0; lane < 32; ++lane) run_thread(warp * 32 + lane);
      }
    }
    int remaining = 0;
    for (int thread = 0; thread < block.n_threads; ++thread) remaining += !block.fibers[thread].is_done;
    is_done = remaining == 0;
    if (!is_done && block.progress == before) {
      fprintf(stderr, "block %u: %d threads wait for others that never come\n", block_index.x, remaining);
      abort();
    }
  }
}
inline void launch(unsigned n_blocks, unsigned n_threads, unsigned n_bytes, const std::function<void()>& body) {
  block.n_threads = (int)n_threads, block.body = body, shared_bytes = (int)n_bytes;
  block_size = {n_threads, 1, 1}, grid_size = {n_blocks, 1, 1};
  for (unsigned index = 0; index < n_blocks; ++index) {
    block_index = {index, 0, 0};
    memset(shared_memory, 0xff, sizeof(shared_memory));
    ++blocks_run;
    for (unsigned i = 0; i < n_threads; ++i) {
      Fiber& fiber = block.fibers[i];
      fiber.stack.resize(kStackBytes);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.data(), fiber.start.uc_stack.ss_size = kStackBytes;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, enter, 0);
      fiber.has_started = fiber.is_done = false;
    }
    run_block();
  }
}

// Every lane of the warp gives a value; those of the 32 that `wanted` asks for are copied to `all`.
template <class T> void gather(const T& value, T* all, unsigned wanted = 0xffffffffu) {
  static_assert(sizeof(T) <= sizeof(block.mail[0][0]), "there is no room for more");
  const int thread = block.current, warp = thread / 32;
  const int side = (int)(block.warps[warp].generation & 1);
  memcpy(block.mail[thread][side], &value, sizeof(T));
  wait(block.warps[warp], 32);
  for (int lane = 0; lane < 32; ++lane)
    if (wanted >> lane & 1) memcpy((void*)all++, block.mail[warp * 32 + lane][side], sizeof(T));
}

// What lane `from` of the warp has given; every lane of the warp gives one.
template <class T> T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= 8, "a shuffle moves one register, or two");
  gather(value, &value, 1u << from);
  return value;
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) abort();
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  check_mask(mask);
  return emulated::exchange(value, (unsigned)emulated::block.current % 32 ^ (unsigned)lanes);
}
template <class T> T __shfl_sync(unsigned mask, T value, int lane) {
  check_mask(mask);
  return emulated::exchange(value, (unsigned)lane % 32);
}
inline int __any_sync(unsigned mask, int holds) {
  check_mask(mask);
  int all[32], any = 0;
  emulated::gather(holds, all);
  for (int each : all) any |= each != 0;
  return any;
}
inline void __syncwarp() { emulated::exchange(0, 0); }
inline void __syncthreads() { emulated::wait(emulated::block.all, emulated::block.n_threads); }

template <class T> T __ldg(const T* from) {
  if ((uintptr_t)from % sizeof(T)) {
    fprintf(stderr, "a load of %zu bytes from %p\n", sizeof(T), (const void*)from);
    abort();
  }
  T value;
  memcpy((void*)&value, (const void*)from, sizeof(T));
  return value;
}
// Threads take turns where they wait, and never here.
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long more) {
  const unsigned long long before = *at;
  *at += more;
  return before;
}
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float __int_as_float(int bits) { return __uint_as_float((unsigned)bits); }
inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace sx {
inline float power_of_two(float x) { return std::exp2(x); }
inline float from_half(unsigned short bits) {
  _Float16 x;
  memcpy(&x, &bits, 2);
  return (float)x;
}
inline unsigned pack_half(float low, float high) {
  const _Float16 both[2] = {(_Float16)low, (_Float16)high};
  unsigned bits;
  memcpy(&bits, both, 4);
  return bits;
}
inline unsigned round_bfloat(float x) {
  const unsigned bits = __float_as_uint(x);
  if (std::isnan(x)) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned pack_bfloat(float low, float high) { return round_bfloat(high) << 16 | round_bfloat(low); }
}  // namespace sx
