// CUDA IPC: memory of this process offered to others, and theirs mapped here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace extend_attn {

// Where `address` lies in memory that another process can map: the allocation's handle, and the distance from its base.
struct Export {
  std::string handle;  // the bytes of a cudaIpcMemHandle_t
  std::uint64_t offset;
  std::uint64_t base;  // address here; names the allocation
};

// Nothing if the memory can't be exported: expandable segments and other virtual memory, cudaMallocAsync, not device
// memory. May be called during a stream capture.
std::optional<Export> export_memory(std::uint64_t address);

// Mappings of other processes' allocations, closed together. CUDA counts openings of one handle, so a handle may be
// opened by several.
class Imports {
 public:
  ~Imports() { close(); }
  // The address here. CudaError if the exporter is gone, or there is no peer access.
  std::uint64_t open(const std::string& handle);
  void close() noexcept;

 private:
  std::vector<void*> opened_;
};

}  // namespace extend_attn
