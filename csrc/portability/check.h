// Errors as exceptions: a bad argument is std::invalid_argument (ValueError in Python), a failed CUDA call is CudaError
// (RuntimeError in Python). Nothing here ends the process.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace extend_attn {

class CudaError : public std::runtime_error {
 public:
  CudaError(cudaError_t code, const char* call, const char* file, int line)
      : std::runtime_error(std::string(cudaGetErrorName(code)) + " (" + cudaGetErrorString(code) + ") from " + call +
                           " at " + file + ":" + std::to_string(line)),
        code_(code) {}

  cudaError_t code() const { return code_; }

 private:
  cudaError_t code_;
};

// `message` says what was got, what is allowed, and the remedy.
inline void check_argument(bool good, const char* name, const std::string& message) {
  if (!good) throw std::invalid_argument(std::string(name) + ": " + message);
}

}  // namespace extend_attn

// Throws CudaError; clears the error first, so that it is not reported a second time by whoever asks next.
#define EXTEND_ATTN_CUDA_CHECK(call)                                    \
  do {                                                                  \
    const cudaError_t code_ = (call);                                   \
    if (code_ != cudaSuccess) {                                         \
      (void)cudaGetLastError();                                         \
      throw ::extend_attn::CudaError(code_, #call, __FILE__, __LINE__); \
    }                                                                   \
  } while (0)
