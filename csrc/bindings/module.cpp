// The pybind11 module: raw pointers, sizes and streams as integers, no torch header, so that no build depends on torch's ABI.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../portability/alignment.h"
#include "build_info.h"

namespace py = pybind11;

PYBIND11_MODULE(_comm, m) {
  m.doc() = "extend_attn's tensor-parallel kernels";
  extend_attn::bind_build_info(m);
  m.def(
      "check_aligned",
      [](std::uintptr_t pointer, std::size_t bytes) {
        extend_attn::check_aligned("pointer", reinterpret_cast<const void*>(pointer), bytes);
      },
      py::arg("pointer"), py::arg("bytes") = extend_attn::kVectorBytes,
      "ValueError unless the address `pointer` is a multiple of `bytes`.");
}
