// What the CUDA templates ask of the machine: element types, vectors of bytes, shuffles, powers of two.
//
// No header of the toolkit is needed: conversions are shifts or one instruction each. SX_HOST names a header that
// stands for a GPU where the same text is compiled for a processor.
#pragma once

#if defined(SX_HOST)
#include SX_HOST
#else
#define SX_INLINE __device__ __forceinline__
#endif

namespace sx {

using i64 = long long;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2E = 1.4426950408889634f;

SX_INLINE float negative_infinity() { return __int_as_float(0xff800000); }

#if !defined(SX_HOST)
// 2^x to two units in the last place; 2^-inf is 0.
SX_INLINE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SX_INLINE float from_half(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
SX_INLINE unsigned pack_half(float low, float high) {
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
SX_INLINE unsigned pack_bfloat(float low, float high) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
#endif

// Storage of the 16-bit types; arithmetic is in fp32.
struct half { unsigned short bits; };
struct bfloat { unsigned short bits; };

// BYTES bytes of a row, fetched or written at once: 2, 4, 8 or 16.
template <int BYTES> struct Vector;
template <> struct Vector<2> { unsigned short word; };
template <> struct Vector<4> { unsigned word[1]; };
template <> struct Vector<8> { unsigned word[2]; };
template <> struct Vector<16> { unsigned word[4]; };

SX_INLINE void fetch(Vector<2>& to, const void* from) { to.word = __ldg((const unsigned short*)from); }
SX_INLINE void fetch(Vector<4>& to, const void* from) { to.word[0] = __ldg((const unsigned*)from); }
SX_INLINE void fetch(Vector<8>& to, const void* from) {
  const uint2 got = __ldg((const uint2*)from);
  to.word[0] = got.x, to.word[1] = got.y;
}
SX_INLINE void fetch(Vector<16>& to, const void* from) {
  const uint4 got = __ldg((const uint4*)from);
  to.word[0] = got.x, to.word[1] = got.y, to.word[2] = got.z, to.word[3] = got.w;
}
SX_INLINE void clear(Vector<2>& to) { to.word = 0; }
template <int BYTES> SX_INLINE void clear(Vector<BYTES>& to) {
#pragma unroll
  for (int i = 0; i < BYTES / 4; ++i) to.word[i] = 0;
}

// Moves BYTES bytes, aligned to as many.
template <int BYTES> SX_INLINE void move(void* to, const void* from) {
  if constexpr (BYTES == 16)
    *(uint4*)to = *(const uint4*)from;
  else if constexpr (BYTES == 8)
    *(uint2*)to = *(const uint2*)from;
  else if constexpr (BYTES == 4)
    *(unsigned*)to = *(const unsigned*)from;
  else
    *(unsigned short*)to = *(const unsigned short*)from;
}

// The elements of a vector in fp32.
template <class T> struct Elements;
template <> struct Elements<float> {
  template <int BYTES> static SX_INLINE void read(const Vector<BYTES>& from, float* to) {
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) to[i] = __uint_as_float(from.word[i]);
  }
};
template <> struct Elements<bfloat> {
  static SX_INLINE void read(const Vector<2>& from, float* to) { to[0] = __uint_as_float((unsigned)from.word << 16); }
  template <int BYTES> static SX_INLINE void read(const Vector<BYTES>& from, float* to) {
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) {
      to[2 * i] = __uint_as_float(from.word[i] << 16);
      to[2 * i + 1] = __uint_as_float(from.word[i] & 0xffff0000u);
    }
  }
  static SX_INLINE unsigned pack(float low, float high) { return pack_bfloat(low, high); }
};
template <> struct Elements<half> {
  static SX_INLINE void read(const Vector<2>& from, float* to) { to[0] = from_half(from.word); }
  template <int BYTES> static SX_INLINE void read(const Vector<BYTES>& from, float* to) {
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) {
      to[2 * i] = from_half((unsigned short)(from.word[i] & 0xffffu));
      to[2 * i + 1] = from_half((unsigned short)(from.word[i] >> 16));
    }
  }
  static SX_INLINE unsigned pack(float low, float high) { return pack_half(low, high); }
};

// Writes N fp32 values as elements of T; `to` is aligned to all of them together, or to 16 bytes.
template <class T, int N> struct Writer {
  static SX_INLINE void write(T* to, const float* values) {
    if constexpr (N == 1) {
      *(unsigned short*)to = (unsigned short)Elements<T>::pack(values[0], 0.0f);
    } else if constexpr (N == 2) {
      *(unsigned*)to = Elements<T>::pack(values[0], values[1]);
    } else if constexpr (N == 4) {
      *(uint2*)to = make_uint2(Elements<T>::pack(values[0], values[1]), Elements<T>::pack(values[2], values[3]));
    } else {
      *(uint4*)to = make_uint4(Elements<T>::pack(values[0], values[1]), Elements<T>::pack(values[2], values[3]),
                               Elements<T>::pack(values[4], values[5]), Elements<T>::pack(values[6], values[7]));
    }
  }
};
template <int N> struct Writer<float, N> {
  static SX_INLINE void write(float* to, const float* values) {
    if constexpr (N == 1) {
      *to = values[0];
    } else if constexpr (N == 2) {
      *(float2*)to = make_float2(values[0], values[1]);
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 4) *(float4*)(to + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
  }
};

// A tensor of rows: strides in elements; a row's elements are contiguous.
struct Tensor {
  void* data;
  i64 batch, head, row;
  template <class T> SX_INLINE T* at(i64 b, i64 h) const { return (T*)data + b * batch + h * head; }
};

}  // namespace sx
