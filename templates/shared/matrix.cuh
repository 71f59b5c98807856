// Matrix units, the loads that feed them, and copies into shared memory that run beside arithmetic: one instruction each.
//
// A warp computes c += a b with a [16, 16], b [16, 8] and c [16, 8]; lane 4 g + t holds
//   of a: rows g, g + 8, g, g + 8 at columns 2 t, 2 t + 1 (the first two) and 2 t + 8, 2 t + 9, two elements a register;
//   of b: rows 2 t, 2 t + 1, then 2 t + 8, 2 t + 9, at column g;
//   of c: row g at columns 2 t, 2 t + 1, then row g + 8.
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", "ldmatrix", "cp.async".
#pragma once
#include "shared/device.cuh"

#if defined(SX_HOST)
#include SX_HOST_MATRIX
#else

// What the launch asks for of shared memory.
#define SX_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

namespace sx {

SX_INLINE unsigned shared_address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }

SX_INLINE void multiply_add(half, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
SX_INLINE void multiply_add(bfloat, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 x 8 elements of 16 bits in shared memory. Lane 8 i + r says where row r of matrix i is; lane
// 4 g + t gets of each its row g at columns 2 t, 2 t + 1.
SX_INLINE void load_matrices(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}
// The same, but lane 4 g + t gets rows 2 t, 2 t + 1 at column g.
SX_INLINE void load_transposed(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

// Copies BYTES bytes to shared memory, zeros where not `is_live`; they are there after `wait_copies` and a barrier.
template <int BYTES> SX_INLINE void copy_async(void* to, const void* from, bool is_live) {
  const unsigned address = shared_address(to);
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(is_live ? 16 : 0) : "memory");
  } else if constexpr (BYTES == 2) {
    // No copy is so narrow.
    *(unsigned short*)to = is_live ? __ldg((const unsigned short*)from) : (unsigned short)0;
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES), "r"(is_live ? BYTES : 0)
                 : "memory");
  }
}
// Ends a group of copies of this thread.
SX_INLINE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread but the last N.
template <int N> SX_INLINE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

}  // namespace sx
#endif
