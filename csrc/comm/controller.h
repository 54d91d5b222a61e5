// One rank's side of a communicator on the host: its workspace, the peers' as mapped here, the error record, the tables
// of captured inputs, and the order of its calls. It knows no kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "header.h"
#include "ipc.h"
#include "view.h"

namespace extend_attn {

struct ControllerOptions {
  int rank;
  int world;
  int device;
  std::uint64_t max_bytes;       // of a pull's staging
  std::uint64_t max_push_bytes;  // of one rank's slot
  std::uint64_t timeout_ns;
};

// ValueError naming the argument.
void check_options(const ControllerOptions& options);

class Controller {
 public:
  explicit Controller(const ControllerOptions& options);
  ~Controller() { close(); }
  Controller(const Controller&) = delete;
  Controller& operator=(const Controller&) = delete;

  const ControllerOptions& options() const { return options_; }
  const CommView& view() const { return view_; }
  bool closed() const { return workspace_ == nullptr; }

  // This rank's workspace, for peers in other processes (a CUDA IPC handle) and in this one (its address).
  std::string handle() const;
  std::uint64_t address() const { return reinterpret_cast<std::uint64_t>(workspace_); }

  // Maps a peer's workspace; exactly one of `handle` and `address` is given.
  void connect(int peer, const std::string& handle, std::uint64_t address);
  // Before the first call: each rank writes a word to every peer, and after all have, looks for theirs and reads them
  // at the peers.
  void write_probes();
  std::string check_probes() const;  // "" or what went wrong

  // Makes `stream` wait for the call before this one if that went to another stream; within one capture, too.
  void order(cudaStream_t stream);

  // Tables of captured inputs. `reserve` before a capture, `take` during it, `fill` after it.
  void reserve_slots(int count);
  int take_slot();  // -1: none left
  const void* slot_address(int slot) const;
  void fill_slot(int slot, const std::vector<std::uint64_t>& inputs);
  std::uint64_t open(const std::string& handle) { return imports_.open(handle); }
  std::uint64_t staging(int owner) const { return reinterpret_cast<std::uint64_t>(staging_of(view_, owner)); }

  // A copy of the record; `code` is kNone as long as nothing failed. Needs no GPU call.
  ErrorRecord error() const;
  void set_jitter(std::uint32_t ns) { view_.jitter_ns = ns; }
  std::uint32_t epoch() const;  // synchronises
  void synchronize() const;
  // Everything as new, slots of captures excepted. Between two barriers of all ranks, with no call in flight.
  void reset();
  void close() noexcept;

 private:
  void require_open() const;

  ControllerOptions options_;
  CommView view_{};
  char* workspace_ = nullptr;
  ErrorRecord* record_ = nullptr;
  Imports imports_;
  struct Slab {
    char* memory;
    int first, count;
  };
  std::vector<Slab> slabs_;
  int taken_ = 0;
  struct LastCall {
    cudaStream_t stream = nullptr;
    unsigned long long capture = 0;  // 0: eager
    bool any = false;
  };
  LastCall eager_, captured_;
  cudaEvent_t event_ = nullptr;
};

}  // namespace extend_attn
