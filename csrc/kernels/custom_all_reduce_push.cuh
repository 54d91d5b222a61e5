// One-shot push: each rank writes its input into a slot at every peer, then sums the slots that the peers wrote into
// its own.
//
// The data is its own flag: an empty slot is all zero words, and a zero word of data is sent as -0. A reader waits
// until each word is not zero, so data needs no order. Sums start at +0, so the sign of a sent zero never shows. The
// reader clears what it read; the slot is written again two calls later, which every writer reaches only after it had
// this rank's header of the call between.
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

// Where the clerk leaves what it learnt from the headers; data warps wait for it before they write output.
enum Verdict : int { kUnknown = 0, kAgreed = 1, kFailed = 2 };

// A block's shared word; the largest verdict stands.
class VerdictBox {
 public:
  __device__ explicit VerdictBox(int* word) : word_(word) {}
  __device__ void open(bool failed) const { *word_ = failed ? kFailed : kUnknown; }
  __device__ void put(Verdict v) const { atomicMax(word_, v); }
  __device__ bool failed() const { return *static_cast<volatile int*>(word_) == kFailed; }
  __device__ bool agreed() const {
    int v;
    while ((v = *static_cast<volatile int*>(word_)) == kUnknown) {
    }
    return v == kAgreed;
  }

 private:
  int* word_;
};

// The clerk's second half: all headers of this epoch, one lane a peer.
__device__ __forceinline__ void judge(const CommView& c, const Call& call, VerdictBox verdict, int lane) {
  bool good = true;
  if (lane < c.world) good = receive_header(c, call, lane, [&] { return verdict.failed(); });
  good = __all_sync(0xffffffffu, good);
  if (lane == 0) verdict.put(good ? kAgreed : kFailed);
}

// Spins on a slot word by word; reports the peer if it stays empty.
template <typename Vector>
__device__ __forceinline__ bool receive(const CommView& c, const Call& call, VerdictBox verdict, int peer,
                                        const Vector* slot, Vector& v) {
  v = load_relaxed_sys(slot);
  if (is_full(v)) return true;
  const bool came =
      wait_until(call.deadline, [&] { return is_full(v = load_relaxed_sys(slot)); }, [&] { return verdict.failed(); });
  if (came) return true;
  if (!verdict.failed()) fail(c, call, Failure::kTimeout, peer, 0);
  verdict.put(kFailed);
  return false;
}

template <typename T>
__global__ void __launch_bounds__(kPushThreads + kWarp) one_shot_push(const __grid_constant__ AllReduceParams p) {
  const CommView& c = p.comm;
  const int thread = threadIdx.x - kWarp;  // of the data threads; negative: the clerk
  const std::int64_t vectors = (p.count + kPerVector<T> - 1) / kPerVector<T>;
  const std::int64_t first = std::int64_t(blockIdx.x) * kPushThreads + thread;
  const std::int64_t step = std::int64_t(gridDim.x) * kPushThreads;
  __shared__ int verdict_word;
  const VerdictBox verdict(&verdict_word);
  wait_for_previous_grid();
  // A thread's first vector, all it has of a small message, is on its way while the epoch is read.
  uint4 own_first = make_uint4(0, 0, 0, 0);
  if (thread >= 0 && first < vectors) own_first = load_vector<T>(p.input, p.count, first);
  const Call call = begin_call(c, p.call);

  if (thread < 0) {
    if (threadIdx.x == 0) verdict.open(call.failed);
    if (!call.failed && blockIdx.x == 0 && threadIdx.x < c.world) send_header(c, call, threadIdx.x);
  } else if (!call.failed) {
    for (std::int64_t i = first; i < vectors; i += step) {
      const uint4 mine = without_empty<T>(i == first ? own_first : load_vector<T>(p.input, p.count, i));
#pragma unroll
      for (int hop = 1; hop < kMaxRanks; ++hop) {  // start at the next rank, so that ranks do not all write to one
        const int peer = c.rank + hop < c.world ? c.rank + hop : c.rank + hop - c.world;
        if (hop < c.world)
          store_relaxed_sys(reinterpret_cast<uint4*>(push_slot(c, peer, call.epoch, c.rank)) + i, mine);
      }
    }
  }
  __syncthreads();
  if (thread < 0) {
    if (!call.failed) judge(c, call, verdict, threadIdx.x);
  } else if (!call.failed) {
    for (std::int64_t i = first; i < vectors; i += step) {
      uint4 v[kMaxRanks];
      bool good = true;
#pragma unroll
      for (int r = 0; r < kMaxRanks; ++r) {  // all loads first: they are in flight together
        if (r >= c.world) continue;
        if (r != c.rank) {
          v[r] = load_relaxed_sys(reinterpret_cast<const uint4*>(push_slot(c, c.rank, call.epoch, r)) + i);
        } else {
          v[r] = i == first ? own_first : load_vector<T>(p.input, p.count, i);
        }
      }
#pragma unroll
      for (int r = 0; r < kMaxRanks; ++r) {
        if (r >= c.world || r == c.rank) continue;
        const uint4* slot = reinterpret_cast<const uint4*>(push_slot(c, c.rank, call.epoch, r)) + i;
        if (good && !is_full(v[r])) good = receive(c, call, verdict, r, slot, v[r]);
      }
      if (!good || !verdict.agreed()) break;
      float sum[kPerVector<T>] = {};
#pragma unroll
      for (int r = 0; r < kMaxRanks; ++r) {
        if (r >= c.world) continue;
        accumulate<T>(v[r], sum);
        if (r != c.rank) reinterpret_cast<uint4*>(push_slot(c, c.rank, call.epoch, r))[i] = make_uint4(0, 0, 0, 0);
      }
      store_vector<T>(p.output, p.count, i, pack<T>(sum));
    }
  }
  finish_call(c, call, [&] {
    for (std::int64_t i = threadIdx.x; i < vectors; i += blockDim.x)
      store_vector<T>(p.output, p.count, i, nan_vector());
  });
}

}  // namespace extend_attn
