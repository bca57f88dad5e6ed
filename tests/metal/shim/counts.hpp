// What a counting build counts (counts.cpp), and what its kernel and runtime tell of.
//
// Without SHIM_COUNTS the runtime tells nobody.
#pragma once

#include "fibers.hpp"

namespace shim {

#if defined(SHIM_COUNTS)

enum Operation {
  fused_multiply_add,
  add,  // and subtract
  multiply,
  divide,
  compare,
  function,  // exp, log, ...
  from_integer,
  from_short,  // half or bfloat to float
  to_integer,
  to_short,
  logic,  // of words: and, or, xor, not
  shift,
  pack,  // two halves of a word into a float
  num_operations,
};

// Executions by lanes.
extern uint64_t operations[num_operations];
inline void count(Operation operation) { operations[operation]++; }

// One lane loads or stores `size` bytes at an offset of a buffer.
void count_access(
    const Thread& lane, uint buffer, uint64_t offset, uint size, bool is_store,
    const Place& place);

// One lane calls a barrier or a simd function.
void count_call(const char* name);

#else

inline void count_call(const char*) {}

#endif

}  // namespace shim
