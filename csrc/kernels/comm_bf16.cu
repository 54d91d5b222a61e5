// All kernels for bf16.
#include "register.cuh"

namespace extend_attn {
namespace {
[[maybe_unused]] const bool kRegistered = register_kernels<__nv_bfloat16>();
}  // namespace
}  // namespace extend_attn
