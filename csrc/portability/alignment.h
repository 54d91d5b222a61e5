// Whether a pointer may be read in vectors of `bytes`. The only place where alignment is tested, and by a cast to an
// integer that C++17 has: the C++20 cast of object representations needs libstdc++ 3.4.29 (gcc 11), and Debian 11
// builds this with gcc 10.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace extend_attn {

// Kernels read and write 16-byte vectors.
constexpr std::size_t kVectorBytes = 16;

inline bool is_aligned(const void* pointer, std::size_t bytes = kVectorBytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// Throws std::invalid_argument (ValueError in Python) that names the argument, its address and what to do.
inline void check_aligned(const char* name, const void* pointer, std::size_t bytes = kVectorBytes) {
  if (is_aligned(pointer, bytes)) return;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  throw std::invalid_argument(std::string(name) + ": got address " + std::to_string(address) + ", " +
                              std::to_string(address % bytes) + " bytes past a multiple of " + std::to_string(bytes) +
                              "; it must be aligned to " + std::to_string(bytes) +
                              " bytes (a slice that starts elsewhere needs .clone())");
}

}  // namespace extend_attn
