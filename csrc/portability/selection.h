// What this build holds: the world sizes and element types that it was asked for. The build
// (python/extend_attn/jit/spec.py, CMakeLists.txt) defines both numbers; instantiate and dispatch by asking here, so
// that what is not needed costs no build time.
#pragma once

#if !defined(EXTEND_ATTN_WORLD_SIZE_BITS) || !defined(EXTEND_ATTN_DTYPE_BITS)
#error "define EXTEND_ATTN_WORLD_SIZE_BITS and EXTEND_ATTN_DTYPE_BITS (python/extend_attn/jit/spec.py does)"
#endif

// The level that the library states. A build system that adds its own default after it would go unnoticed otherwise.
static_assert(__cplusplus == 201703L, "csrc/ is C++17: compile it with -std=c++17");

namespace extend_attn {

// The bit numbers of EXTEND_ATTN_DTYPE_BITS, and the numbers by which Python names a type.
enum class DType : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

constexpr bool has_world_size(int n) { return (EXTEND_ATTN_WORLD_SIZE_BITS >> n) & 1; }
constexpr bool has_dtype(DType dtype) { return (EXTEND_ATTN_DTYPE_BITS >> static_cast<int>(dtype)) & 1; }

}  // namespace extend_attn
