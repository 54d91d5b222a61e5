// How the blocks of all ranks wait for each other: with a deadline in every wait, so that a rank that is gone or does
// something else ends the call with an error and never hangs the GPU.
#pragma once

#include "../portability/atomics.cuh"
#include "../portability/device.h"
#include "header.h"
#include "view.h"

namespace extend_attn {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr unsigned kLooksBetweenChecks = 64;  // the clock and the flag of other threads are looked at this often

// How long a thread goes on looking for something: until the timeout after its first check, or another thread's
// failure.
class Patience {
 public:
  __device__ explicit Patience(const CommView& c) : c_(c) {}
  // Asked after each look in vain.
  __device__ __forceinline__ bool over() {
    if (++looks_ % kLooksBetweenChecks != 0) return false;
    const unsigned long long now = global_ns();
    if (deadline_ == 0) deadline_ = now + c_.timeout_ns;
    timed_out_ = now > deadline_;
    return timed_out_ || load_relaxed_sys(reinterpret_cast<const uint2*>(state_of(c_))).y != 0;
  }
  __device__ __forceinline__ bool timed_out() const { return timed_out_; }

 private:
  const CommView& c_;
  unsigned looks_ = 0;
  bool timed_out_ = false;
  unsigned long long deadline_ = 0;
};

__device__ __forceinline__ std::uint32_t mix(std::uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Tests only: a pseudo-random stall of this block. Not inlined, since its code alone costs a small call 0.07 us.
static __device__ __noinline__ void stall_at_random(const CommView& c, std::uint32_t epoch, std::uint32_t where) {
  const auto until = global_ns() + mix(mix(epoch * 8 + c.rank) + blockIdx.x * 4 + where) % c.jitter_ns;
  while (global_ns() < until) {
  }
}
__device__ __forceinline__ void stall(const CommView& c, std::uint32_t epoch, std::uint32_t where) {
  if (c.jitter_ns > 0) stall_at_random(c, epoch, where);
}

// What a thread knows of the call it is in.
struct Call {
  std::uint32_t epoch;
  std::uint64_t header;
  bool failed;    // an earlier call has: leave at once
  bool reporter;  // a wait of this thread was the first to fail
};

// Comes after wait_for_previous_grid().
__device__ __forceinline__ Call begin_call(const CommView& c, std::uint64_t call_word) {
  // Epoch and flag in one read, past L1: the flag may be set by another block of this very call.
  const uint2 state = load_relaxed_sys(reinterpret_cast<const uint2*>(state_of(c)));
  const Call call{state.x, with_epoch(call_word, state.x), state.y != 0, false};
  stall(c, call.epoch, 0);
  return call;
}

// For all threads of a block, once: the last block that has read the epoch advances it for the next call. Nothing waits
// for that, and relaxed is enough: what a later store writes can't be what an earlier load has returned.
__device__ __forceinline__ void advance_epoch(const CommView& c, Call& call) {
  call.failed = __syncthreads_or(call.failed);
  if (threadIdx.x != blockDim.x - 1) return;
  State* state = state_of(c);
  if (gridDim.x > 1 && add_relaxed_gpu(&state->arrived, 1) != gridDim.x - 1) return;
  state->arrived = 0;
  state->epoch = call.epoch + 1;
}

// The first failure of a rank is the one that is reported: true if it was this one.
static __device__ __noinline__ bool report(const CommView& c, std::uint32_t epoch, std::uint64_t mine, Failure why,
                                           int peer, std::uint64_t theirs) {
  if (atomicCAS(&state_of(c)->failed, 0u, 1u) != 0u) return false;
  ErrorRecord* record = c.record;
  record->peer = static_cast<std::uint32_t>(peer);
  record->epoch = epoch;
  record->block = blockIdx.x;
  record->mine = mine;
  record->theirs = theirs;
  store_release_sys(&record->code, static_cast<std::uint32_t>(why));
  return true;
}
__device__ __forceinline__ void fail(const CommView& c, Call& call, Failure why, int peer, std::uint64_t theirs) {
  call.reporter = report(c, call.epoch, call.header, why, peer, theirs) || call.reporter;
}

// Tells `peer` what this rank is doing. One block sends, before its first data. It follows what the calls before this
// one did, reading slots and clearing them: a peer that has seen it may write those slots.
__device__ __forceinline__ void send_header(const CommView& c, const Call& call, int peer) {
  store_relaxed_sys(header_at(c, peer, call.epoch, c.rank), call.header);
}

// The headers of a call as a warp sees them, lane r that of rank r. All are seen before a warp writes output.
class Headers {
 public:
  __device__ __forceinline__ Headers(const CommView& c, const Call& call)
      : slot_(header_at(c, c.rank, call.epoch, threadIdx.x % kWarp)),
        mine_(call.header),
        agreed_(threadIdx.x % kWarp >= c.world || threadIdx.x % kWarp == c.rank) {}
  __device__ __forceinline__ void look() {
    if (!agreed_) agreed_ = (theirs_ = load_relaxed_sys(slot_)) == mine_;
  }
  __device__ __forceinline__ bool agreed() const { return agreed_; }
  __device__ __forceinline__ bool differs(const Call& call) const {
    return !agreed_ && is_of_epoch(theirs_, call.epoch);
  }
  __device__ __forceinline__ std::uint64_t theirs() const { return theirs_; }

 private:
  const std::uint64_t* slot_;
  std::uint64_t mine_;
  std::uint64_t theirs_ = 0;
  bool agreed_;
};

// For a warp, after a look in vain: whether it gives up, the reason reported. `absent`: a rank of whom this lane misses
// data, or -1.
__device__ __forceinline__ bool gives_up(const CommView& c, Call& call, Patience& patience, const Headers& headers,
                                         int absent) {
  const bool over = patience.over(), differs = headers.differs(call);
  if (!__any_sync(kFullWarp, over || differs)) return false;
  if (differs) fail(c, call, Failure::kDisagreement, threadIdx.x % kWarp, headers.theirs());
  const bool timed_out = __any_sync(kFullWarp, patience.timed_out());
  if (!headers.agreed()) absent = threadIdx.x % kWarp;
  if (timed_out && absent >= 0) fail(c, call, Failure::kTimeout, absent, 0);
  return true;
}

// All blocks of number blockIdx.x, one a rank, meet: what their threads have read is done for all threads after, and,
// for those who come with `wrote`, what they wrote in this call. The first warp signals, the second one exchanges
// headers in the first phase. False for the whole block if a wait failed. A signal is the call's number from 1 on, so
// that a new workspace holds none.
__device__ __forceinline__ bool meet(const CommView& c, Call& call, int phase, bool wrote, bool good) {
  __syncthreads();  // joins the threads' accesses to the signal below
  const int warp = threadIdx.x / kWarp, peer = threadIdx.x % kWarp;
  if (good && warp == 0 && peer < c.world) {
    std::uint32_t* theirs = signal_at(c, peer, phase, blockIdx.x, c.rank);
    if (wrote) {
      store_release_sys(theirs, call.epoch + 1);
    } else {
      store_relaxed_sys(theirs, call.epoch + 1);
    }
    const std::uint32_t* own = signal_at(c, c.rank, phase, blockIdx.x, peer);
    Patience patience(c);
    while (good && static_cast<std::int32_t>(load_acquire_sys(own) - (call.epoch + 1)) < 0) good = !patience.over();
    if (patience.timed_out()) fail(c, call, Failure::kTimeout, peer, 0);
  } else if (good && warp == 1 && phase == 0) {
    if (blockIdx.x == 0 && peer < c.world) send_header(c, call, peer);
    Headers headers(c, call);
    Patience patience(c);
    for (headers.look(); good && !__all_sync(kFullWarp, headers.agreed()); headers.look())
      good = !gives_up(c, call, patience, headers, -1);
  }
  return __syncthreads_and(good);
}

constexpr int kLooksUntilOthersAreDone = 4096;  // each takes longer than a store; together about a millisecond

// The end of a call. After a failure all of the output becomes NaN: `fill(first, step)` writes each `step`th vector.
// Blocks of a call that fails leave without a word, others may still be writing what they summed, so whoever reported
// the failure lets them finish and then fills all.
template <typename Fill>
__device__ __forceinline__ void end_call(const CommView& c, const Call& call, Fill fill) {
  stall(c, call.epoch, 1);
  if (call.failed) {
    fill(blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
  } else if (__any_sync(kFullWarp, call.reporter)) {
    for (int n = 0; n < kLooksUntilOthersAreDone; ++n) load_relaxed_sys(reinterpret_cast<const uint2*>(state_of(c)));
    fill(threadIdx.x % kWarp, kWarp);
  }
}

}  // namespace extend_attn
