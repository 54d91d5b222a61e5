// All kernels for fp32.
#include "register.cuh"

namespace extend_attn {
namespace {
[[maybe_unused]] const bool kRegistered = register_kernels<float>();
}  // namespace
}  // namespace extend_attn
