// What each kernel is given, in one struct by value, and the table through which the host finds the kernels of a type.
#pragma once

#include <cstdint>

#include "../comm/header.h"
#include "../comm/view.h"
#include "../portability/selection.h"

namespace extend_attn {

// Threads a block. A push grows its blocks only where there can't be more of them.
constexpr int kMinPushThreads = 128;
constexpr int kMaxPushThreads = 512;
constexpr int kPullThreads = 512;
constexpr int kNormThreads = 256;

// The inputs of one captured call: where each rank's lies as mapped here. Filled when capture() is left; null before.
struct InputSlot {
  const void* input[kMaxRanks];
};

struct AllReduceParams {
  CommView comm;
  const void* input;
  void* output;
  std::int64_t count;     // elements
  std::uint64_t call;     // pack_call()
  const InputSlot* slot;  // pull of a captured call, else null: every rank's input is in its staging
  std::int32_t copy_in;   // pull: this rank's input goes through its staging
};

struct QkNormParams {
  CommView comm;
  void* q;
  void* k;
  const void* q_weight;
  const void* k_weight;
  std::int64_t q_stride;  // elements from a token to the next
  std::int64_t k_stride;
  std::uint64_t call;
  std::int32_t tokens;
  std::int32_t q_width;  // of this rank
  std::int32_t k_width;
  std::int32_t team_warps;  // warps that share a token: 1, 2, 4 or 8
  float eps;
};

// Addresses of __global__ functions of one element type; [0] for two ranks, [1] for any number.
struct KernelSet {
  const void* one_shot_push[2] = {};
  const void* one_shot_pull[2] = {};
  const void* two_shot_pull[2] = {};
  const void* tp_qknorm = nullptr;
};

constexpr int kDTypes = 3;

// One table a module, filled when the module is loaded.
inline KernelSet& kernels_of(DType dtype) {
  static KernelSet table[kDTypes];
  return table[static_cast<int>(dtype)];
}

}  // namespace extend_attn
