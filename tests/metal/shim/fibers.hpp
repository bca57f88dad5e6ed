// What a kernel asks of the runtime (runtime.cpp), and what the runtime asks of it.
#pragma once

#include <source_location>

#include "types.hpp"

namespace shim {

using Place = std::source_location;

constexpr uint lanes_per_simdgroup = 32;

// What one lane gives to a simd function: of any type, in the first bytes.
struct Value {
  alignas(16) unsigned char bytes[32];
};

// What the lanes of one simdgroup brought to one call of a simd function.
struct Exchange {
  uint32_t active;  // bit i: lane i takes part
  Value values[lanes_per_simdgroup];
};

// Each of these returns when every thread that has to be there has arrived.
const Exchange& exchange(
    const Value& value, const char* function, const Place& place);
void wait_for_simdgroup(bool orders_memory, const Place& place);
void wait_for_threadgroup(bool orders_memory, const Place& place);

// The lane of the running thread.
uint current_lane();

// Storage of one `threadgroup` declaration, the same for all threads of a threadgroup.
// Line and name tell the declarations of a kernel apart.
void* threadgroup_memory(uint size, const char* name, uint line);

// The largest error of transcendental functions in ulps, and one result with an error
// up to that. It depends on the argument only: hardware gives one result for one
// argument too.
extern int noise_ulps;
float with_noise(float result, float argument);

// One thread of the grid. The fields after `buffers` have the names of the attributes
// that Metal gives to a kernel's arguments.
struct Thread {
  void* const* buffers;
  uint3 thread_position_in_grid;
  uint3 thread_position_in_threadgroup;
  uint3 threadgroup_position_in_grid;
  uint3 threads_per_grid;
  uint3 threadgroups_per_grid;
  uint3 threads_per_threadgroup;
  uint3 dispatch_threads_per_threadgroup;
  uint3 grid_size;
  uint3 grid_origin;
  uint thread_index_in_threadgroup;
  uint thread_index_in_simdgroup;
  uint simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup;
  uint dispatch_simdgroups_per_threadgroup;
  uint threads_per_simdgroup;
  uint thread_execution_width;
};

// Calls the kernel with its arguments; build.py writes it from the kernel's signature.
void run_thread(const Thread& thread);

}  // namespace shim
