// Counts what a kernel loads, stores and computes.
//
// A site is a place in the text that accesses a buffer. The k-th executions of a site by
// the lanes of a simdgroup are one instruction of the GPU: it touches so many lines of
// 128 bytes. Threadgroups run one after another, so instructions of one are kept until
// the next begins.
#include "counts.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace shim {

uint64_t operations[num_operations];

namespace {

constexpr const char* operation_names[num_operations] = {
    "fma",          "add",        "multiply",   "divide",   "compare", "function",
    "from_integer", "from_short", "to_integer", "to_short", "logic",   "shift",
    "pack"};
constexpr uint64_t line_bytes = 128;
constexpr int num_widths = 5;  // 1, 2, 4, 8, 16 bytes

// Lines that one instruction of a simdgroup touches.
struct Instruction {
  uint count = 0;
  uint lines[2 * lanes_per_simdgroup];

  void touch(uint line) {
    for (uint i = count; i > 0; i--) {
      if (lines[i - 1] == line) return;
    }
    lines[count++] = line;
  }
};

// Loads of one buffer, or its stores.
struct Accesses {
  explicit Accesses(size_t size) : bytes_seen((size + 63) / 64) {}

  // Accesses are aligned to their width, so their bytes are bits of one word.
  void see(uint64_t offset, uint size) {
    by_width[std::countr_zero(size)]++;
    uint64_t bits = ((uint64_t{1} << size) - 1) << offset % 64;
    uint64_t& word = bytes_seen[offset / 64];
    unique_bytes += std::popcount(bits & ~word);
    word |= bits;
  }

  void finish(const Instruction& instruction) {
    instructions++;
    lines += instruction.count;
    most_lines = std::max<uint64_t>(most_lines, instruction.count);
  }

  std::string json() const {
    std::string text = "{\"by_width\": {";
    for (int i = 0; i < num_widths; i++) {
      text += (i ? ", \"" : "\"") + std::to_string(1 << i) +
              "\": " + std::to_string(by_width[i]);
    }
    return text + "}, \"unique_bytes\": " + std::to_string(unique_bytes) +
           ", \"instructions\": " + std::to_string(instructions) +
           ", \"lines\": " + std::to_string(lines) +
           ", \"most_lines\": " + std::to_string(most_lines) + "}";
  }

  uint64_t by_width[num_widths] = {};
  std::vector<uint64_t> bytes_seen;  // a bit for each
  uint64_t unique_bytes = 0;
  uint64_t instructions = 0;
  uint64_t lines = 0;
  uint64_t most_lines = 0;
};

struct Buffer {
  size_t size;
  Accesses loads;
  Accesses stores;
};

struct Site {
  uint buffer;
  bool is_store;
  std::vector<uint> executions;                       // of each thread
  std::vector<std::vector<Instruction>> instructions;  // of each simdgroup
};

class Counts {
 public:
  void start(const size_t* sizes, int num_buffers) {
    buffers_.clear();
    for (int i = 0; i < num_buffers; i++) {
      buffers_.push_back({sizes[i], Accesses(sizes[i]), Accesses(sizes[i])});
    }
    sites_.clear();
    calls_.clear();
    std::fill(std::begin(operations), std::end(operations), 0);
  }

  void access(
      const Thread& lane, uint buffer, uint64_t offset, uint size, bool is_store,
      const Place& place) {
    const uint3& at = lane.threadgroup_position_in_grid;
    if (at.x != group_.x || at.y != group_.y || at.z != group_.z) {
      finish_threadgroup();
      group_ = at;
    }
    Buffer& accessed = buffers_[buffer];
    // What lies outside or is not aligned is for the access itself to fail.
    if (offset >= accessed.size || offset % size) return;
    (is_store ? accessed.stores : accessed.loads).see(offset, size);

    Site& site = site_at(buffer, size, is_store, place);
    uint thread_id = lane.thread_index_in_threadgroup;
    grow(site.executions, thread_id);
    uint turn = site.executions[thread_id]++;
    grow(site.instructions, lane.simdgroup_index_in_threadgroup);
    auto& instructions = site.instructions[lane.simdgroup_index_in_threadgroup];
    grow(instructions, turn);
    instructions[turn].touch(static_cast<uint>(offset / line_bytes));
  }

  void call(const char* name) { calls_[name]++; }

  std::string json() {
    finish_threadgroup();
    std::string text = "{\"buffers\": [";
    for (size_t i = 0; i < buffers_.size(); i++) {
      text += (i ? ", " : "") + std::string("{\"loads\": ") + buffers_[i].loads.json() +
              ", \"stores\": " + buffers_[i].stores.json() + "}";
    }
    text += "], \"operations\": {";
    for (int i = 0; i < num_operations; i++) {
      text += (i ? ", \"" : "\"") + std::string(operation_names[i]) +
              "\": " + std::to_string(operations[i]);
    }
    text += "}, \"calls\": {";
    for (auto& [name, count] : calls_) {
      text += (text.back() == '{' ? "\"" : ", \"") + std::string(name) +
              "\": " + std::to_string(count);
    }
    return text + "}}";
  }

 private:
  template <class T>
  static void grow(std::vector<T>& values, size_t index) {
    if (values.size() <= index) values.resize(index + 1);
  }

  Site& site_at(uint buffer, uint size, bool is_store, const Place& place) {
    uint64_t key = uint64_t{place.line()} << 32 | uint64_t{place.column()} << 16 |
                   buffer << 8 | size << 1 | is_store;
    auto [found, is_new] = sites_.try_emplace(key);
    if (is_new) {
      found->second.buffer = buffer;
      found->second.is_store = is_store;
    }
    return found->second;
  }

  void finish_threadgroup() {
    for (auto& [key, site] : sites_) {
      Buffer& buffer = buffers_[site.buffer];
      Accesses& accesses = site.is_store ? buffer.stores : buffer.loads;
      for (auto& instructions : site.instructions) {
        for (const Instruction& each : instructions) {
          if (each.count) accesses.finish(each);
        }
        instructions.clear();
      }
      std::fill(site.executions.begin(), site.executions.end(), 0);
    }
  }

  std::vector<Buffer> buffers_;
  std::unordered_map<uint64_t, Site> sites_;
  std::map<std::string, uint64_t> calls_;
  uint3 group_ = uint3(0);
};

Counts counts;

}  // namespace

void count_access(
    const Thread& lane, uint buffer, uint64_t offset, uint size, bool is_store,
    const Place& place) {
  counts.access(lane, buffer, offset, size, is_store, place);
}

void count_call(const char* name) { counts.call(name); }

// -------------------------------------------------------------- the host's side

// Forgets what was counted, before a launch on buffers of these sizes.
extern "C" __attribute__((visibility("default"))) void shim_start_counts(
    const size_t* sizes, int num_buffers) {
  counts.start(sizes, num_buffers);
}

// What was counted, as JSON; false if it does not fit.
extern "C" __attribute__((visibility("default"))) int shim_counts(
    char* text, size_t size) {
  std::string json = counts.json();
  if (json.size() >= size) return 0;
  memcpy(text, json.c_str(), json.size() + 1);
  return 1;
}

}  // namespace shim
