// The pybind11 module: raw pointers, sizes and streams as integers, no torch header, so that no build depends on
// torch's ABI.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../comm/controller.h"
#include "../portability/alignment.h"
#include "../portability/check.h"
#include "../portability/device.h"
#include "build_info.h"
#include "launch.h"

namespace py = pybind11;

namespace extend_attn {
namespace {

cudaStream_t as_stream(std::uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

DType as_dtype(int dtype) {
  check_argument(dtype >= 0 && dtype < kDTypes, "dtype",
                 "got number " + std::to_string(dtype) + "; 0 float16, 1 bfloat16, 2 float32");
  return static_cast<DType>(dtype);
}

Op as_op(int op) {
  check_argument(op >= 1 && op <= 3, "op",
                 "got number " + std::to_string(op) + "; 1 one_shot_push, 2 one_shot_pull, 3 two_shot_pull");
  return static_cast<Op>(op);
}

// The fields of a header, for an error message.
py::dict describe_header(std::uint64_t header) {
  py::dict fields;
  fields["op"] = static_cast<int>(header >> 16 & 15);
  fields["dtype"] = static_cast<int>(header >> 20 & 15);
  const std::uint64_t size = header >> 24;
  fields["sequence"] = header & 0xffff;
  if (static_cast<Op>(header >> 16 & 15) == Op::kTpQkNorm) {
    fields["tokens"] = size & 0xffff;
    fields["q_width"] = (size >> 16 & 0xfff) * 8;
    fields["k_width"] = (size >> 28) * 8;
  } else {
    fields["count"] = size;
  }
  return fields;
}

// A controller and how its kernels are launched.
struct Communicator {
  Controller controller;
  LaunchOptions launching;

  Communicator(const ControllerOptions& options, bool pdl) : controller(options), launching{kMaxPullBlocks, false} {
    int major = 0, minor = 0;
    EXTEND_ATTN_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, options.device));
    EXTEND_ATTN_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, options.device));
    launching.dependent_launch = pdl && major * 10 + minor >= kFirstArchWithDependentLaunch;
  }

  // False: the communicator is poisoned, nothing was launched.
  template <typename CallOf>
  bool run(const CallOf& call, std::uintptr_t stream) {
    if (controller.closed()) throw std::runtime_error("the communicator is closed");
    if (controller.error().code != 0) return false;
    launch(controller, call, launching, as_stream(stream));
    return true;
  }
};

void bind_communicator(py::module_& m) {
  py::class_<Communicator>(m, "Communicator", py::module_local(),
                           "One rank's workspace, peers and launches. Sizes in bytes, addresses as integers.")
      .def(py::init([](int rank, int world, int device, std::uint64_t max_bytes, std::uint64_t max_push_bytes,
                       std::uint64_t timeout_ns, bool pdl) {
             return std::make_unique<Communicator>(
                 ControllerOptions{rank, world, device, max_bytes, max_push_bytes, timeout_ns}, pdl);
           }),
           py::kw_only(), py::arg("rank"), py::arg("world"), py::arg("device"), py::arg("max_bytes"),
           py::arg("max_push_bytes"), py::arg("timeout_ns"), py::arg("pdl"))
      .def("handle", [](const Communicator& c) { return py::bytes(c.controller.handle()); })
      .def("address", [](const Communicator& c) { return c.controller.address(); })
      .def(
          "connect",
          [](Communicator& c, int peer, const std::string& handle, std::uint64_t address) {
            c.controller.connect(peer, handle, address);
          },
          py::arg("peer"), py::arg("handle"), py::arg("address"))
      .def("write_probes", [](Communicator& c) { c.controller.write_probes(); })
      .def("check_probes", [](const Communicator& c) { return c.controller.check_probes(); })
      .def(
          "load_kernels",
          [](const Communicator& c, int dtype) {
            const DeviceGuard guard(c.controller.options().device);
            return load_kernels(as_dtype(dtype), c.controller.options().world);
          },
          py::arg("dtype"),
          "Loads every kernel of a type; the fewest blocks of one kernel that the device holds at once.")
      .def_property(
          "max_blocks", [](const Communicator& c) { return c.launching.max_blocks; },
          [](Communicator& c, int blocks) {
            check_argument(blocks >= 1, "max_blocks", "got " + std::to_string(blocks) + "; at least 1");
            c.launching.max_blocks = blocks;
          })
      .def_property_readonly("dependent_launch", [](const Communicator& c) { return c.launching.dependent_launch; })
      .def("all_reduce",
           [](Communicator& c, std::uintptr_t stream, int op, int dtype, std::int64_t count, std::uint64_t input,
              std::uint64_t output, int slot, bool copy_in) {
             return c.run(AllReduceCall{as_op(op), as_dtype(dtype), input, output, count, slot, copy_in}, stream);
           })
      .def("tp_qknorm",
           [](Communicator& c, std::uintptr_t stream, int dtype, std::int64_t tokens, std::uint64_t q,
              std::int64_t q_width, std::int64_t q_stride, std::uint64_t k, std::int64_t k_width, std::int64_t k_stride,
              std::uint64_t q_weight, std::uint64_t k_weight, float eps) {
             return c.run(QkNormCall{as_dtype(dtype), q, k, q_weight, k_weight, tokens, q_width, k_width, q_stride,
                                     k_stride, eps},
                          stream);
           })
      .def(
          "error",
          [](const Communicator& c) -> py::object {
            const ErrorRecord record = c.controller.error();
            if (record.code == 0) return py::none();
            py::dict fields;
            fields["failure"] = record.code;
            fields["peer"] = record.peer;
            fields["epoch"] = record.epoch;
            fields["block"] = record.block;
            fields["mine"] = describe_header(record.mine);
            fields["theirs"] = record.theirs == 0 ? py::object(py::none()) : describe_header(record.theirs);
            return std::move(fields);
          },
          "What a kernel reported, or None; makes no GPU call.")
      .def("reserve_slots", [](Communicator& c, int count) { c.controller.reserve_slots(count); })
      .def("take_slot", [](Communicator& c) { return c.controller.take_slot(); })
      .def("fill_slot", [](Communicator& c, int slot,
                           const std::vector<std::uint64_t>& inputs) { c.controller.fill_slot(slot, inputs); })
      .def("open",
           [](Communicator& c, const std::string& handle) {
             const DeviceGuard guard(c.controller.options().device);
             return c.controller.open(handle);
           })
      .def("staging", [](const Communicator& c, int owner) { return c.controller.staging(owner); })
      .def("set_jitter_ns", [](Communicator& c, std::uint32_t ns) { c.controller.set_jitter(ns); })
      .def("epoch", [](const Communicator& c) { return c.controller.epoch(); })
      .def(
          "synchronize", [](const Communicator& c) { c.controller.synchronize(); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "reset", [](Communicator& c) { c.controller.reset(); }, py::call_guard<py::gil_scoped_release>())
      .def("close", [](Communicator& c) { c.controller.close(); }, py::call_guard<py::gil_scoped_release>());
}

void bind_functions(py::module_& m) {
  m.def(
      "export_memory",
      [](std::uint64_t address, int device) -> py::object {
        const DeviceGuard guard(device);
        const auto exported = export_memory(address);
        if (!exported) return py::none();
        return py::make_tuple(py::bytes(exported->handle), exported->offset, exported->base);
      },
      py::arg("address"), py::arg("device"),
      "(IPC handle, offset, base address here) of device memory, or None if it can't be exported.");
  m.def(
      "link",
      [](int device, int peer) -> std::string {
        if (device == peer) return "same-device";
        int access = 0, atomics = 0;
        EXTEND_ATTN_CUDA_CHECK(cudaDeviceCanAccessPeer(&access, device, peer));
        if (access == 0) return "none";
        EXTEND_ATTN_CUDA_CHECK(cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, device, peer));
        return atomics != 0 ? "nvlink" : "pcie";  // atomics on a peer's memory need NVLink
      },
      py::arg("device"), py::arg("peer"),
      "How two devices of this process reach each other: same-device, nvlink, pcie or none.");
  // Host parts, for tests on machines without a GPU.
  m.def("check_all_reduce", [](int op, int dtype, std::int64_t count, std::uint64_t input, std::uint64_t output,
                               int world, std::uint64_t max_bytes, std::uint64_t max_push_bytes) {
    check_call(AllReduceCall{as_op(op), as_dtype(dtype), input, output, count, -1, true},
               ControllerOptions{0, world, 0, max_bytes, max_push_bytes, 1});
  });
  m.def("check_tp_qknorm", [](int dtype, std::int64_t tokens, std::uint64_t q, std::int64_t q_width,
                              std::int64_t q_stride, std::uint64_t k, std::int64_t k_width, std::int64_t k_stride,
                              std::uint64_t q_weight, std::uint64_t k_weight, int world, std::uint64_t max_push_bytes) {
    check_call(QkNormCall{as_dtype(dtype), q, k, q_weight, k_weight, tokens, q_width, k_width, q_stride, k_stride, 0.f},
               ControllerOptions{0, world, 0, kVectorBytes, max_push_bytes, 1});
  });
  m.def("check_options",
        [](int rank, int world, std::uint64_t max_bytes, std::uint64_t max_push_bytes, std::uint64_t timeout_ns) {
          check_options(ControllerOptions{rank, world, 0, max_bytes, max_push_bytes, timeout_ns});
        });
  m.def("all_reduce_shape", [](int op, int dtype, std::int64_t count, int world, int max_blocks) {
    const LaunchShape shape = all_reduce_shape(as_op(op), as_dtype(dtype), count, world, max_blocks);
    return py::make_tuple(shape.blocks, shape.threads);
  });
  m.def("qknorm_shape", [](int dtype, std::int64_t tokens, std::int64_t q_width, std::int64_t k_width, int max_blocks) {
    const LaunchShape shape = qknorm_shape(as_dtype(dtype), tokens, q_width, k_width, max_blocks);
    return py::make_tuple(shape.blocks, shape.threads, team_warps(as_dtype(dtype), q_width, k_width));
  });
  m.def("layout", [](int world, std::uint64_t max_push_bytes, std::uint64_t max_bytes) {
    const Layout layout = make_layout(world, max_push_bytes, max_bytes);
    py::dict fields;
    fields["push_offset"] = kPushOffset;
    fields["push_stride"] = layout.push_stride;
    fields["staging_offset"] = layout.staging_offset;
    fields["total"] = layout.total;
    return fields;
  });
  m.def("pack_header", [](int op, int dtype, std::uint64_t size, std::uint32_t epoch) {
    return with_epoch(pack_call(static_cast<Op>(op), dtype, size), epoch);
  });
  m.def("pack_qknorm_size", &pack_qknorm_size);
  m.def("is_of_epoch", &is_of_epoch);
  m.def("describe_header", &describe_header);
}

}  // namespace
}  // namespace extend_attn

PYBIND11_MODULE(_comm, m) {
  m.doc() = "extend_attn's tensor-parallel kernels";
  py::register_local_exception<extend_attn::CudaError>(m, "CudaError", PyExc_RuntimeError);
  extend_attn::bind_build_info(m);
  extend_attn::bind_communicator(m);
  extend_attn::bind_functions(m);
  m.def(
      "check_aligned",
      [](std::uintptr_t pointer, std::size_t bytes) {
        extend_attn::check_aligned("pointer", reinterpret_cast<const void*>(pointer), bytes);
      },
      py::arg("pointer"), py::arg("bytes") = extend_attn::kVectorBytes,
      "ValueError unless the address `pointer` is a multiple of `bytes`.");
}
