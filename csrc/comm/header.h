// The word by which ranks see that they are in the same call: what each is doing, in 64 bits, never 0.
//
//   bits  0..15  low half of the epoch     16..19  operation     20..23  type     24..63  size
// The size is the number of elements, or tokens and widths for tp_qknorm.
#pragma once

#include <cstdint>

#include "view.h"

namespace extend_attn {

enum class Op : std::uint32_t { kOneShotPush = 1, kOneShotPull = 2, kTwoShotPull = 3, kTpQkNorm = 4 };

constexpr int kHeaderSizeBits = 40;
constexpr std::uint64_t kMaxHeaderSize = (std::uint64_t(1) << kHeaderSizeBits) - 1;

EXTEND_ATTN_HD std::uint64_t pack_call(Op op, int dtype, std::uint64_t size) {
  return std::uint64_t(op) << 16 | std::uint64_t(dtype) << 20 | size << 24;
}
// tokens < 2^16; widths are multiples of 8 below 2^15.
EXTEND_ATTN_HD std::uint64_t pack_qknorm_size(std::uint64_t tokens, std::uint64_t q_width, std::uint64_t k_width) {
  return tokens | q_width / 8 << 16 | k_width / 8 << 28;
}
EXTEND_ATTN_HD std::uint64_t with_epoch(std::uint64_t call, std::uint32_t epoch) { return call | (epoch & 0xffffu); }

// Whether `header` was written in this epoch or later, so not left from the one two calls ago (or from the start: 0).
EXTEND_ATTN_HD bool is_of_epoch(std::uint64_t header, std::uint32_t epoch) {
  return header != 0 && std::uint16_t(header) != std::uint16_t(epoch - kEpochs);
}

}  // namespace extend_attn
