#include "controller.h"

#include <cstring>

#include "../portability/alignment.h"
#include "../portability/check.h"
#include "../portability/device.h"

namespace extend_attn {
namespace {

constexpr std::size_t kSlotBytes = kMaxRanks * sizeof(std::uint64_t);
constexpr std::uint64_t kProbeWord = 0x70726f6265000000ull;  // "probe", then the ranks
constexpr std::uint64_t probe_word(int from, int to) {
  return kProbeWord | std::uint64_t(from) << 8 | std::uint64_t(to);
}

}  // namespace

void check_options(const ControllerOptions& o) {
  check_argument(
      o.world >= kMinRanks && o.world <= kMaxRanks, "world_size",
      "got " + std::to_string(o.world) + "; the kernels serve 2 to 8 ranks (use torch.distributed.all_reduce)");
  check_argument(o.rank >= 0 && o.rank < o.world, "rank",
                 "got " + std::to_string(o.rank) + " of " + std::to_string(o.world));
  const auto check_room = [](const char* name, std::uint64_t bytes) {
    check_argument(bytes >= kVectorBytes && bytes <= kMaxMessageBytes, name,
                   "got " + std::to_string(bytes) + "; from 16 bytes to 16 GiB");
  };
  check_room("max_bytes", o.max_bytes);
  check_room("max_push_bytes", o.max_push_bytes);
  check_argument(o.timeout_ns > 0, "timeout_s", "got 0; it must be positive");
}

Controller::Controller(const ControllerOptions& options) : options_(options) {
  check_options(options);
  const DeviceGuard guard(options.device);
  view_.layout = make_layout(options.world, options.max_push_bytes, options.max_bytes);
  view_.rank = options.rank;
  view_.world = options.world;
  view_.timeout_ns = options.timeout_ns;
  try {
    void* memory = nullptr;
    EXTEND_ATTN_CUDA_CHECK(cudaMalloc(&memory, view_.layout.total));
    workspace_ = static_cast<char*>(memory);
    EXTEND_ATTN_CUDA_CHECK(cudaMemset(workspace_, 0, view_.layout.total));
    EXTEND_ATTN_CUDA_CHECK(cudaDeviceSynchronize());
    void* record = nullptr;
    EXTEND_ATTN_CUDA_CHECK(cudaHostAlloc(&record, sizeof(ErrorRecord), cudaHostAllocMapped | cudaHostAllocPortable));
    record_ = static_cast<ErrorRecord*>(record);
    *record_ = ErrorRecord{};
    void* mapped = nullptr;
    EXTEND_ATTN_CUDA_CHECK(cudaHostGetDevicePointer(&mapped, record_, 0));
    view_.record = static_cast<ErrorRecord*>(mapped);
    EXTEND_ATTN_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
  } catch (...) {
    close();
    throw;
  }
  view_.workspace[options.rank] = workspace_;
}

void Controller::require_open() const {
  if (closed()) throw std::runtime_error("the communicator is closed");
}

std::string Controller::handle() const {
  require_open();
  const DeviceGuard guard(options_.device);
  const auto exported = export_memory(address());
  if (!exported || exported->offset != 0) throw std::runtime_error("the workspace can't be exported by CUDA IPC");
  return exported->handle;
}

void Controller::connect(int peer, const std::string& handle, std::uint64_t address) {
  require_open();
  check_argument(peer >= 0 && peer < options_.world && peer != options_.rank, "peer", "got " + std::to_string(peer));
  check_argument(handle.empty() != (address == 0), "handle", "give a handle or an address");
  const DeviceGuard guard(options_.device);
  view_.workspace[peer] = reinterpret_cast<char*>(address != 0 ? address : imports_.open(handle));
}

void Controller::write_probes() {
  require_open();
  const DeviceGuard guard(options_.device);
  for (int peer = 0; peer < options_.world; ++peer) {
    const std::uint64_t word = probe_word(options_.rank, peer);
    char* at = view_.workspace[peer] + kProbeOffset + sizeof(word) * options_.rank;
    EXTEND_ATTN_CUDA_CHECK(cudaMemcpy(at, &word, sizeof(word), cudaMemcpyHostToDevice));
  }
  EXTEND_ATTN_CUDA_CHECK(cudaDeviceSynchronize());
}

std::string Controller::check_probes() const {
  require_open();
  const DeviceGuard guard(options_.device);
  for (int owner = 0; owner < options_.world; ++owner) {
    std::uint64_t words[kMaxRanks] = {};
    const std::size_t bytes = sizeof(words[0]) * options_.world;
    EXTEND_ATTN_CUDA_CHECK(cudaMemcpy(words, view_.workspace[owner] + kProbeOffset, bytes, cudaMemcpyDeviceToHost));
    for (int from = 0; from < options_.world; ++from) {
      if (words[from] != probe_word(from, owner)) {
        return "what rank " + std::to_string(from) + " wrote to rank " + std::to_string(owner) +
               " is not there when rank " + std::to_string(options_.rank) + " reads it";
      }
    }
  }
  return "";
}

void Controller::order(cudaStream_t stream) {
  const auto capture_of = [](cudaStream_t s) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    EXTEND_ATTN_CUDA_CHECK(cudaStreamGetCaptureInfo(s, &status, &id));
    return status == cudaStreamCaptureStatusActive ? id : 0;
  };
  const unsigned long long capture = capture_of(stream);
  // A captured call runs when its graph is replayed: it waits for earlier calls of its capture only, an eager one for
  // eager ones.
  LastCall& last = capture != 0 ? captured_ : eager_;
  if (last.any && last.stream != stream && last.capture == capture) {
    if (capture_of(last.stream) != capture) {
      throw std::runtime_error(
          "the stream of the previous call is being captured, so this call, on another stream, can't wait for it; "
          "end the capture first, or use a second communicator");
    }
    EXTEND_ATTN_CUDA_CHECK(cudaEventRecord(event_, last.stream));
    EXTEND_ATTN_CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0));
  }
  last = LastCall{stream, capture, true};
}

void Controller::reserve_slots(int count) {
  require_open();
  const int capacity = slabs_.empty() ? 0 : slabs_.back().first + slabs_.back().count;
  if (capacity - taken_ >= count) return;
  const DeviceGuard guard(options_.device);
  void* memory = nullptr;
  EXTEND_ATTN_CUDA_CHECK(cudaMalloc(&memory, kSlotBytes * count));
  slabs_.push_back(Slab{static_cast<char*>(memory), capacity, count});
  EXTEND_ATTN_CUDA_CHECK(cudaMemset(memory, 0, kSlotBytes * count));
  EXTEND_ATTN_CUDA_CHECK(cudaDeviceSynchronize());
}

int Controller::take_slot() {
  const int capacity = slabs_.empty() ? 0 : slabs_.back().first + slabs_.back().count;
  return taken_ < capacity ? taken_++ : -1;
}

const void* Controller::slot_address(int slot) const {
  for (const Slab& slab : slabs_) {
    if (slot >= slab.first && slot < slab.first + slab.count) return slab.memory + kSlotBytes * (slot - slab.first);
  }
  throw std::invalid_argument("slot: got " + std::to_string(slot) + "; " + std::to_string(taken_) + " were taken");
}

void Controller::fill_slot(int slot, const std::vector<std::uint64_t>& inputs) {
  require_open();
  check_argument(
      static_cast<int>(inputs.size()) == options_.world, "inputs",
      "got " + std::to_string(inputs.size()) + " addresses for " + std::to_string(options_.world) + " ranks");
  std::uint64_t row[kMaxRanks] = {};
  for (int r = 0; r < options_.world; ++r) {
    check_aligned("inputs", reinterpret_cast<const void*>(inputs[r]));
    row[r] = inputs[r];
  }
  const DeviceGuard guard(options_.device);
  void* at = const_cast<void*>(slot_address(slot));
  EXTEND_ATTN_CUDA_CHECK(cudaMemcpy(at, row, sizeof(row), cudaMemcpyHostToDevice));
}

ErrorRecord Controller::error() const {
  ErrorRecord record{};
  if (record_ == nullptr) return record;
  // The GPU writes the code last, with release.
  record.code = __atomic_load_n(&record_->code, __ATOMIC_ACQUIRE);
  if (record.code == 0) return record;
  const std::uint32_t code = record.code;
  record = *record_;
  record.code = code;
  return record;
}

std::uint32_t Controller::epoch() const {
  require_open();
  const DeviceGuard guard(options_.device);
  State state{};
  EXTEND_ATTN_CUDA_CHECK(cudaMemcpy(&state, workspace_ + kStateOffset, sizeof(state), cudaMemcpyDeviceToHost));
  return state.epoch;
}

void Controller::synchronize() const {
  require_open();
  const DeviceGuard guard(options_.device);
  EXTEND_ATTN_CUDA_CHECK(cudaDeviceSynchronize());
}

void Controller::reset() {
  require_open();
  const DeviceGuard guard(options_.device);
  EXTEND_ATTN_CUDA_CHECK(cudaDeviceSynchronize());
  EXTEND_ATTN_CUDA_CHECK(cudaMemset(workspace_, 0, view_.layout.total));
  EXTEND_ATTN_CUDA_CHECK(cudaDeviceSynchronize());
  *record_ = ErrorRecord{};
}

void Controller::close() noexcept {
  if (workspace_ == nullptr && record_ == nullptr) return;
  // Errors are dropped: at interpreter exit the driver may be gone, and after a peer's death the context may be lost.
  int before = 0;
  const bool known = cudaGetDevice(&before) == cudaSuccess;
  (void)cudaSetDevice(options_.device);
  (void)cudaDeviceSynchronize();
  imports_.close();
  for (const Slab& slab : slabs_) (void)cudaFree(slab.memory);
  slabs_.clear();
  if (workspace_ != nullptr) (void)cudaFree(workspace_);
  if (record_ != nullptr) (void)cudaFreeHost(record_);
  if (event_ != nullptr) (void)cudaEventDestroy(event_);
  workspace_ = nullptr;
  record_ = nullptr;
  event_ = nullptr;
  (void)cudaGetLastError();
  if (known) (void)cudaSetDevice(before);
}

}  // namespace extend_attn
