// How the blocks of all ranks wait for each other: with a deadline in every wait, so that a rank that is gone or does
// something else ends the call with an error and never hangs the GPU.
#pragma once

#include "../portability/atomics.cuh"
#include "../portability/device.h"
#include "header.h"
#include "view.h"

namespace extend_attn {

constexpr int kSpinsBetweenChecks = 64;  // the clock and the flag of other threads are looked at this often

// Spins until `ready()`; false if `give_up()` or the deadline came first.
template <typename Ready, typename GiveUp>
__device__ __forceinline__ bool wait_until(unsigned long long deadline, Ready ready, GiveUp give_up) {
  for (unsigned spins = 1; !ready(); ++spins) {
    if (spins % kSpinsBetweenChecks == 0 && (give_up() || global_ns() > deadline)) return false;
  }
  return true;
}

__device__ __forceinline__ std::uint32_t mix(std::uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Tests only (jitter_ns > 0): a pseudo-random stall of this block.
__device__ __forceinline__ void stall(const CommView& c, std::uint32_t epoch, std::uint32_t where) {
  if (c.jitter_ns == 0) return;
  const auto until = global_ns() + mix(mix(epoch * 8 + c.rank) + blockIdx.x * 4 + where) % c.jitter_ns;
  while (global_ns() < until) {
  }
}

// What a thread knows of the call it is in.
struct Call {
  std::uint32_t epoch;
  bool failed;  // an earlier call has: leave at once
  std::uint64_t header;
  unsigned long long deadline;
};

// Comes after wait_for_previous_grid().
__device__ __forceinline__ Call begin_call(const CommView& c, std::uint64_t call_word) {
  // Epoch and flag in one read, past L1: the flag may be set by another block of this very call.
  const uint2 state = load_relaxed_sys(reinterpret_cast<const uint2*>(state_of(c)));
  Call call;
  call.epoch = state.x;
  call.failed = state.y != 0;
  call.header = with_epoch(call_word, call.epoch);
  call.deadline = global_ns() + c.timeout_ns;
  stall(c, call.epoch, 0);
  return call;
}

// The first failure of a rank is the one that is reported.
static __device__ __noinline__ void fail(const CommView& c, const Call& call, Failure why, int peer,
                                         std::uint64_t theirs) {
  if (atomicCAS(&state_of(c)->failed, 0u, 1u) != 0u) return;
  ErrorRecord* record = c.record;
  record->peer = static_cast<std::uint32_t>(peer);
  record->epoch = call.epoch;
  record->block = blockIdx.x;
  record->mine = call.header;
  record->theirs = theirs;
  store_release_sys(&record->code, static_cast<std::uint32_t>(why));
}

// Tells `peer` what this rank is doing. One block sends, before its first data. The release orders what the calls
// before this one did (reading slots and clearing them) before what the peer does once it has seen the header.
__device__ __forceinline__ void send_header(const CommView& c, const Call& call, int peer) {
  store_release_sys(header_at(c, peer, call.epoch, c.rank), call.header);
}

// Waits for the header of `peer` and compares; every block does, before it writes output.
template <typename GiveUp>
__device__ __forceinline__ bool receive_header(const CommView& c, const Call& call, int peer, GiveUp give_up) {
  std::uint64_t theirs = 0;
  const std::uint64_t* slot = header_at(c, c.rank, call.epoch, peer);
  const bool came =
      wait_until(call.deadline, [&] { return is_of_epoch(theirs = load_acquire_sys(slot), call.epoch); }, give_up);
  if (came && theirs == call.header) return true;
  if (came) {
    fail(c, call, Failure::kDisagreement, peer, theirs);
  } else if (!give_up()) {
    fail(c, call, Failure::kTimeout, peer, 0);
  }
  return false;
}

__device__ __forceinline__ bool never() { return false; }

// All blocks of number blockIdx.x, one a rank, meet: what their threads wrote or read before is done for all threads
// after. The first warp signals, the second one compares headers in the first phase. False for the whole block if a
// wait failed.
__device__ __forceinline__ bool meet(const CommView& c, const Call& call, int phase, bool good) {
  __syncthreads();  // joins the threads' accesses to the release below
  const int thread = threadIdx.x, peer = threadIdx.x % 32;
  if (good && peer < c.world) {
    if (thread < 32) {
      store_release_sys(signal_at(c, peer, phase, blockIdx.x, c.rank), call.epoch);
      const std::uint32_t* own = signal_at(c, c.rank, phase, blockIdx.x, peer);
      good = wait_until(
          call.deadline, [&] { return static_cast<std::int32_t>(load_acquire_sys(own) - call.epoch) >= 0; },
          [&] { return load_relaxed_sys(reinterpret_cast<const uint2*>(state_of(c))).y != 0; });
      if (!good) fail(c, call, Failure::kTimeout, peer, 0);
    } else if (thread < 64 && phase == 0) {
      if (blockIdx.x == 0) send_header(c, call, peer);
      good = receive_header(c, call, peer, never);
    }
  }
  return __syncthreads_and(good);
}

// The end of every call: the last block through advances the epoch, or, if any block failed, poisons the whole output.
template <typename Poison>
__device__ __forceinline__ void finish_call(const CommView& c, const Call& call, Poison poison) {
  stall(c, call.epoch, 1);
  __shared__ bool last;
  __syncthreads();
  // After the block's last wait: what becomes resident now takes no room from a block that another rank waits for.
  let_next_grid_start();
  State* state = state_of(c);
  if (threadIdx.x == 0) last = gridDim.x == 1 || add_acq_rel_gpu(&state->arrived, 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  const bool failed = load_relaxed_sys(reinterpret_cast<const uint2*>(state)).y != 0;
  if (failed) poison();
  if (threadIdx.x == 0) {
    state->arrived = 0;
    if (!failed) state->epoch = call.epoch + 1;
  }
}

}  // namespace extend_attn
