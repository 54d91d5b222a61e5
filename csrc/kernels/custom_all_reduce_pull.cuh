// Pull: ranks meet, then read each other's inputs. One-shot: every rank sums everything. Two-shot: every rank sums one
// chunk, they meet, and each gathers the chunks.
//
// An input is read where it lies (a captured call whose address the peers have) or from its rank's staging, into which
// it is copied first. Block b of a rank copies, and later reads at its peers, the same vectors that block b of each
// peer does, so blocks meet by number and there is no meeting of whole grids. Staging is enough for every case: sums of
// a two-shot go to the own chunk of the own staging, which no peer reads before the middle meeting, and a registered
// input is never written while a peer may read it.
#pragma once

#include "../comm/signal.cuh"
#include "../portability/vec.cuh"
#include "params.h"

namespace extend_attn {

enum Phase : int { kStart = 0, kMiddle = 1, kEnd = 2 };

// Where rank r's input is read. False, with the failure noted, if the call was never registered.
__device__ __forceinline__ bool find_inputs(const AllReduceParams& p, const Call& call,
                                            const void* (&input)[kMaxRanks]) {
  bool known = true;
#pragma unroll
  for (int r = 0; r < kMaxRanks; ++r) {
    if (r >= p.comm.world) continue;
    input[r] = p.slot ? p.slot->input[r] : staging_of(p.comm, r);
    known = known && input[r] != nullptr;
  }
  if (!known) fail(p.comm, call, Failure::kUnregistered, p.comm.rank, 0);
  return known;
}

template <typename T>
__device__ __forceinline__ uint4 sum_inputs(const AllReduceParams& p, const void* const (&input)[kMaxRanks],
                                            std::int64_t i) {
  uint4 v[kMaxRanks];
#pragma unroll
  for (int r = 0; r < kMaxRanks; ++r) {
    if (r < p.comm.world) v[r] = load_vector<T>(input[r], p.count, i);
  }
  float sum[kPerVector<T>] = {};
#pragma unroll
  for (int r = 0; r < kMaxRanks; ++r) {
    if (r < p.comm.world) accumulate<T>(v[r], sum);
  }
  return pack<T>(sum);
}

template <typename T>
__device__ __forceinline__ void end_pull(const AllReduceParams& p, const Call& call, std::int64_t vectors) {
  finish_call(p.comm, call, [&] {
    for (std::int64_t i = threadIdx.x; i < vectors; i += blockDim.x)
      store_vector<T>(p.output, p.count, i, nan_vector());
  });
}

template <typename T>
__global__ void __launch_bounds__(kPullThreads) one_shot_pull(const __grid_constant__ AllReduceParams p) {
  const CommView& c = p.comm;
  wait_for_previous_grid();
  const Call call = begin_call(c, p.call);
  const std::int64_t vectors = (p.count + kPerVector<T> - 1) / kPerVector<T>;
  const std::int64_t first = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t step = std::int64_t(gridDim.x) * blockDim.x;
  uint4* staging = reinterpret_cast<uint4*>(staging_of(c, c.rank));
  const void* input[kMaxRanks];
  const bool ready = !call.failed && find_inputs(p, call, input);

  if (ready && p.copy_in) {
    for (std::int64_t i = first; i < vectors; i += step) staging[i] = load_vector<T>(p.input, p.count, i);
  }
  const bool started = meet(c, call, kStart, ready);
  // Peers read our input until the end: in place, the sums wait in staging, unless it is staging that they read.
  const bool through_staging = p.output == p.input && !p.copy_in;
  if (started) {
    for (std::int64_t i = first; i < vectors; i += step) {
      const uint4 sum = sum_inputs<T>(p, input, i);
      if (through_staging) {
        staging[i] = sum;
      } else {
        store_vector<T>(p.output, p.count, i, sum);
      }
    }
  }
  const bool ended = meet(c, call, kEnd, started);
  if (ended && through_staging) {
    for (std::int64_t i = first; i < vectors; i += step) store_vector<T>(p.output, p.count, i, staging[i]);
  }
  end_pull<T>(p, call, vectors);
}

template <typename T>
__global__ void __launch_bounds__(kPullThreads) two_shot_pull(const __grid_constant__ AllReduceParams p) {
  const CommView& c = p.comm;
  wait_for_previous_grid();
  const Call call = begin_call(c, p.call);
  const std::int64_t vectors = (p.count + kPerVector<T> - 1) / kPerVector<T>;
  const std::int64_t chunk = (vectors + c.world - 1) / c.world;  // vectors that a rank sums
  const std::int64_t first = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t step = std::int64_t(gridDim.x) * blockDim.x;
  uint4* staging = reinterpret_cast<uint4*>(staging_of(c, c.rank));
  const void* input[kMaxRanks];
  const bool ready = !call.failed && find_inputs(p, call, input);

  if (ready && p.copy_in) {
    for (std::int64_t i = first; i < chunk; i += step) {
#pragma unroll
      for (int r = 0; r < kMaxRanks; ++r) {
        const std::int64_t at = r * chunk + i;
        if (r < c.world && at < vectors) staging[at] = load_vector<T>(p.input, p.count, at);
      }
    }
  }
  const bool started = meet(c, call, kStart, ready);
  if (started) {
    const std::int64_t begin = c.rank * chunk;
    for (std::int64_t i = first; i < chunk && begin + i < vectors; i += step)
      staging[begin + i] = sum_inputs<T>(p, input, begin + i);
  }
  const bool summed = meet(c, call, kMiddle, started);
  if (summed) {
    for (std::int64_t i = first; i < chunk; i += step) {
      uint4 v[kMaxRanks];
#pragma unroll
      for (int r = 0; r < kMaxRanks; ++r) {
        const std::int64_t at = r * chunk + i;
        if (r < c.world && at < vectors) v[r] = reinterpret_cast<const uint4*>(staging_of(c, r))[at];
      }
#pragma unroll
      for (int r = 0; r < kMaxRanks; ++r) {
        const std::int64_t at = r * chunk + i;
        if (r < c.world && at < vectors) store_vector<T>(p.output, p.count, at, v[r]);
      }
    }
  }
  meet(c, call, kEnd, summed);
  end_pull<T>(p, call, vectors);
}

}  // namespace extend_attn
