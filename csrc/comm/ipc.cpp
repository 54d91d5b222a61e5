#include "ipc.h"

#include <cuda_runtime_api.h>

#include <cstring>

#include "../portability/check.h"

namespace extend_attn {
namespace {

// cuMemGetAddressRange from the driver that the runtime has loaded, so that nothing links against libcuda.
using AddressRange = int (*)(std::uint64_t* base, std::size_t* size, std::uint64_t address);

AddressRange find_address_range() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t code =
      cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &entry, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t code = cudaGetDriverEntryPoint("cuMemGetAddressRange", &entry, cudaEnableDefault, &found);
#endif
  EXTEND_ATTN_CUDA_CHECK(code);
  if (entry == nullptr) throw std::runtime_error("the CUDA driver has no cuMemGetAddressRange");
  return reinterpret_cast<AddressRange>(entry);
}

// Lets this thread make calls that a capture of any thread would otherwise forbid; what it calls here enqueues nothing.
class RelaxedCapture {
 public:
  RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

std::optional<Export> export_memory(std::uint64_t address) {
  static const AddressRange address_range = find_address_range();
  const RelaxedCapture relaxed;
  std::uint64_t base = 0;
  std::size_t size = 0;
  if (address_range(&base, &size, address) != 0) return std::nullopt;
  cudaIpcMemHandle_t handle;
  if (cudaIpcGetMemHandle(&handle, reinterpret_cast<void*>(base)) != cudaSuccess) {
    (void)cudaGetLastError();
    return std::nullopt;
  }
  return Export{std::string(reinterpret_cast<const char*>(&handle), sizeof(handle)), address - base, base};
}

std::uint64_t Imports::open(const std::string& handle) {
  cudaIpcMemHandle_t raw;
  check_argument(
      handle.size() == sizeof(raw), "handle",
      "got " + std::to_string(handle.size()) + " bytes; a CUDA IPC handle has " + std::to_string(sizeof(raw)));
  std::memcpy(&raw, handle.data(), sizeof(raw));
  void* base = nullptr;
  EXTEND_ATTN_CUDA_CHECK(cudaIpcOpenMemHandle(&base, raw, cudaIpcMemLazyEnablePeerAccess));
  opened_.push_back(base);
  return reinterpret_cast<std::uint64_t>(base);
}

void Imports::close() noexcept {
  for (void* base : opened_) {
    if (cudaIpcCloseMemHandle(base) != cudaSuccess) (void)cudaGetLastError();
  }
  opened_.clear();
}

}  // namespace extend_attn
