// Where the threads of a grid stand: the values of Metal's attributes.
#pragma once

#include <algorithm>

#include "fibers.hpp"

namespace shim {

inline uint volume(const uint3& size) { return size.x * size.y * size.z; }

inline uint3 unravel(uint index, const uint3& size) {
  return uint3(index % size.x, index / size.x % size.y, index / (size.x * size.y));
}

struct Grid {
  Grid(const uint (&threads)[3], const uint (&threads_per_group)[3]) {
    for (int i = 0; i < 3; i++) {
      size[i] = threads[i];
      threadgroup_size[i] = std::min(threads_per_group[i], threads[i]);
      num_threadgroups[i] = (size[i] + threadgroup_size[i] - 1) / threadgroup_size[i];
    }
  }

  // What the threads of one threadgroup share.
  Thread threadgroup(uint index) const {
    Thread group{};
    group.threads_per_grid = group.grid_size = size;
    group.grid_origin = uint3(0);
    group.threadgroups_per_grid = num_threadgroups;
    group.threadgroup_position_in_grid = unravel(index, num_threadgroups);
    uint3 origin = group.threadgroup_position_in_grid * threadgroup_size;
    for (int i = 0; i < 3; i++) {  // the last threadgroup of a grid may be smaller
      group.threads_per_threadgroup[i] =
          std::min(threadgroup_size[i], size[i] - origin[i]);
    }
    group.dispatch_threads_per_threadgroup = threadgroup_size;
    group.simdgroups_per_threadgroup = num_simdgroups(group.threads_per_threadgroup);
    group.dispatch_simdgroups_per_threadgroup = num_simdgroups(threadgroup_size);
    group.threads_per_simdgroup = group.thread_execution_width = lanes_per_simdgroup;
    return group;
  }

  // One thread of a threadgroup.
  Thread thread(const Thread& group, uint index) const {
    Thread thread = group;
    thread.thread_position_in_threadgroup =
        unravel(index, group.threads_per_threadgroup);
    thread.thread_position_in_grid =
        group.threadgroup_position_in_grid * threadgroup_size +
        thread.thread_position_in_threadgroup;
    thread.thread_index_in_threadgroup = index;
    thread.thread_index_in_simdgroup = index % lanes_per_simdgroup;
    thread.simdgroup_index_in_threadgroup = index / lanes_per_simdgroup;
    return thread;
  }

  uint3 size;
  uint3 threadgroup_size;
  uint3 num_threadgroups;

 private:
  static uint num_simdgroups(const uint3& threads) {
    return (volume(threads) + lanes_per_simdgroup - 1) / lanes_per_simdgroup;
  }
};

}  // namespace shim
