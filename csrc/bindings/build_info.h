// What a module was built from: read by the loader to decide whether an installed module serves a request, by `jit
// info`, and by the build check of Debian 11.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "../portability/selection.h"

#ifndef EXTEND_ATTN_SOURCE_HASH
#define EXTEND_ATTN_SOURCE_HASH ""
#endif
#ifndef EXTEND_ATTN_ARCHS
#define EXTEND_ATTN_ARCHS ""
#endif

namespace extend_attn {

inline void bind_build_info(pybind11::module_& m) {
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = __VERSION__;
#ifdef __GLIBCXX__
        info["libstdcxx"] = __GLIBCXX__;
#endif
        info["cplusplus"] = __cplusplus;
        info["cudart"] = CUDART_VERSION;
        info["archs"] = EXTEND_ATTN_ARCHS;
        info["dtype_bits"] = EXTEND_ATTN_DTYPE_BITS;
        info["source_hash"] = EXTEND_ATTN_SOURCE_HASH;
        return info;
      },
      "What this module was built from: compiler, libstdcxx (its date), cplusplus, cudart, archs, dtype_bits, "
      "source_hash.");
}

}  // namespace extend_attn
