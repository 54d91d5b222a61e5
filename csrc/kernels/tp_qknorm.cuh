// RMS norm of q and k in place, over rows whose width is sharded over the ranks: each rank pushes two sums of squares a
// token to every rank, waits for the others', and scales its part. Slots, epochs and the sentinel are those of
// one_shot_push.
#pragma once

#include "custom_all_reduce_push.cuh"

namespace extend_attn {

constexpr int kNormWarps = kNormThreads / kWarp;
constexpr int kHeldVectors = 4;  // of a token, in each thread's registers

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
  __device__ const uint4& weight(const QkNormParams& p, int i) const {
    return i < q_vectors ? static_cast<const uint4*>(p.q_weight)[i]
                         : static_cast<const uint4*>(p.k_weight)[i - q_vectors];
  }
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

// The ranks' sums of a token, added in rank order; false if one never came. Each warp reads for itself, one lane a
// rank.
__device__ __forceinline__ bool sum_over_ranks(const CommView& c, Call& call, Headers& headers, int token,
                                               float2& total) {
  const int lane = threadIdx.x % kWarp;
  const uint2* slot = reinterpret_cast<const uint2*>(push_slot(c, c.rank, call.epoch, lane)) + token;
  uint2 v = make_uint2(0, 0);
  bool full = lane >= c.world;
  Patience patience(c);
  while (true) {
    if (!full) v = load_relaxed_sys(slot);
    headers.look();
    full = full || is_full(v);
    if (__all_sync(kFullWarp, full && headers.agreed())) break;
    if (gives_up(c, call, patience, headers, full ? -1 : lane)) return false;
  }
  total = make_float2(0.f, 0.f);
  for (int r = 0; r < c.world; ++r) {
    total.x += __uint_as_float(__shfl_sync(kFullWarp, v.x, r));
    total.y += __uint_as_float(__shfl_sync(kFullWarp, v.y, r));
  }
  return true;
}

// The vectors of one token that a thread keeps in registers, with their weights, between the two halves.
template <typename T>
struct Held {
  uint4 x[kHeldVectors], weight[kHeldVectors];

  __device__ void load(const QkNormParams& p, const Team& team, std::int64_t token) {
    const TokenRow<T> row(p, token);
#pragma unroll
    for (int h = 0; h < kHeldVectors; ++h) {
      const int i = team.thread + h * team.threads();
      x[h] = weight[h] = make_uint4(0, 0, 0, 0);
      if (i < row.vectors) x[h] = row[i], weight[h] = row.weight(p, i);
    }
  }
  __device__ float2 squares(const QkNormParams& p, const Team& team) const {
    float2 part = make_float2(0.f, 0.f);
#pragma unroll
    for (int h = 0; h < kHeldVectors; ++h) {
      const bool is_q = team.thread + h * team.threads() < p.q_width / kPerVector<T>;
      (is_q ? part.x : part.y) += sum_squares<T>(x[h]);
    }
    return part;
  }
  __device__ void scale(const TokenRow<T>& row, const Team& team, float q_factor, float k_factor) const {
#pragma unroll
    for (int h = 0; h < kHeldVectors; ++h) {
      const int i = team.thread + h * team.threads();
      if (i < row.vectors) row[i] = scaled<T>(x[h], weight[h], i < row.q_vectors ? q_factor : k_factor);
    }
  }
};

template <typename T>
__device__ __forceinline__ float2 squares_of_row(const TokenRow<T>& row, const Team& team) {
  float2 part = make_float2(0.f, 0.f);
  for (int i = team.thread; i < row.vectors; i += team.threads())
    (i < row.q_vectors ? part.x : part.y) += sum_squares<T>(row[i]);
  return part;
}

template <typename T>
__global__ void __launch_bounds__(kNormThreads) tp_qknorm(const __grid_constant__ QkNormParams p) {
  const CommView& c = p.comm;
  __shared__ float2 scratch[kNormWarps];
  const int team_threads = p.team_warps * kWarp;
  const int teams = kNormThreads / team_threads;
  const Team team{p.team_warps, int(threadIdx.x) / team_threads, int(threadIdx.x) % team_threads};
  const int first = blockIdx.x * teams + team.index;
  const int step = gridDim.x * teams;
  // A team with one token keeps it in registers; with more it reads each again, from L2 as a rule.
  const bool holds = p.tokens <= step && (p.q_width + p.k_width) / kPerVector<T> <= kHeldVectors * team.threads();
  Held<T> held;
  wait_for_previous_grid();
  let_next_grid_start();
  Call call = begin_call(c, p.call);
  if (holds && first < p.tokens) held.load(p, team, first);

  if (!call.failed) {
    if (blockIdx.x == 0 && threadIdx.x < c.world && threadIdx.x != c.rank) send_header(c, call, threadIdx.x);
    for (int token = first; token < p.tokens; token += step) {
      const float2 part = holds ? held.squares(p, team) : squares_of_row(TokenRow<T>(p, token), team);
      const float2 sum = sum_over_team(team, part, scratch);
      if (team.thread < c.world) {
        const uint2 words =
            make_uint2(without_empty<float>(__float_as_uint(sum.x)), without_empty<float>(__float_as_uint(sum.y)));
        store_relaxed_sys(reinterpret_cast<uint2*>(push_slot(c, team.thread, call.epoch, c.rank)) + token, words);
      }
    }
  }
  advance_epoch(c, call);
  bool good = !call.failed;
  Headers headers(c, call);
  const float q_width = float(p.q_width) * c.world, k_width = float(p.k_width) * c.world;
  for (int token = first; !call.failed && token < p.tokens; token += step) {
    float2 total;
    good = good && sum_over_ranks(c, call, headers, token, total);
    team.sync();  // every warp has read the slots: the first may clear them
    if (!good) continue;
    if (team.thread < c.world) {
      store_relaxed_sys(reinterpret_cast<uint2*>(push_slot(c, c.rank, call.epoch, team.thread)) + token,
                        make_uint2(0, 0));
    }
    const float q_factor = rsqrtf(total.x / q_width + p.eps), k_factor = rsqrtf(total.y / k_width + p.eps);
    const TokenRow<T> row(p, token);
    if (holds) {
      held.scale(row, team, q_factor, k_factor);
    } else {
      for (int i = team.thread; i < row.vectors; i += team.threads()) {
        row[i] = scaled<T>(row[i], row.weight(p, i), i < row.q_vectors ? q_factor : k_factor);
      }
    }
  }
  end_call(c, call, [&](std::uint32_t from, std::uint32_t by) {
    const TokenRow<T> any(p, 0);
    const auto vectors = static_cast<std::uint32_t>(any.vectors);
    for (std::uint64_t i = from; i < std::uint64_t(vectors) * p.tokens; i += by)
      TokenRow<T>(p, i / vectors)[i % vectors] = nan_vector();
  });
}

}  // namespace extend_attn
