// Runs the threads of a grid as fibers of one OS thread.
//
// Threadgroups run one after the other. Within one, each thread is a fiber that runs
// until it waits: at a threadgroup barrier, or at a simdgroup's barrier or function,
// where lanes also exchange values. The scheduler picks who runs next from a seeded
// random source, so a kernel that is not ordered by its barriers gives different results
// for different seeds.
//
// What a GPU leaves undefined is made to fail: memory that nobody wrote is 0xFF (a NaN,
// or -1), arrays lie against pages that no one may touch, and a barrier or simd function
// that some threads do not reach stops the launch with its place in the text.
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <numeric>
#include <string>
#include <vector>

#include "counts.hpp"
#include "fibers.hpp"
#include "grid.hpp"
#include "memory.hpp"
#include "tsan.hpp"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace shim {

int noise_ulps = 0;

namespace {

constexpr size_t stack_bytes = 256 << 10;
constexpr size_t threadgroup_bytes = 32 << 10;  // what every Apple GPU has
constexpr unsigned tsan_no_sync = 1;  // switching fibers orders nothing
constexpr size_t most_tsan_fibers = 7000;

// 64 random bits per call (xorshift).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}

  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  uint below(uint end) { return static_cast<uint>(next() % end); }

  void shuffle(std::vector<uint>& values) {
    for (size_t i = values.size(); i > 1; i--) {
      std::swap(values[i - 1], values[below(static_cast<uint>(i))]);
    }
  }

 private:
  uint64_t state_;
};

std::vector<uint> shuffled(uint first, uint end, Random& random) {
  std::vector<uint> order(end - first);
  std::iota(order.begin(), order.end(), first);
  random.shuffle(order);
  return order;
}

// Where a fiber, or the scheduler, has left off. swapcontext asks the system for the
// signal mask every time, which takes most of a launch; ThreadSanitizer knows only that.
struct Point {
  ucontext_t context;
  jmp_buf registers;
};

[[gnu::noinline]] void switch_fibers(Point& from, Point& to) {
  if constexpr (tsan) {
    swapcontext(&from.context, &to.context);
  } else if (!_setjmp(from.registers)) {
    _longjmp(to.registers, 1);
  }
}

// The same, to a fiber that has not begun.
[[gnu::noinline]] void switch_to_start(Point& from, Point& to) {
  if constexpr (tsan) {
    swapcontext(&from.context, &to.context);
  } else if (!_setjmp(from.registers)) {
    setcontext(&to.context);
  }
}

enum class State { fresh, ready, in_simdgroup, in_threadgroup, returned };

struct Fiber {
  Point point;
  void* tsan_fiber;
  State state;
  uint index;
  uint simdgroup;
  const char* operation;  // what it waits in, and where that stands in the text
  Place place;
  Value given;

  bool can_run() const { return state == State::fresh || state == State::ready; }
  std::string where() const {
    return std::string(operation) + " at " + place.file_name() + ":" +
           std::to_string(place.line()) + " (thread " + std::to_string(index) + ")";
  }
  bool waits_with(const Fiber& other) const {
    return state == other.state && place.line() == other.place.line() &&
           place.column() == other.place.column() &&
           !strcmp(operation, other.operation);
  }
};

struct Buffer {
  const char* name;
  void* data;
  size_t size;
  int is_output;
};

struct Settings {
  uint grid[3];
  uint threadgroup[3];
  uint64_t seed;
  int noise_ulps;
  int time_limit_s;  // of processor time
};

class Launch {
 public:
  Launch(const Settings& settings, const Buffer* buffers, int num_buffers)
      : grid_(settings.grid, settings.threadgroup),
        random_(settings.seed),
        time_limit_s_(settings.time_limit_s) {
    for (int i = 0; i < num_buffers; i++) {
      GuardedMemory& memory = buffers_.emplace_back(buffers[i].name, 0, buffers[i].size);
      pointers_.push_back(memory.data);
      if (!buffers[i].is_output) {
        memcpy(memory.data, buffers[i].data, buffers[i].size);
        memory.protect(PROT_READ);
      }
    }
    uint largest_group = volume(grid_.threadgroup_size);
    fibers_.resize(largest_group);
    stacks_size_ = largest_group * stack_bytes;
    stacks_ = static_cast<char*>(mmap(
        nullptr, stacks_size_, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (uint i = 0; i < largest_group; i++) {
      mprotect(stacks_ + i * stack_bytes, page_bytes, PROT_NONE);
    }
  }
  Launch(const Launch&) = delete;
  ~Launch() {
    destroy_fibers();
    munmap(stacks_, stacks_size_);
  }

  // Runs the grid; an empty text, or what went wrong.
  std::string run() {
    pthread_sigmask(SIG_SETMASK, nullptr, &signal_mask_);
    scheduler_tsan_ = __tsan_get_current_fiber();
    for (uint group : shuffled(0, volume(grid_.num_threadgroups), random_)) {
      run_threadgroup(group);
      check_padding(threadgroup_arrays_);
      if (!error_.empty()) return error_;
    }
    __tsan_acquire(&end_);
    check_padding(buffers_);
    return error_;
  }

  void copy_outputs(const Buffer* buffers) {
    for (size_t i = 0; i < buffers_.size(); i++) {
      const Buffer& buffer = buffers[i];
      if (buffer.is_output) memcpy(buffer.data, buffers_[i].data, buffer.size);
    }
  }

  // --- called by the running fiber

  Fiber& current() { return *current_; }

  // Never returns to the fiber if the launch fails meanwhile.
  void wait(State state, const char* operation, const Place& place) {
    current_->state = state;
    current_->operation = operation;
    current_->place = place;
    count_call(operation);
    __tsan_switch_to_fiber(scheduler_tsan_, tsan_no_sync);
    switch_fibers(current_->point, scheduler_);
  }

  const Exchange& exchanged() { return exchanges_[current_->simdgroup]; }
  void* simdgroup_barrier() { return &simdgroup_barriers_[current_->simdgroup]; }
  void* threadgroup_barrier() { return &threadgroup_barrier_; }

  void* threadgroup_memory(uint size, const char* name, uint line) {
    for (GuardedMemory& array : threadgroup_arrays_) {
      if (array.line == line && !strcmp(array.name, name)) return array.data;
    }
    threadgroup_used_ += round_up(size, 16);
    if (threadgroup_used_ > threadgroup_bytes) {
      fail("threadgroup memory must be at most 32 KiB: got " +
           std::to_string(threadgroup_used_) + " bytes");
    }
    return threadgroup_arrays_.emplace_back(name, line, size).data;
  }

  // Stops the launch; `place` is of the access. Never returns.
  void stop(const std::string& what, const void* address, const std::string& place) {
    std::string thread = " (thread " + std::to_string(current_->index) + ")";
    fail(what + " at " + place + ": " + described(address) + thread);
    wait(State::returned, "stop", Place());
    abort();
  }

  // --- called by signal handlers

  bool is_in_fiber() const { return current_ != nullptr; }
  pthread_t os_thread() const { return os_thread_; }

  [[noreturn]] void abandon_fiber(int signal, const void* address) {
    signal_ = signal;
    fault_ = static_cast<const char*>(address);
    pthread_sigmask(SIG_SETMASK, &signal_mask_, nullptr);
    _longjmp(scheduler_.registers, 1);
  }

 private:
  void fail(const std::string& message) {
    if (error_.empty()) error_ = message;
  }

  static void start_fiber();

  void begin_fibers(uint group) {
    group_ = grid_.threadgroup(group);
    num_threads_ = volume(group_.threads_per_threadgroup);
    num_simdgroups_ = group_.simdgroups_per_threadgroup;
    exchanges_.assign(num_simdgroups_, Exchange{});
    simdgroup_barriers_.assign(num_simdgroups_, 0);
    threadgroup_arrays_.clear();
    threadgroup_used_ = 0;
    // Fibers see what the host wrote, but not what earlier threadgroups did: on a GPU
    // threadgroups run at the same time.
    __tsan_release(&start_);
    keep_fibers(num_threads_);
    for (uint i = 0; i < num_threads_; i++) begin_fiber(i);
  }

  void begin_fiber(uint index) {
    Fiber& fiber = fibers_[index];
    ucontext_t& start = fiber.point.context;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks_ + index * stack_bytes;
    start.uc_stack.ss_size = stack_bytes;
    start.uc_link = nullptr;
    makecontext(&start, start_fiber, 0);
    fiber.tsan_fiber = __tsan_create_fiber(0);
    tsan_fibers_.push_back(fiber.tsan_fiber);
    fiber.state = State::fresh;
    fiber.index = index;
    fiber.simdgroup = index / lanes_per_simdgroup;
  }

  void run_threadgroup(uint group) {
    begin_fibers(group);
    num_running_ = num_threads_;
    while (num_running_ > 0 && error_.empty()) {
      // 0: every simdgroup to its next wait; 1: each as far as it gets; 2: by coin.
      uint policy = random_.below(3);
      bool moved = false;
      for (uint simdgroup : shuffled(0, num_simdgroups_, random_)) {
        bool again = error_.empty();
        while (again && advance(simdgroup)) {
          moved = true;
          again = error_.empty() && (policy == 1 || (policy == 2 && random_.below(2)));
        }
      }
      if (!moved && error_.empty() && !release_threadgroup()) {
        fail("deadlock: no thread can go on");
      }
    }
  }

  // ThreadSanitizer gives the number of a destroyed fiber to a new one, and then takes
  // both for one thread: fibers live on as long as it has numbers, so that it sees races
  // between threadgroups.
  void keep_fibers(uint num_new) {
    if (tsan_fibers_.size() + num_new > most_tsan_fibers) destroy_fibers();
  }

  void destroy_fibers() {
    for (void* fiber : tsan_fibers_) __tsan_destroy_fiber(fiber);
    tsan_fibers_.clear();
  }

  // Runs the lanes that can run, or else lets them out of a simd function that all have
  // reached; false if they cannot move.
  bool advance(uint simdgroup) {
    uint first = simdgroup * lanes_per_simdgroup;
    uint end = std::min(first + lanes_per_simdgroup, num_threads_);
    bool moved = false;
    for (uint i : shuffled(first, end, random_)) {
      if (!fibers_[i].can_run()) continue;
      resume(fibers_[i]);
      moved = true;
      if (!error_.empty()) return true;
    }
    return moved || release_simdgroup(first, end);
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    __tsan_switch_to_fiber(fiber.tsan_fiber, tsan_no_sync);
    if (fiber.state == State::fresh) {
      switch_to_start(scheduler_, fiber.point);
    } else {
      switch_fibers(scheduler_, fiber.point);
    }
    current_ = nullptr;
    if (fiber.state == State::returned) num_running_--;
    if (signal_) fail(describe_signal(fiber));
  }

  bool release_simdgroup(uint first, uint end) {
    Fiber* waiting = nullptr;
    for (uint i = first; i < end && !waiting; i++) {
      if (fibers_[i].state == State::in_simdgroup) waiting = &fibers_[i];
    }
    if (!waiting) return false;

    if (!all_wait_with(*waiting, first, end)) return true;
    Exchange& exchange = exchanges_[waiting->simdgroup];
    exchange.active = 0;
    for (uint i = first; i < end; i++) {
      Fiber& lane = fibers_[i];
      exchange.active |= 1u << (i - first);
      exchange.values[i - first] = lane.given;
      lane.state = State::ready;
    }
    return true;
  }

  bool release_threadgroup() {
    Fiber* waiting = nullptr;
    for (uint i = 0; i < num_threads_ && !waiting; i++) {
      if (fibers_[i].state == State::in_threadgroup) waiting = &fibers_[i];
    }
    if (!waiting) return false;
    if (!all_wait_with(*waiting, 0, num_threads_)) return true;
    for (uint i = 0; i < num_threads_; i++) fibers_[i].state = State::ready;
    return true;
  }

  // Whether these threads wait where one of them does; or else the launch has failed.
  bool all_wait_with(const Fiber& waiting, uint first, uint end) {
    for (uint i = first; i < end; i++) {
      const Fiber& other = fibers_[i];
      if (other.waits_with(waiting)) continue;
      fail("divergent " + waiting.where() + ": " +
           (other.state == State::returned
                ? "thread " + std::to_string(i) + " has returned"
                : "another thread waits in " + other.where()));
      return false;
    }
    return true;
  }

  std::string describe_signal(const Fiber& fiber) {
    std::string thread = " (thread " + std::to_string(fiber.index) + ")";
    if (signal_ == SIGFPE) return "division of an integer by zero" + thread;
    if (signal_ == SIGVTALRM) {
      return "the launch must end within " + std::to_string(time_limit_s_) +
             " s of processor time: a loop does not end, or waits for another" + thread;
    }
    char* stack = stacks_ + fiber.index * stack_bytes;
    if (fault_ >= stack && fault_ < stack + page_bytes) {
      return "the stack of a thread must be at most 256 KiB" + thread;
    }
    return "memory fault: " + described(fault_) + thread;
  }

  std::string described(const void* address) const {
    const char* byte = static_cast<const char*>(address);
    for (auto* arrays : {&buffers_, &threadgroup_arrays_}) {
      for (const GuardedMemory& array : *arrays) {
        if (!array.contains(byte)) continue;
        return array.described() + " at byte " + std::to_string(byte - array.data) +
               " of " + std::to_string(array.size);
      }
    }
    return "an address outside every array";
  }

  void check_padding(const std::deque<GuardedMemory>& arrays) {
    for (const GuardedMemory& array : arrays) {
      if (!array.padding_is_intact()) {
        fail("memory fault: " + array.described() +
             " written up to 16 bytes past its end");
      }
    }
  }

  const Grid grid_;
  Random random_;
  const int time_limit_s_;
  const pthread_t os_thread_ = pthread_self();
  std::string error_;
  volatile int signal_ = 0;
  const char* volatile fault_ = nullptr;

  std::deque<GuardedMemory> buffers_;
  std::vector<void*> pointers_;
  std::deque<GuardedMemory> threadgroup_arrays_;
  size_t threadgroup_used_ = 0;

  Thread group_{};  // what the threads of the running threadgroup share
  uint num_threads_ = 0;
  uint num_simdgroups_ = 0;
  uint num_running_ = 0;

  std::vector<Fiber> fibers_;
  std::vector<Exchange> exchanges_;
  char* stacks_ = nullptr;
  size_t stacks_size_ = 0;
  Point scheduler_;
  sigset_t signal_mask_;
  Fiber* volatile current_ = nullptr;

  // Addresses by which ThreadSanitizer knows who waited for whom.
  void* scheduler_tsan_ = nullptr;
  std::vector<void*> tsan_fibers_;
  char start_ = 0;
  char end_ = 0;
  char threadgroup_barrier_ = 0;
  std::vector<char> simdgroup_barriers_;
};

Launch* launch = nullptr;

void Launch::start_fiber() {
  __tsan_acquire(&launch->start_);
  Thread thread = launch->grid_.thread(launch->group_, launch->current().index);
  thread.buffers = launch->pointers_.data();
  run_thread(thread);
  __tsan_release(&launch->end_);
  launch->wait(State::returned, "return", Place());
  abort();  // nobody resumes a thread that has returned
}

// Turns a fault in a kernel into an error of the launch; faults elsewhere stay what they
// were. Not under ThreadSanitizer, which has handlers of its own.
class SignalHandlers {
 public:
  explicit SignalHandlers(int time_limit_s) {
    if (tsan) return;
    stack_t own{};
    own.ss_sp = stack_;
    own.ss_size = sizeof(stack_);
    sigaltstack(&own, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < num_signals; i++) sigaction(signals[i], &action, &old_[i]);
    set_timer(time_limit_s);
  }
  ~SignalHandlers() {
    if (tsan) return;
    set_timer(0);
    for (int i = 0; i < num_signals; i++) sigaction(signals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int num_signals = 4;
  static constexpr int signals[num_signals] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};

  // Again every 10 ms: the first signal may come while no fiber runs.
  static void set_timer(int seconds) {
    itimerval timer{};
    timer.it_value.tv_sec = seconds;
    timer.it_interval.tv_usec = seconds ? 10000 : 0;
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  }

  static void handle(int signal, siginfo_t* info, void*) {
    bool is_timer = signal == SIGVTALRM;
    if (is_timer && !pthread_equal(pthread_self(), launch->os_thread())) {
      pthread_kill(launch->os_thread(), signal);
    } else if (launch->is_in_fiber()) {
      launch->abandon_fiber(signal, info->si_addr);
    } else if (!is_timer) {
      ::signal(signal, SIG_DFL);
    }
  }

  alignas(16) char stack_[64 << 10];
  stack_t old_stack_;
  struct sigaction old_[num_signals];
};

// Apple's GPUs take denormal numbers for zero.
class FlushToZero {
 public:
#if defined(__x86_64__)
  FlushToZero() : old_(_mm_getcsr()) { _mm_setcsr(old_ | 0x8040); }
  ~FlushToZero() { _mm_setcsr(old_); }

 private:
  unsigned old_;
#endif
};

}  // namespace

// ------------------------------------------------------------ the kernel's side

const Exchange& exchange(
    const Value& value, const char* function, const Place& place) {
  launch->current().given = value;
  launch->wait(State::in_simdgroup, function, place);
  return launch->exchanged();
}

void wait_for_simdgroup(bool orders_memory, const Place& place) {
  if (orders_memory) __tsan_release(launch->simdgroup_barrier());
  launch->wait(State::in_simdgroup, "simdgroup_barrier", place);
  if (orders_memory) __tsan_acquire(launch->simdgroup_barrier());
}

void wait_for_threadgroup(bool orders_memory, const Place& place) {
  if (orders_memory) __tsan_release(launch->threadgroup_barrier());
  launch->wait(State::in_threadgroup, "threadgroup_barrier", place);
  if (orders_memory) __tsan_acquire(launch->threadgroup_barrier());
}

uint current_lane() { return launch->current().index % lanes_per_simdgroup; }

void* threadgroup_memory(uint size, const char* name, uint line) {
  return launch->threadgroup_memory(size, name, line);
}

float with_noise(float result, float argument) {
  if (result == 0 || !__builtin_isfinite(result)) return result;
  // A fixed mixture of the argument's bits (splitmix64) says how many ulps to add.
  uint64_t mixed = std::bit_cast<uint32_t>(argument) + 0x9E3779B97F4A7C15u;
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBu;
  mixed ^= mixed >> 31;
  int ulps = static_cast<int>(mixed % (2 * noise_ulps + 1)) - noise_ulps;
  return std::bit_cast<float>(std::bit_cast<int32_t>(result) + ulps);
}

// What g++ has a kernel call where an address is no multiple of what its type needs.
struct AccessPlace {
  const char* file;
  uint line;
  uint column;
  const void* type;
  uint8_t log2_alignment;
};
extern "C" void __ubsan_handle_type_mismatch_v1(
    const AccessPlace* access, const void* address) {
  launch->stop(
      "an address must be a multiple of " +
          std::to_string(1u << access->log2_alignment),
      address, std::string(access->file) + ":" + std::to_string(access->line));
}

// -------------------------------------------------------------- the host's side

// Runs a grid; outputs are filled. Returns 0, or 1 with what went wrong in `message`.
extern "C" __attribute__((visibility("default"))) int shim_launch(
    const Settings* settings,
    const Buffer* buffers,
    int num_buffers,
    char* message,
    size_t message_size) {
  Launch running(*settings, buffers, num_buffers);
  launch = &running;
  noise_ulps = settings->noise_ulps;
  std::string error;
  {
    FlushToZero flush;
    SignalHandlers handlers(settings->time_limit_s);
    error = running.run();
  }
  launch = nullptr;
  running.copy_outputs(buffers);
  strncpy(message, error.c_str(), message_size - 1);
  return error.empty() ? 0 : 1;
}

}  // namespace shim
