// All kernels for fp16.
#include "register.cuh"

namespace extend_attn {
namespace {
[[maybe_unused]] const bool kRegistered = register_kernels<__half>();
}  // namespace
}  // namespace extend_attn
