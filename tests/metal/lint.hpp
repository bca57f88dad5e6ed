// Declarations for lint.py: Metal's types and functions as clang can check them.
//
// Address spaces are part of a pointer's type here, as in Metal, and only what is declared
// exists: there is no standard library. Functions have no bodies; nothing runs.
#pragma once

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long size_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef unsigned long uint64_t;
typedef _Float16 half;
typedef __bf16 bfloat;

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define METAL_FUNC inline
#define __METAL_VERSION__ 310
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT __FLT_MAX__

// make_: what lint.py turns the constructors of vectors into; clang has none of them.
#define VECTORS(type)                                       \
  typedef type type##2 __attribute__((ext_vector_type(2))); \
  typedef type type##3 __attribute__((ext_vector_type(3))); \
  typedef type type##4 __attribute__((ext_vector_type(4))); \
  type##2 make_##type##2(type);                             \
  type##2 make_##type##2(type, type);                       \
  type##3 make_##type##3(type);                             \
  type##3 make_##type##3(type, type, type);                 \
  type##4 make_##type##4(type);                             \
  type##4 make_##type##4(type, type, type, type);           \
  type##4 make_##type##4(type##2, type##2);
VECTORS(uchar)
VECTORS(ushort)
VECTORS(int)
VECTORS(uint)
VECTORS(half)
VECTORS(float)

template <class To, class From>
To as_type(From value) {
  return __builtin_bit_cast(To, value);
}

namespace metal {

template <class T>
struct numeric_limits {
  static constexpr T infinity() { return T(0); }
  static constexpr T quiet_NaN() { return T(0); }
  static constexpr T max() { return T(0); }
  static constexpr T min() { return T(0); }
  static constexpr T lowest() { return T(0); }
};

#define UNARY(name)    \
  float name(float);   \
  half name(half);     \
  bfloat name(bfloat); \
  float2 name(float2); \
  float4 name(float4);
#define TRANSCENDENTALS                                                    \
  UNARY(exp) UNARY(exp2) UNARY(exp10) UNARY(log) UNARY(log2) UNARY(log10)  \
  UNARY(sqrt) UNARY(rsqrt) UNARY(sin) UNARY(cos) UNARY(tanh)
TRANSCENDENTALS
namespace fast {
TRANSCENDENTALS
}
namespace precise {
TRANSCENDENTALS
}
UNARY(floor)
UNARY(ceil)
UNARY(rint)
UNARY(round)
UNARY(trunc)
UNARY(fabs)

float fma(float, float, float);
float pow(float, float);
float atan2(float, float);
float fmax(float, float);
float fmin(float, float);
bool isnan(float);
bool isinf(float);
bool isfinite(float);
template <class T> T abs(T);
template <class T> T max(T, T);
template <class T> T min(T, T);
template <class T> T clamp(T, T, T);
template <class T> T select(T, T, bool);
float dot(float2, float2);
float dot(float4, float4);
uint mulhi(uint, uint);
int mulhi(int, int);
uint2 mulhi(uint2, uint2);
uint popcount(uint);
uint clz(uint);
uint ctz(uint);
uint reverse_bits(uint);
uint rotate(uint, uint);

enum class mem_flags { mem_none, mem_device, mem_threadgroup, mem_texture };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

#define OF_ONE(name) template <class T> T name(T);
#define OF_A_LANE(name) template <class T> T name(T, ushort);
OF_ONE(simd_sum)
OF_ONE(simd_product)
OF_ONE(simd_max)
OF_ONE(simd_min)
OF_ONE(simd_and)
OF_ONE(simd_or)
OF_ONE(simd_xor)
OF_ONE(simd_prefix_inclusive_sum)
OF_ONE(simd_prefix_exclusive_sum)
OF_ONE(simd_prefix_inclusive_product)
OF_ONE(simd_prefix_exclusive_product)
OF_ONE(simd_broadcast_first)
OF_A_LANE(simd_shuffle)
OF_A_LANE(simd_broadcast)
OF_A_LANE(simd_shuffle_xor)
OF_A_LANE(simd_shuffle_down)
OF_A_LANE(simd_shuffle_up)
OF_A_LANE(simd_shuffle_rotate_down)
OF_A_LANE(simd_shuffle_rotate_up)
template <class T> T simd_shuffle_and_fill_up(T, T, ushort);
template <class T> T simd_shuffle_and_fill_down(T, T, ushort);
struct simd_vote {
  explicit operator uint64_t() const;
  bool all() const;
  bool any() const;
};
simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first();

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
#define ATOMIC(name)                                                     \
  template <class T, class U>                                            \
  T name(volatile device atomic<T>*, U, memory_order);                   \
  template <class T, class U>                                            \
  T name(volatile threadgroup atomic<T>*, U, memory_order);
ATOMIC(atomic_exchange_explicit)
ATOMIC(atomic_fetch_add_explicit)
ATOMIC(atomic_fetch_sub_explicit)
ATOMIC(atomic_fetch_max_explicit)
ATOMIC(atomic_fetch_min_explicit)
ATOMIC(atomic_fetch_and_explicit)
ATOMIC(atomic_fetch_or_explicit)
ATOMIC(atomic_fetch_xor_explicit)
ATOMIC(atomic_store_explicit)
template <class T> T atomic_load_explicit(const volatile device atomic<T>*, memory_order);
template <class T>
T atomic_load_explicit(const volatile threadgroup atomic<T>*, memory_order);
template <class T, class U>
bool atomic_compare_exchange_weak_explicit(
    volatile device atomic<T>*, thread T*, U, memory_order, memory_order);
template <class T, class U>
bool atomic_compare_exchange_weak_explicit(
    volatile threadgroup atomic<T>*, thread T*, U, memory_order, memory_order);

}  // namespace metal
using namespace metal;

// From MLX's utils.h, which uses more of Metal than is declared here.
typedef bfloat bfloat16_t;
typedef half float16_t;
template <class T>
struct Limits {
  static constexpr T max = T(1), min = T(-1), finite_max = T(1), finite_min = T(-1);
};
template <class T, class U> T ceildiv(T, U);
float log1p(float);
