// One-shot push: each rank writes its input into a slot at every peer, then sums the slots that the peers wrote into
// its own.
//
// The data is its own flag: an empty slot is all zero words, and a zero word of data is sent as -0. A reader waits
// until each word is not zero, so data needs no order. Sums start at +0, so the sign of a sent zero never shows. The
// reader clears what it read; the slot is written again two calls later, which every writer reaches only after it had
// this rank's header of the call between.
//
// A call takes as long as its longest chain: read epoch and input, store to a peer, see a peer's data, store the sum.
// Nothing else is in it: the epoch is advanced and headers travel meanwhile, and the next call's blocks start early.
#pragma once

#include "../comm/signal.cuh"
#include "../portability/vec.cuh"
#include "params.h"

namespace extend_attn {

constexpr std::uint32_t kNegativeZeroF32 = 0x80000000u;
constexpr std::uint32_t kNegativeZero16x2 = 0x80008000u;

__device__ __forceinline__ bool is_full(const uint4& v) { return v.x != 0 && v.y != 0 && v.z != 0 && v.w != 0; }
__device__ __forceinline__ bool is_full(const uint2& v) { return v.x != 0 && v.y != 0; }

template <typename T>
__device__ __forceinline__ std::uint32_t without_empty(std::uint32_t word) {
  return word != 0 ? word : sizeof(T) == 4 ? kNegativeZeroF32 : kNegativeZero16x2;
}
template <typename T>
__device__ __forceinline__ uint4 without_empty(const uint4& v) {
  return make_uint4(without_empty<T>(v.x), without_empty<T>(v.y), without_empty<T>(v.z), without_empty<T>(v.w));
}

// What a thread holds of the peers: an array by rank, or between two ranks the one that is not this.
template <int kWorld>
struct Peers {
  static constexpr int kSlots = kWorld == 2 ? 1 : kMaxRanks;
  static __device__ __forceinline__ int rank(const CommView& c, int slot) { return kWorld == 2 ? 1 - c.rank : slot; }
  static __device__ __forceinline__ std::uint32_t mask(const CommView& c) {
    return kWorld == 2 ? 1 : ((1u << c.world) - 1) & ~(1u << c.rank);
  }
};

// The sum of one vector of each rank, in rank order.
template <typename T, int kWorld>
__device__ __forceinline__ uint4 sum_in_order(const CommView& c, const uint4& mine,
                                              const uint4 (&of_peer)[Peers<kWorld>::kSlots]) {
  float sum[kPerVector<T>] = {};
#pragma unroll
  for (int r = 0; r < (kWorld == 2 ? 2 : kMaxRanks); ++r) {
    if (kWorld == 2 || r < c.world) accumulate<T>(r == c.rank ? mine : of_peer[kWorld == 2 ? 0 : r], sum);
  }
  return pack<T>(sum);
}

// kWorld: 2, or 0 for any number of ranks.
template <typename T, int kWorld>
__global__ void __launch_bounds__(kMaxPushThreads) one_shot_push(const __grid_constant__ AllReduceParams p) {
  using P = Peers<kWorld>;
  const CommView& c = p.comm;
  const int world = kWorld == 2 ? 2 : c.world;
  const int lane = threadIdx.x % kWarp;
  const auto vectors = static_cast<std::uint32_t>((p.count + kPerVector<T> - 1) / kPerVector<T>);
  const std::uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t step = gridDim.x * blockDim.x;
  wait_for_previous_grid();
  let_next_grid_start();
  Call call = begin_call(c, p.call);
  uint4 own = make_uint4(0, 0, 0, 0);  // a thread's first vector: on its way while the epoch is
  if (first < vectors) own = load_vector<T>(p.input, p.count, first);

  if (!call.failed) {
    if (blockIdx.x == 0 && threadIdx.x < world && threadIdx.x != c.rank) send_header(c, call, threadIdx.x);
#pragma unroll 1
    for (std::uint32_t i = first; i < vectors; i += step) {
      const uint4 mine = without_empty<T>(i == first ? own : load_vector<T>(p.input, p.count, i));
#pragma unroll
      for (int hop = 1; hop < (kWorld == 2 ? 2 : kMaxRanks); ++hop) {  // from the next rank on: not all write to one
        if (hop >= world) continue;
        const int peer = c.rank + hop < world ? c.rank + hop : c.rank + hop - world;
        store_relaxed_sys(reinterpret_cast<uint4*>(push_slot(c, peer, call.epoch, c.rank)) + i, mine);
      }
    }
  }
  advance_epoch(c, call);

  const auto slot = [&](int q) { return reinterpret_cast<uint4*>(push_slot(c, c.rank, call.epoch, P::rank(c, q))); };
  Headers headers(c, call);
  Patience patience(c);
  bool good = !call.failed;
#pragma unroll 1
  for (std::uint32_t i = first; good && i - lane < vectors; i += step) {
    uint4 v[P::kSlots];
    std::uint32_t missing = i < vectors ? P::mask(c) : 0;  // a bit for each slot
    while (true) {
#pragma unroll
      for (int q = 0; q < P::kSlots; ++q) {  // all loads first: they are in flight together
        if (missing >> q & 1) v[q] = load_relaxed_sys(slot(q) + i);
      }
      headers.look();
#pragma unroll
      for (int q = 0; q < P::kSlots; ++q) {
        if ((missing >> q & 1) && is_full(v[q])) missing &= ~(1u << q);
      }
      if (__all_sync(kFullWarp, missing == 0 && headers.agreed())) break;
      good = !gives_up(c, call, patience, headers, missing != 0 ? P::rank(c, __ffs(missing) - 1) : -1);
      if (!good) break;
    }
    if (!good || i >= vectors) continue;
    const uint4 mine = i == first ? own : load_vector<T>(p.input, p.count, i);
    store_vector<T>(p.output, p.count, i, sum_in_order<T, kWorld>(c, mine, v));
#pragma unroll
    for (int q = 0; q < P::kSlots; ++q) {
      if (P::mask(c) >> q & 1) store_relaxed_sys(slot(q) + i, make_uint4(0, 0, 0, 0));
    }
  }
  end_call(c, call, [&](std::uint32_t from, std::uint32_t by) {
    for (std::uint32_t i = from; i < vectors; i += by) store_vector<T>(p.output, p.count, i, nan_vector());
  });
}

}  // namespace extend_attn
