// Memory operations with a stated order, between the threads of all GPUs of a host (`sys`) or of one GPU (`gpu`).
//
// Three patterns, and nothing else, order what ranks write for each other:
// - release / acquire on a word: what a thread wrote or had observed before a release is visible to whoever acquires
//   the word it wrote. Threads of one block join in through a block barrier before the release and one after the
//   acquire. A release to the system waits about 1.5 us on an H100 with peers (2995 cycles, with nothing outstanding),
//   so it is used only where a grid hands over what that same grid has written.
// - relaxed on words that are their own flag: the reader looks at nothing but the word itself, so no order is needed; a
//   vector is that many words, each checked, since only words are promised to arrive whole.
// - relaxed after an earlier grid: what the grids before this one wrote was performed when they ended
//   (wait_for_previous_grid()), in the L2 of the memory's own GPU, where accesses of its peers arrive as well. Whatever
//   this grid sends therefore follows it. The same holds for reads whose values have been used.
#pragma once

#include <cstdint>

namespace extend_attn {

__device__ __forceinline__ void store_release_sys(std::uint32_t* address, std::uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ std::uint32_t load_acquire_sys(const std::uint32_t* address) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed_sys(std::uint32_t* address, std::uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed_sys(std::uint64_t* address, std::uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ std::uint64_t load_relaxed_sys(const std::uint64_t* address) {
  std::uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed_sys(uint4* address, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void store_relaxed_sys(uint2* address, uint2 v) {
  asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ uint4 load_relaxed_sys(const uint4* address) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ uint2 load_relaxed_sys(const uint2* address) {
  uint2 v;
  asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address) : "memory");
  return v;
}

// The old value.
__device__ __forceinline__ std::uint32_t add_relaxed_gpu(std::uint32_t* address, std::uint32_t value) {
  std::uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
  return old;
}

}  // namespace extend_attn
