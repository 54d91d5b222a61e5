// Arguments checked, grid chosen, kernel launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../comm/controller.h"
#include "../kernels/params.h"

namespace extend_attn {

struct AllReduceCall {
  Op op;
  DType dtype;
  std::uint64_t input, output;
  std::int64_t count;
  int slot;  // of a captured pull; -1: none
  bool copy_in;
};

struct QkNormCall {
  DType dtype;
  std::uint64_t q, k, q_weight, k_weight;
  std::int64_t tokens, q_width, k_width, q_stride, k_stride;  // elements
  float eps;
};

struct LaunchShape {
  int blocks, threads;
};

int element_bytes(DType dtype);

// ValueError naming the argument, before anything is launched. They need no GPU.
void check_call(const AllReduceCall& call, const ControllerOptions& options);
void check_call(const QkNormCall& call, const ControllerOptions& options);

// Equal on all ranks: it follows from what the header says, the world size and `max_blocks`.
LaunchShape all_reduce_shape(Op op, DType dtype, std::int64_t count, int world, int max_blocks);
int team_warps(DType dtype, std::int64_t q_width, std::int64_t k_width);
LaunchShape qknorm_shape(DType dtype, std::int64_t tokens, std::int64_t q_width, std::int64_t k_width, int max_blocks);

// How the kernels of a communicator are launched.
struct LaunchOptions {
  int max_blocks;
  bool dependent_launch;  // only where the architecture has it
};

void launch(Controller& controller, const AllReduceCall& call, const LaunchOptions& options, cudaStream_t stream);
void launch(Controller& controller, const QkNormCall& call, const LaunchOptions& options, cudaStream_t stream);

// Loads every kernel of a type for `world` ranks on the current device, so that no call does, and gives the fewest
// blocks of one kernel that the device holds at once. ValueError if the module was built without the type.
int load_kernels(DType dtype, int world);

}  // namespace extend_attn
