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

// One call of a block, up to the start: who takes part, where inputs are read, and whether all ranks are there. A
// message is `parts` chunks, and a thread has the same vectors of each.
template <typename T, int kWorld>
struct Pull {
  static constexpr int kRanks = kWorld == 2 ? 2 : kMaxRanks;
  static constexpr int kAtOnce = kWorld == 2 ? 2 : 1;  // vectors of each rank on their way

  const AllReduceParams& p;
  const CommView& c;
  Call call;
  std::uint32_t vectors, chunk, first, step;
  uint4* staging;
  const void* input[kRanks];
  bool good;

  __device__ __forceinline__ int world() const { return kWorld == 2 ? 2 : c.world; }

  __device__ __forceinline__ Pull(const AllReduceParams& params, bool chunks)
      : p(params),
        c(params.comm),
        vectors(static_cast<std::uint32_t>((params.count + kPerVector<T> - 1) / kPerVector<T>)),
        first(blockIdx.x * blockDim.x + threadIdx.x),
        step(gridDim.x * blockDim.x),
        staging(reinterpret_cast<uint4*>(staging_of(params.comm, params.comm.rank))) {
    const int parts = chunks ? world() : 1;
    chunk = (vectors + parts - 1) / parts;
    wait_for_previous_grid();
    let_next_grid_start();
    call = begin_call(c, p.call);
    good = find_inputs();
    if (good && p.copy_in) {
      for (std::uint32_t i = first; i < chunk; i += step) {
        for (std::uint32_t at = i; at < vectors; at += chunk) staging[at] = load_vector<T>(p.input, p.count, at);
      }
    }
    advance_epoch(c, call);
    good = meet(c, call, kStart, p.copy_in, good && !call.failed);
  }

  // Where each rank's input is read. False, with the failure noted, if the call was never registered.
  __device__ __forceinline__ bool find_inputs() {
    bool known = true;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      if (r >= world()) continue;
      input[r] = p.slot ? p.slot->input[r] : staging_of(c, r);
      known = known && input[r] != nullptr;
    }
    if (!known && !call.failed) fail(c, call, Failure::kUnregistered, c.rank, 0);
    return known;
  }

  // Sums vectors begin + first, + step, ... up to `end`; `put(i, sum)` takes each.
  template <typename Put>
  __device__ __forceinline__ void sum(std::uint32_t begin, std::uint32_t end, Put put) const {
#pragma unroll 1
    for (std::uint32_t base = begin + first; base < end; base += kAtOnce * step) {
      uint4 v[kAtOnce][kRanks];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
          if (base + n * step < end && r < world()) v[n][r] = load_vector<T>(input[r], p.count, base + n * step);
        }
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (base + n * step >= end) continue;
        float total[kPerVector<T>] = {};
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
          if (r < world()) accumulate<T>(v[n][r], total);
        }
        put(base + n * step, pack<T>(total));
      }
    }
  }

  __device__ __forceinline__ void end() const {
    end_call(c, call, [&](std::uint32_t from, std::uint32_t by) {
      for (std::uint32_t i = from; i < vectors; i += by) store_vector<T>(p.output, p.count, i, nan_vector());
    });
  }
};

template <typename T, int kWorld>
__global__ void __launch_bounds__(kPullThreads) one_shot_pull(const __grid_constant__ AllReduceParams p) {
  Pull<T, kWorld> pull(p, false);
  // Peers read our input until the end: in place, the sums wait in staging, unless it is staging that they read.
  const bool through_staging = p.output == p.input && !p.copy_in;
  if (pull.good) {
    pull.sum(0, pull.vectors, [&](std::uint32_t i, const uint4& sum) {
      if (through_staging) {
        pull.staging[i] = sum;
      } else {
        store_vector<T>(p.output, p.count, i, sum);
      }
    });
  }
  pull.good = meet(pull.c, pull.call, kEnd, false, pull.good);
  if (pull.good && through_staging) {
    for (std::uint32_t i = pull.first; i < pull.vectors; i += pull.step)
      store_vector<T>(p.output, p.count, i, pull.staging[i]);
  }
  pull.end();
}

template <typename T, int kWorld>
__global__ void __launch_bounds__(kPullThreads) two_shot_pull(const __grid_constant__ AllReduceParams p) {
  Pull<T, kWorld> pull(p, true);
  const std::uint32_t begin = pull.c.rank * pull.chunk;
  if (pull.good) {
    pull.sum(begin, min(begin + pull.chunk, pull.vectors),
             [&](std::uint32_t i, const uint4& sum) { pull.staging[i] = sum; });
  }
  pull.good = meet(pull.c, pull.call, kMiddle, true, pull.good);
  if (pull.good) {
    constexpr int kRanks = Pull<T, kWorld>::kRanks;
#pragma unroll 2
    for (std::uint32_t i = pull.first; i < pull.chunk; i += pull.step) {
      uint4 v[kRanks];
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
        const std::uint32_t at = r * pull.chunk + i;
        if (r < pull.world() && at < pull.vectors) v[r] = reinterpret_cast<const uint4*>(staging_of(pull.c, r))[at];
      }
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
        const std::uint32_t at = r * pull.chunk + i;
        if (r < pull.world() && at < pull.vectors) store_vector<T>(p.output, p.count, at, v[r]);
      }
    }
  }
  pull.good = meet(pull.c, pull.call, kEnd, false, pull.good);
  pull.end();
}

}  // namespace extend_attn
