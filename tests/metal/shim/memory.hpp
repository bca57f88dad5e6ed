// Arrays that a kernel cannot leave unnoticed.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <string>

#include "tsan.hpp"
#include "types.hpp"

namespace shim {

constexpr size_t page_bytes = 64 << 10;  // or a part of it, whatever the system
constexpr size_t guard_bytes = tsan ? 1 << 20 : 16 << 20;

inline size_t round_up(size_t size, size_t unit) {
  return (size + unit - 1) / unit * unit;
}

// Memory that ends (up to 16 bytes of alignment) where an inaccessible page begins.
class GuardedMemory {
 public:
  GuardedMemory(const char* name, uint line, size_t size)
      : name(name),
        line(line),
        size(size),
        inner_(round_up(std::max<size_t>(size, 1), page_bytes)) {
    base_ = static_cast<char*>(mmap(
        nullptr, inner_ + 2 * guard_bytes, PROT_NONE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    protect(PROT_READ | PROT_WRITE);
    data = base_ + guard_bytes + inner_ - round_up(size, 16);
    // Not memset: ThreadSanitizer would take it for a write of the running thread.
    for (char* p = data; p < end(); p++) *static_cast<volatile char*>(p) = -1;
  }
  GuardedMemory(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(base_, inner_ + 2 * guard_bytes); }

  void protect(int protection) { mprotect(base_ + guard_bytes, inner_, protection); }

  bool contains(const char* address) const {
    return address >= base_ && address < base_ + inner_ + 2 * guard_bytes;
  }

  // Whether the bytes between the array and the inaccessible page are as they were.
  bool padding_is_intact() const {
    return std::all_of(data + size, end(), [](char byte) { return byte == -1; });
  }

  std::string described() const {
    std::string quoted = "'" + std::string(name) + "'";
    if (!line) return "buffer " + quoted;
    return "threadgroup array " + quoted + " of kernel:" + std::to_string(line);
  }

  const char* const name;
  const uint line;  // of its declaration; 0 for a buffer
  const size_t size;
  char* data;

 private:
  char* end() const { return base_ + guard_bytes + inner_; }

  size_t inner_;
  char* base_;
};

}  // namespace shim
