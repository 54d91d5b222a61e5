// Element types: their numbers, and which of them this build holds. The build (python/extend_attn/jit/spec.py,
// CMakeLists.txt) defines the bits and leaves out the kernels' files of the other types.
#pragma once

#ifndef EXTEND_ATTN_DTYPE_BITS
#error "define EXTEND_ATTN_DTYPE_BITS (python/extend_attn/jit/spec.py does)"
#endif

// The level that the library states. A build system that adds its own default after it would go unnoticed otherwise.
static_assert(__cplusplus == 201703L, "csrc/ is C++17: compile it with -std=c++17");

namespace extend_attn {

// The bit numbers of EXTEND_ATTN_DTYPE_BITS, and the numbers by which Python names a type.
enum class DType : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

}  // namespace extend_attn
