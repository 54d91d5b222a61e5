// What a kernel knows of a communicator, and where things lie in each rank's workspace.
//
// A workspace is one allocation that every peer has mapped:
//   [state | headers | probes | signals | push buffer: 2 epochs x world slots | staging]
// Only its owner touches `state`. Peers write headers, probes, signals and push slots, and read staging.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define EXTEND_ATTN_HD __host__ __device__ __forceinline__
#else
#define EXTEND_ATTN_HD inline
#endif

namespace extend_attn {

constexpr int kMinRanks = 2;
constexpr int kMaxRanks = 8;
constexpr std::uint64_t kMaxMessageBytes = std::uint64_t(16) << 30;  // kernels count vectors in 32 bits
constexpr int kWarp = 32;
constexpr int kEpochs = 2;  // a slot is written again two calls later, after every peer has shown that it read it
constexpr int kMaxPullBlocks = 128;  // each with signals of its own; they saturate the links of an H100
constexpr int kPhases = 3;           // start, middle, end of a pull

// Counted by the calls of one rank; equal on all ranks as long as they agree.
struct State {
  std::uint32_t epoch;    // read first; its parity chooses the slots
  std::uint32_t failed;   // sticky: later calls leave at once
  std::uint32_t arrived;  // blocks of the running call that have read the epoch
  std::uint32_t unused;
};

constexpr std::size_t kStateOffset = 0;
constexpr std::size_t kHeaderOffset = 256;   // u64 [kEpochs][kMaxRanks]
constexpr std::size_t kProbeOffset = 512;    // u64 [kMaxRanks]
constexpr std::size_t kSignalOffset = 1024;  // u32 [kPhases][kMaxPullBlocks][kMaxRanks]
constexpr std::size_t kPushOffset = 16 * 1024;
static_assert(kSignalOffset + sizeof(std::uint32_t) * kPhases * kMaxPullBlocks * kMaxRanks <= kPushOffset,
              "signals fit");

constexpr std::size_t kRegionAlignment = 256;
EXTEND_ATTN_HD std::size_t round_up(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }

// Sizes in bytes; `push_stride` is what one rank may push in one call.
struct Layout {
  std::uint64_t push_stride;
  std::uint64_t staging_offset;
  std::uint64_t total;
};

inline Layout make_layout(int world, std::size_t max_push_bytes, std::size_t max_bytes) {
  Layout layout{};
  layout.push_stride = round_up(max_push_bytes, kRegionAlignment);
  layout.staging_offset = kPushOffset + kEpochs * static_cast<std::uint64_t>(world) * layout.push_stride;
  layout.total = layout.staging_offset + round_up(max_bytes, kRegionAlignment);
  return layout;
}

enum class Failure : std::uint32_t { kNone = 0, kTimeout = 1, kDisagreement = 2, kUnregistered = 3 };

// In pinned host memory: written once, by the first thread that fails, `code` last.
struct ErrorRecord {
  std::uint32_t code;  // Failure
  std::uint32_t peer;
  std::uint32_t epoch;
  std::uint32_t block;
  std::uint64_t mine;    // this rank's header
  std::uint64_t theirs;  // the peer's header of this epoch, 0: none came
};

struct CommView {
  char* workspace[kMaxRanks];  // as mapped here; [rank] is our own
  ErrorRecord* record;
  std::uint64_t timeout_ns;
  Layout layout;
  std::int32_t rank;
  std::int32_t world;
  std::uint32_t jitter_ns;  // tests: each block stalls up to this long, at random
};

EXTEND_ATTN_HD State* state_of(const CommView& c) {
  return reinterpret_cast<State*>(c.workspace[c.rank] + kStateOffset);
}
// The header that `from` leaves at `owner`.
EXTEND_ATTN_HD std::uint64_t* header_at(const CommView& c, int owner, std::uint32_t epoch, int from) {
  return reinterpret_cast<std::uint64_t*>(c.workspace[owner] + kHeaderOffset) + (epoch % kEpochs) * kMaxRanks + from;
}
EXTEND_ATTN_HD std::uint32_t* signal_at(const CommView& c, int owner, int phase, int block, int from) {
  return reinterpret_cast<std::uint32_t*>(c.workspace[owner] + kSignalOffset) +
         (phase * kMaxPullBlocks + block) * kMaxRanks + from;
}
// What `from` pushes to `owner`: every operation uses this one base and stride.
EXTEND_ATTN_HD char* push_slot(const CommView& c, int owner, std::uint32_t epoch, int from) {
  return c.workspace[owner] + kPushOffset + ((epoch % kEpochs) * c.world + from) * c.layout.push_stride;
}
EXTEND_ATTN_HD char* staging_of(const CommView& c, int owner) { return c.workspace[owner] + c.layout.staging_offset; }

}  // namespace extend_attn
