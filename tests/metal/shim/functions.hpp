// The functions of the Metal standard library that a kernel may call.
//
// What is missing here does not compile; add it when a kernel needs it, and to lint.hpp.
#pragma once

#include "fibers.hpp"

namespace metal {

// ------------------------------------------------------------------------ numbers

// Apple's transcendental functions are not correctly rounded: `noise_ulps` widens them.
inline float shim_result(float result, float argument) {
  return shim::noise_ulps ? shim::with_noise(result, argument) : result;
}

#define SHIM_FUNCTION(name, formula)                                               \
  inline float name(float x) { return shim_result(formula, x); }                   \
  inline half name(half x) { return static_cast<half>(name(static_cast<float>(x))); } \
  inline bfloat name(bfloat x) { return bfloat(name(static_cast<float>(x))); }     \
  template <int N>                                                                 \
  vec<float, N> name(vec<float, N> x) {                                            \
    for (int i = 0; i < N; i++) x[i] = name(x[i]);                                 \
    return x;                                                                      \
  }

#define SHIM_TRANSCENDENTALS                      \
  SHIM_FUNCTION(exp, __builtin_expf(x))           \
  SHIM_FUNCTION(exp2, __builtin_exp2f(x))         \
  SHIM_FUNCTION(exp10, __builtin_exp10f(x))       \
  SHIM_FUNCTION(log, __builtin_logf(x))           \
  SHIM_FUNCTION(log2, __builtin_log2f(x))         \
  SHIM_FUNCTION(log10, __builtin_log10f(x))       \
  SHIM_FUNCTION(sqrt, __builtin_sqrtf(x))         \
  SHIM_FUNCTION(rsqrt, 1.0f / __builtin_sqrtf(x)) \
  SHIM_FUNCTION(sin, __builtin_sinf(x))           \
  SHIM_FUNCTION(cos, __builtin_cosf(x))           \
  SHIM_FUNCTION(tanh, __builtin_tanhf(x))

SHIM_TRANSCENDENTALS
namespace fast {
SHIM_TRANSCENDENTALS
}
namespace precise {
SHIM_TRANSCENDENTALS
}
#undef SHIM_TRANSCENDENTALS
#undef SHIM_FUNCTION

inline float floor(float x) { return __builtin_floorf(x); }
inline float ceil(float x) { return __builtin_ceilf(x); }
inline float rint(float x) { return __builtin_rintf(x); }
inline float round(float x) { return __builtin_roundf(x); }
inline float trunc(float x) { return __builtin_truncf(x); }
inline float fabs(float x) { return __builtin_fabsf(x); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float pow(float a, float b) { return shim_result(__builtin_powf(a, b), a); }
inline float atan2(float a, float b) { return shim_result(__builtin_atan2f(a, b), a); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }

template <class T>
T abs(T x) {
  return x < T(0) ? T(-x) : x;
}

// Of a number and a NaN these give the number.
inline float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
inline float fmin(float a, float b) { return __builtin_fminf(a, b); }
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
inline float max(float a, float b) { return fmax(a, b); }
inline float min(float a, float b) { return fmin(a, b); }
inline half max(half a, half b) { return static_cast<half>(fmax(a, b)); }
inline half min(half a, half b) { return static_cast<half>(fmin(a, b)); }
inline bfloat max(bfloat a, bfloat b) { return bfloat(fmax(a, b)); }
inline bfloat min(bfloat a, bfloat b) { return bfloat(fmin(a, b)); }
template <class T, int N>
vec<T, N> max(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; i++) a[i] = max(a[i], b[i]);
  return a;
}
template <class T, int N>
vec<T, N> min(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; i++) a[i] = min(a[i], b[i]);
  return a;
}
template <class T>
T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T>
T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}
template <class T, int N>
T dot(vec<T, N> a, vec<T, N> b) {
  T sum = T(0);
  for (int i = 0; i < N; i++) sum = T(sum + a[i] * b[i]);
  return sum;
}

inline uint mulhi(uint a, uint b) {
  return static_cast<uint>((static_cast<uint64_t>(a) * b) >> 32);
}
inline int mulhi(int a, int b) {
  return static_cast<int>((static_cast<int64_t>(a) * b) >> 32);
}
inline uint2 mulhi(uint2 a, uint2 b) { return uint2(mulhi(a.x, b.x), mulhi(a.y, b.y)); }
inline uint popcount(uint x) { return std::popcount(x); }
inline uint clz(uint x) { return std::countl_zero(x); }
inline uint ctz(uint x) { return std::countr_zero(x); }
inline uint reverse_bits(uint x) {
  uint reversed = 0;
  for (int i = 0; i < 32; i++) reversed |= ((x >> i) & 1u) << (31 - i);
  return reversed;
}
inline uint rotate(uint x, uint bits) { return std::rotl(x, static_cast<int>(bits)); }

// ----------------------------------------------------------------------- barriers

enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
};
inline mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(static_cast<int>(a) | static_cast<int>(b));
}

#define SHIM_PLACE const shim::Place& place = shim::Place::current()

inline void threadgroup_barrier(mem_flags flags, SHIM_PLACE) {
  shim::wait_for_threadgroup(flags != mem_flags::mem_none, place);
}
inline void simdgroup_barrier(mem_flags flags, SHIM_PLACE) {
  shim::wait_for_simdgroup(flags != mem_flags::mem_none, place);
}

// ----------------------------------------------------------------- simd functions

// The values of a simdgroup's lanes, as one lane sees them.
template <class T>
class ShimLanes {
 public:
  ShimLanes(T own, const char* function, const shim::Place& place)
      : exchange_(shim::exchange(as_value(own), function, place)),
        lane_(shim::current_lane()) {}

  int lane() const { return static_cast<int>(lane_); }
  uint active() const { return exchange_.active; }
  int first() const { return std::countr_zero(exchange_.active); }
  bool has(int lane) const {
    return lane >= 0 && lane < 32 && (exchange_.active >> lane & 1);
  }

  // What a lane that does not take part would give is undefined in Metal: poison.
  T operator[](int lane) const {
    T value;
    if (has(lane)) {
      __builtin_memcpy(&value, exchange_.values[lane].bytes, sizeof(T));
    } else {
      __builtin_memset(&value, 0xFF, sizeof(T));
    }
    return value;
  }

  // A tree, as hardware adds; Metal does not specify the order. Absent lanes give
  // `identity`.
  template <class Combine>
  T reduce(T identity, Combine combine) const {
    T values[32];
    for (int i = 0; i < 32; i++) values[i] = has(i) ? (*this)[i] : identity;
    for (int half_width = 16; half_width > 0; half_width /= 2) {
      for (int i = 0; i < half_width; i++) {
        values[i] = T(combine(values[i], values[i + half_width]));
      }
    }
    return values[0];
  }

  // Over the lanes below `end`.
  template <class Combine>
  T prefix(int end, T identity, Combine combine) const {
    for (int i = 0; i < end; i++) {
      if (has(i)) identity = T(combine(identity, (*this)[i]));
    }
    return identity;
  }

 private:
  static shim::Value as_value(T own) {
    static_assert(sizeof(T) <= sizeof(shim::Value));
    shim::Value value{};
    __builtin_memcpy(value.bytes, &own, sizeof(T));
    return value;
  }

  const shim::Exchange& exchange_;
  uint lane_;
};

#define SHIM_REDUCTION(name, identity, combined)                         \
  template <class T>                                                     \
  T name(T value, SHIM_PLACE) {                                          \
    ShimLanes<T> lanes(value, #name, place);                             \
    return lanes.reduce(identity, [](T a, T b) { return T(combined); }); \
  }
SHIM_REDUCTION(simd_sum, T(0), a + b)
SHIM_REDUCTION(simd_product, T(1), a* b)
SHIM_REDUCTION(simd_max, lanes[lanes.first()], metal::max(a, b))
SHIM_REDUCTION(simd_min, lanes[lanes.first()], metal::min(a, b))
SHIM_REDUCTION(simd_and, T(~T(0)), a& b)
SHIM_REDUCTION(simd_or, T(0), a | b)
SHIM_REDUCTION(simd_xor, T(0), a ^ b)
#undef SHIM_REDUCTION

#define SHIM_PREFIX(name, past, identity, combined)                               \
  template <class T>                                                              \
  T name(T value, SHIM_PLACE) {                                                   \
    ShimLanes<T> lanes(value, #name, place);                                      \
    return lanes.prefix(                                                          \
        lanes.lane() + past, identity, [](T a, T b) { return T(combined); });     \
  }
SHIM_PREFIX(simd_prefix_inclusive_sum, 1, T(0), a + b)
SHIM_PREFIX(simd_prefix_exclusive_sum, 0, T(0), a + b)
SHIM_PREFIX(simd_prefix_inclusive_product, 1, T(1), a* b)
SHIM_PREFIX(simd_prefix_exclusive_product, 0, T(1), a* b)
#undef SHIM_PREFIX

#define SHIM_SHUFFLE(name, source)           \
  template <class T>                         \
  T name(T value, ushort which, SHIM_PLACE) { \
    ShimLanes<T> lanes(value, #name, place); \
    return lanes[source];                    \
  }
SHIM_SHUFFLE(simd_shuffle, which)
SHIM_SHUFFLE(simd_broadcast, which)
SHIM_SHUFFLE(simd_shuffle_xor, lanes.lane() ^ which)
SHIM_SHUFFLE(simd_shuffle_down, lanes.lane() + which)
SHIM_SHUFFLE(simd_shuffle_up, lanes.lane() - which)
SHIM_SHUFFLE(simd_shuffle_rotate_down, (lanes.lane() + which) % 32)
SHIM_SHUFFLE(simd_shuffle_rotate_up, (lanes.lane() + 32 - which % 32) % 32)
#undef SHIM_SHUFFLE

template <class T>
T simd_shuffle_and_fill_up(T value, T filling, ushort delta, SHIM_PLACE) {
  ShimLanes<T> lanes(value, "simd_shuffle_and_fill_up", place);
  return lanes.lane() < delta ? filling : lanes[lanes.lane() - delta];
}
template <class T>
T simd_shuffle_and_fill_down(T value, T filling, ushort delta, SHIM_PLACE) {
  ShimLanes<T> lanes(value, "simd_shuffle_and_fill_down", place);
  return lanes.lane() + delta > 31 ? filling : lanes[lanes.lane() + delta];
}
template <class T>
T simd_broadcast_first(T value, SHIM_PLACE) {
  ShimLanes<T> lanes(value, "simd_broadcast_first", place);
  return lanes[lanes.first()];
}

struct simd_vote {
  uint64_t votes;
  uint64_t lanes;
  explicit operator uint64_t() const { return votes; }
  bool all() const { return votes == lanes; }
  bool any() const { return votes != 0; }
};
inline simd_vote shim_ballot(bool vote, const char* function, const shim::Place& place) {
  ShimLanes<bool> lanes(vote, function, place);
  uint votes = 0;
  for (int i = 0; i < 32; i++) {
    if (lanes.has(i) && lanes[i]) votes |= 1u << i;
  }
  return {votes, lanes.active()};
}
inline simd_vote simd_ballot(bool vote, SHIM_PLACE) {
  return shim_ballot(vote, "simd_ballot", place);
}
inline simd_vote simd_active_threads_mask(SHIM_PLACE) {
  return shim_ballot(true, "simd_active_threads_mask", place);
}
inline bool simd_any(bool vote, SHIM_PLACE) {
  return shim_ballot(vote, "simd_any", place).any();
}
inline bool simd_all(bool vote, SHIM_PLACE) {
  return shim_ballot(vote, "simd_all", place).all();
}
inline bool simd_is_first(SHIM_PLACE) {
  ShimLanes<bool> lanes(true, "simd_is_first", place);
  return lanes.lane() == lanes.first();
}

// ------------------------------------------------------------------------ atomics

// One OS thread runs the whole grid: a relaxed load and store make an atomic operation,
// and ThreadSanitizer knows both for atomic.
enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_bool = atomic<bool>;
using atomic_float = atomic<float>;

template <class T>
T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  T value;
  __atomic_load(&object->value, &value, __ATOMIC_RELAXED);
  return value;
}
template <class T>
void atomic_store_explicit(
    volatile atomic<T>* object, std::type_identity_t<T> value, memory_order) {
  __atomic_store(&object->value, &value, __ATOMIC_RELAXED);
}

#define SHIM_ATOMIC(name, combined)                                                   \
  template <class T>                                                                  \
  T name(volatile atomic<T>* object, std::type_identity_t<T> b, memory_order order) { \
    T a = atomic_load_explicit(object, order);                                        \
    atomic_store_explicit(object, T(combined), order);                                \
    return a;                                                                         \
  }
SHIM_ATOMIC(atomic_exchange_explicit, b)
SHIM_ATOMIC(atomic_fetch_add_explicit, a + b)
SHIM_ATOMIC(atomic_fetch_sub_explicit, a - b)
SHIM_ATOMIC(atomic_fetch_max_explicit, metal::max(a, b))
SHIM_ATOMIC(atomic_fetch_min_explicit, metal::min(a, b))
SHIM_ATOMIC(atomic_fetch_and_explicit, a& b)
SHIM_ATOMIC(atomic_fetch_or_explicit, a | b)
SHIM_ATOMIC(atomic_fetch_xor_explicit, a ^ b)
#undef SHIM_ATOMIC

template <class T>
bool atomic_compare_exchange_weak_explicit(
    volatile atomic<T>* object,
    T* expected,
    std::type_identity_t<T> desired,
    memory_order order,
    memory_order) {
  T found = atomic_load_explicit(object, order);
  if (found != *expected) {
    *expected = found;
    return false;
  }
  atomic_store_explicit(object, desired, order);
  return true;
}
#undef SHIM_PLACE

}  // namespace metal
