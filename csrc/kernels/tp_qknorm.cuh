// RMS norm of q and k in place, over rows whose width is sharded over the ranks: each rank pushes two sums of squares a token to
// every rank, waits for the others', and scales its part. Slots, epochs and the sentinel are those of one_shot_push.
#pragma once

#include "custom_all_reduce_push.cuh"

namespace extend_attn {

constexpr int kQkNormThreads = kPushThreads;
constexpr int kQkNormWarps = kQkNormThreads / kWarp;
constexpr int kHeldVectors = 4;  // of a token, in each thread's registers between the two halves

// Warps that share a token. Named barrier 0 is __syncthreads; teams take 1 and up.
struct Team {
  int warps, index, thread;

  __device__ void sync() const {
    if (warps == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(index + 1), "r"(warps * kWarp) : "memory");
    }
  }
  __device__ int threads() const { return warps * kWarp; }
};

// Row of `vectors` at `row`: a thread's share of the sum of squares.
template <typename T>
__device__ __forceinline__ float sum_squares(const uint4& v) {
  float x[kPerVector<T>], sum = 0.f;
  unpack<T>(v, x);
#pragma unroll
  for (int e = 0; e < kPerVector<T>; ++e) sum = fmaf(x[e], x[e], sum);
  return sum;
}

template <typename T>
__device__ __forceinline__ uint4 scaled(const uint4& v, const uint4& weight, float factor) {
  float x[kPerVector<T>], w[kPerVector<T>];
  unpack<T>(v, x);
  unpack<T>(weight, w);
#pragma unroll
  for (int e = 0; e < kPerVector<T>; ++e) x[e] = x[e] * factor * w[e];
  return pack<T>(x);
}

// q and k of one token as one array of vectors, q first.
template <typename T>
struct TokenRow {
  uint4 *q, *k;
  int q_vectors, vectors;

  __device__ TokenRow(const QkNormParams& p, std::int64_t token)
      : q(reinterpret_cast<uint4*>(static_cast<T*>(p.q) + token * p.q_stride)),
        k(reinterpret_cast<uint4*>(static_cast<T*>(p.k) + token * p.k_stride)),
        q_vectors(p.q_width / kPerVector<T>),
        vectors((p.q_width + p.k_width) / kPerVector<T>) {}
  __device__ uint4& operator[](int i) const { return i < q_vectors ? q[i] : k[i - q_vectors]; }
};

// Both sums over the team; valid in every thread. `scratch` holds two floats a warp of the block.
__device__ __forceinline__ float2 sum_over_team(const Team& team, float2 part, float2* scratch) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    part.x += __shfl_xor_sync(0xffffffffu, part.x, offset);
    part.y += __shfl_xor_sync(0xffffffffu, part.y, offset);
  }
  if (team.warps == 1) return part;
  float2* mine = scratch + team.index * team.warps;
  if (team.thread % kWarp == 0) mine[team.thread / kWarp] = part;
  team.sync();
  float2 sum = make_float2(0.f, 0.f);
  for (int w = 0; w < team.warps; ++w) sum.x += mine[w].x, sum.y += mine[w].y;
  team.sync();  // before the next token overwrites the scratch
  return sum;
}

// The ranks' sums of a token, added in rank order; false if one never came. Each warp reads for itself, one lane a rank.
__device__ __forceinline__ bool sum_over_ranks(const CommView& c, const Call& call, VerdictBox verdict, int token, float2& total) {
  const int lane = threadIdx.x % kWarp;
  uint2 v = make_uint2(0, 0);
  bool good = true;
  if (lane < c.world) {
    good = receive(c, call, verdict, lane, reinterpret_cast<const uint2*>(push_slot(c, c.rank, call.epoch, lane)) + token, v);
  }
  total = make_float2(0.f, 0.f);
  for (int r = 0; r < c.world; ++r) {
    total.x += __uint_as_float(__shfl_sync(0xffffffffu, v.x, r));
    total.y += __uint_as_float(__shfl_sync(0xffffffffu, v.y, r));
  }
  return __all_sync(0xffffffffu, good);
}

template <typename T>
__device__ __forceinline__ void norm_tokens(const QkNormParams& p, const Call& call, VerdictBox verdict, const Team& team,
                                            int first, int step, const uint4 (&held)[kHeldVectors], bool holds) {
  const CommView& c = p.comm;
  const float q_width = float(p.q_width) * c.world, k_width = float(p.k_width) * c.world;
  const uint4* q_weight = static_cast<const uint4*>(p.q_weight);
  const uint4* k_weight = static_cast<const uint4*>(p.k_weight);
  for (int token = first; token < p.tokens; token += step) {
    float2 total;
    const bool good = sum_over_ranks(c, call, verdict, token, total) && verdict.agreed();
    team.sync();  // every warp has read the slots: the first may clear them
    if (!good) continue;
    if (team.thread < c.world) {
      reinterpret_cast<uint2*>(push_slot(c, c.rank, call.epoch, team.thread))[token] = make_uint2(0, 0);
    }
    const float q_factor = rsqrtf(total.x / q_width + p.eps), k_factor = rsqrtf(total.y / k_width + p.eps);
    const TokenRow<T> row(p, token);
    if (holds) {
#pragma unroll
      for (int h = 0; h < kHeldVectors; ++h) {
        const int i = team.thread + h * team.threads();
        if (i >= row.vectors) continue;
        const bool is_q = i < row.q_vectors;
        row[i] = scaled<T>(held[h], is_q ? q_weight[i] : k_weight[i - row.q_vectors], is_q ? q_factor : k_factor);
      }
    } else {
      for (int i = team.thread; i < row.vectors; i += team.threads()) {
        const bool is_q = i < row.q_vectors;
        row[i] = scaled<T>(row[i], is_q ? q_weight[i] : k_weight[i - row.q_vectors], is_q ? q_factor : k_factor);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kQkNormThreads + kWarp) tp_qknorm(const __grid_constant__ QkNormParams p) {
  const CommView& c = p.comm;
  const Call call = begin_call(c, p.call);
  const int thread = threadIdx.x - kWarp;  // of the data threads; negative: the clerk
  __shared__ int verdict_word;
  __shared__ float2 scratch[kQkNormWarps];
  VerdictBox verdict(&verdict_word);
  Team team{p.team_warps, 0, 0};
  const int teams = kQkNormWarps / p.team_warps;
  int first = 0;
  const int step = gridDim.x * teams;
  uint4 held[kHeldVectors] = {};
  bool holds = false;

  if (thread < 0) {
    if (threadIdx.x == 0) verdict.open(call.failed);
    if (!call.failed && blockIdx.x == 0 && threadIdx.x < c.world) send_header(c, call, threadIdx.x);
  } else {
    team.index = thread / team.threads();
    team.thread = thread % team.threads();
    first = blockIdx.x * teams + team.index;
    // A team with one token keeps it in registers; with more it reads each again, from L2 as a rule.
    holds = p.tokens <= step && (p.q_width + p.k_width) / kPerVector<T> <= kHeldVectors * team.threads();
    for (int token = first; !call.failed && token < p.tokens; token += step) {
      const TokenRow<T> row(p, token);
      float2 part = make_float2(0.f, 0.f);
      if (holds) {
#pragma unroll
        for (int h = 0; h < kHeldVectors; ++h) {
          const int i = team.thread + h * team.threads();
          if (i < row.vectors) held[h] = row[i];
        }
#pragma unroll
        for (int h = 0; h < kHeldVectors; ++h) {
          const int i = team.thread + h * team.threads();
          (i < row.q_vectors ? part.x : part.y) += sum_squares<T>(held[h]);
        }
      } else {
        for (int i = team.thread; i < row.vectors; i += team.threads()) {
          (i < row.q_vectors ? part.x : part.y) += sum_squares<T>(row[i]);
        }
      }
      const float2 sum = sum_over_team(team, part, scratch);
      if (team.thread < c.world) {
        const uint2 words =
            make_uint2(without_empty<float>(__float_as_uint(sum.x)), without_empty<float>(__float_as_uint(sum.y)));
        store_relaxed_sys(reinterpret_cast<uint2*>(push_slot(c, team.thread, call.epoch, c.rank)) + token, words);
      }
    }
  }
  __syncthreads();
  if (thread < 0) {
    if (!call.failed) judge(c, call, verdict, threadIdx.x);
  } else if (!call.failed) {
    norm_tokens<T>(p, call, verdict, team, first, step, held, holds);
  }
  let_next_grid_start();
  finish_call(c, call, [&] {
    for (int token = 0; token < p.tokens; ++token) {
      const TokenRow<T> row(p, token);
      for (int i = threadIdx.x; i < row.vectors; i += blockDim.x) row[i] = nan_vector();
    }
  });
}

}  // namespace extend_attn
