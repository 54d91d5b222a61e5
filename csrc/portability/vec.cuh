// Sixteen bytes of fp16, bf16 or fp32 elements: load, store, sum in fp32. The last vector of an array may be partial.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "selection.h"

namespace extend_attn {

template <typename T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<__half> = DType::kFloat16;
template <>
constexpr DType kDType<__nv_bfloat16> = DType::kBFloat16;

// Two elements of a word, or one for fp32.
__device__ __forceinline__ float2 word_to_floats(std::uint32_t word, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ __forceinline__ float2 word_to_floats(std::uint32_t word, __nv_bfloat16) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
__device__ __forceinline__ std::uint32_t floats_to_word(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ __forceinline__ std::uint32_t floats_to_word(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

template <typename T>
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[kPerVector<T>]) {
  const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      x[w] = __uint_as_float(words[w]);
    } else {
      const float2 pair = word_to_floats(words[w], T());
      x[2 * w] = pair.x;
      x[2 * w + 1] = pair.y;
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&x)[kPerVector<T>]) {
  std::uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      words[w] = __float_as_uint(x[w]);
    } else {
      words[w] = floats_to_word(x[2 * w], x[2 * w + 1], T());
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename T>
__device__ __forceinline__ void accumulate(const uint4& v, float (&sum)[kPerVector<T>]) {
  float x[kPerVector<T>];
  unpack<T>(v, x);
#pragma unroll
  for (int e = 0; e < kPerVector<T>; ++e) sum[e] += x[e];
}

// Bits of one element; the tail is moved as bits, since a pass through float would quieten a NaN.
template <typename T>
struct Bits {
  using type = std::uint16_t;
};
template <>
struct Bits<float> {
  using type = std::uint32_t;
};

// Vector `i` of an array of `count` elements; what lies past the end is neither read nor written, and reads as +0. The
// tail's loops are not unrolled: they are in every kernel several times, and a short kernel pays for its code.
template <typename T>
__device__ __forceinline__ uint4 load_vector(const void* array, std::int64_t count, std::uint32_t i) {
  using B = typename Bits<T>::type;
  const std::int64_t first = std::int64_t(i) * kPerVector<T>;
  if (first + kPerVector<T> <= count) return static_cast<const uint4*>(array)[i];
  std::uint64_t low = 0, high = 0;
#pragma unroll 1
  for (int e = static_cast<int>(count - first) - 1; e >= 0; --e) {
    constexpr int kBits = 8 * sizeof(T);
    high = high << kBits | low >> (64 - kBits);
    low = low << kBits | static_cast<const B*>(array)[first + e];
  }
  return make_uint4(std::uint32_t(low), std::uint32_t(low >> 32), std::uint32_t(high), std::uint32_t(high >> 32));
}

template <typename T>
__device__ __forceinline__ void store_vector(void* array, std::int64_t count, std::uint32_t i, const uint4& v) {
  using B = typename Bits<T>::type;
  const std::int64_t first = std::int64_t(i) * kPerVector<T>;
  if (first + kPerVector<T> <= count) {
    static_cast<uint4*>(array)[i] = v;
    return;
  }
  std::uint64_t low = v.x | std::uint64_t(v.y) << 32, high = v.z | std::uint64_t(v.w) << 32;
#pragma unroll 1
  for (std::int64_t at = first; at < count; ++at) {
    constexpr int kBits = 8 * sizeof(T);
    static_cast<B*>(array)[at] = static_cast<B>(low);
    low = low >> kBits | high << (64 - kBits);
    high >>= kBits;
  }
}

// All ones: a NaN in each of the three types.
__device__ __forceinline__ uint4 nan_vector() { return make_uint4(~0u, ~0u, ~0u, ~0u); }

}  // namespace extend_attn
