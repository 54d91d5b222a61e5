// What differs between GPU architectures, and the current device of the host thread.
#pragma once

#include <cuda_runtime_api.h>

#include "check.h"

namespace extend_attn {

// Makes `device` current for a scope; costs two host calls and no GPU work.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    EXTEND_ATTN_CUDA_CHECK(cudaGetDevice(&before_));
    if (before_ != device) EXTEND_ATTN_CUDA_CHECK(cudaSetDevice(device));
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Compute capability from which a kernel may start before its predecessor has ended (programmatic dependent launch).
constexpr int kFirstArchWithDependentLaunch = 90;

#ifdef __CUDACC__
// Waits until the kernels before this one in the stream are complete and what they wrote is visible. Comes before the
// first access to anything that they may touch. Nothing where the launch was an ordinary one.
__device__ __forceinline__ void wait_for_previous_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream become resident, where it waits in wait_for_previous_grid().
__device__ __forceinline__ void let_next_grid_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Nanoseconds since some moment, the same clock on every SM of a GPU; in steps of up to 1 us.
__device__ __forceinline__ unsigned long long global_ns() {
  unsigned long long ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns)::"memory");
  return ns;
}
#endif

}  // namespace extend_attn
