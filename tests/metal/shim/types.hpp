// The scalar and vector types of the Metal Shading Language that g++ lacks.
//
// No header of the C library is included here or in the files that a kernel sees: their
// functions (log1p, erf, printf ...) do not exist in Metal and must not compile.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

using uint = unsigned int;
using ushort = unsigned short;
using uchar = unsigned char;
using half = _Float16;
using size_t = decltype(sizeof(0));

// ------------------------------------------------------------------------- bfloat

struct bfloat {
  uint16_t bits;

  bfloat() = default;

  template <class T>
    requires(std::is_arithmetic_v<T> || std::is_same_v<T, half>)
  constexpr bfloat(T value) : bits(round(static_cast<float>(value))) {}

  constexpr operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }

  // To nearest, ties to even; a NaN keeps its sign and becomes quiet.
  static constexpr uint16_t round(float value) {
    uint32_t wide = std::bit_cast<uint32_t>(value);
    if ((wide & 0x7FFFFFFFu) > 0x7F800000u) {
      return static_cast<uint16_t>((wide >> 16) | 0x40);
    }
    return static_cast<uint16_t>((wide + 0x7FFFu + ((wide >> 16) & 1)) >> 16);
  }
};

namespace shim {

template <class T>
concept Scalar =
    std::is_arithmetic_v<T> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;

template <class A, class B>
concept BfloatPair = (std::is_same_v<A, bfloat> && Scalar<B>) ||
                     (std::is_same_v<B, bfloat> && Scalar<A>);

template <class T>
constexpr bool keeps_bfloat = std::is_same_v<T, bfloat> || std::is_integral_v<T>;

// bfloat with bfloat or an integer is bfloat; with float or half it is float.
template <class A, class B>
using BfloatResult =
    std::conditional_t<keeps_bfloat<A> && keeps_bfloat<B>, bfloat, float>;

}  // namespace shim

#define SHIM_BFLOAT_ARITHMETIC(op)                                                  \
  template <class A, class B>                                                       \
    requires shim::BfloatPair<A, B>                                                 \
  constexpr auto operator op(A a, B b) {                                            \
    return shim::BfloatResult<A, B>(static_cast<float>(a) op static_cast<float>(b)); \
  }                                                                                 \
  template <class B>                                                                \
  constexpr bfloat& operator op##=(bfloat& a, B b) {                                \
    return a = bfloat(static_cast<float>(a) op static_cast<float>(b));              \
  }
SHIM_BFLOAT_ARITHMETIC(+)
SHIM_BFLOAT_ARITHMETIC(-)
SHIM_BFLOAT_ARITHMETIC(*)
SHIM_BFLOAT_ARITHMETIC(/)
#undef SHIM_BFLOAT_ARITHMETIC

#define SHIM_BFLOAT_COMPARISON(op)                              \
  template <class A, class B>                                   \
    requires shim::BfloatPair<A, B>                             \
  constexpr bool operator op(A a, B b) {                        \
    return static_cast<float>(a) op static_cast<float>(b);      \
  }
SHIM_BFLOAT_COMPARISON(<)
SHIM_BFLOAT_COMPARISON(>)
SHIM_BFLOAT_COMPARISON(<=)
SHIM_BFLOAT_COMPARISON(>=)
SHIM_BFLOAT_COMPARISON(==)
SHIM_BFLOAT_COMPARISON(!=)
#undef SHIM_BFLOAT_COMPARISON

constexpr bfloat operator-(bfloat a) {
  return std::bit_cast<bfloat>(static_cast<uint16_t>(a.bits ^ 0x8000));
}

// ------------------------------------------------------------------------ vectors

// Components x, y, z, w and [i]; no swizzles (v.xy), which need a compiler's help.
template <class T, int N>
struct vec;

#define SHIM_VECTOR_INDEX                                  \
  T& operator[](int i) { return (&x)[i]; }                 \
  const T& operator[](int i) const { return (&x)[i]; }

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  vec(T all) : x(all), y(all) {}
  vec(T a, T b) : x(a), y(b) {}
  template <class U>
  explicit vec(vec<U, 2> o) : x(T(o.x)), y(T(o.y)) {}
  SHIM_VECTOR_INDEX
};

// As large as four components, as in Metal.
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  vec() = default;
  vec(T all) : x(all), y(all), z(all) {}
  vec(T a, T b, T c) : x(a), y(b), z(c) {}
  template <class U>
  explicit vec(vec<U, 3> o) : x(T(o.x)), y(T(o.y)), z(T(o.z)) {}
  SHIM_VECTOR_INDEX
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  vec(T all) : x(all), y(all), z(all), w(all) {}
  vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  vec(vec<T, 2> a, vec<T, 2> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
  template <class U>
  explicit vec(vec<U, 4> o) : x(T(o.x)), y(T(o.y)), z(T(o.z)), w(T(o.w)) {}
  SHIM_VECTOR_INDEX
};
#undef SHIM_VECTOR_INDEX

#define SHIM_VECTOR_OPERATOR(op)                                           \
  template <class T, int N>                                                \
  vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                        \
    for (int i = 0; i < N; i++) a[i] = T(a[i] op b[i]);                    \
    return a;                                                              \
  }                                                                        \
  template <class T, int N>                                                \
  vec<T, N> operator op(vec<T, N> a, std::type_identity_t<T> b) {          \
    return a op vec<T, N>(b);                                              \
  }                                                                        \
  template <class T, int N>                                                \
  vec<T, N> operator op(std::type_identity_t<T> a, vec<T, N> b) {          \
    return vec<T, N>(a) op b;                                              \
  }                                                                        \
  template <class T, int N, class B>                                       \
  vec<T, N>& operator op##=(vec<T, N>& a, B b) {                           \
    return a = a op b;                                                     \
  }
SHIM_VECTOR_OPERATOR(+)
SHIM_VECTOR_OPERATOR(-)
SHIM_VECTOR_OPERATOR(*)
SHIM_VECTOR_OPERATOR(/)
SHIM_VECTOR_OPERATOR(&)
SHIM_VECTOR_OPERATOR(|)
SHIM_VECTOR_OPERATOR(^)
SHIM_VECTOR_OPERATOR(<<)
SHIM_VECTOR_OPERATOR(>>)
#undef SHIM_VECTOR_OPERATOR

template <class T, int N>
vec<T, N> operator-(vec<T, N> a) {
  for (int i = 0; i < N; i++) a[i] = T(-a[i]);
  return a;
}

#define SHIM_VECTOR_NAMES(type) \
  using type##2 = vec<type, 2>; \
  using type##3 = vec<type, 3>; \
  using type##4 = vec<type, 4>;
SHIM_VECTOR_NAMES(bool)
SHIM_VECTOR_NAMES(uchar)
SHIM_VECTOR_NAMES(ushort)
SHIM_VECTOR_NAMES(int)
SHIM_VECTOR_NAMES(uint)
SHIM_VECTOR_NAMES(half)
SHIM_VECTOR_NAMES(bfloat)
SHIM_VECTOR_NAMES(float)
#undef SHIM_VECTOR_NAMES

template <class To, class From>
To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return std::bit_cast<To>(value);
}

// MLX's complex.h overloads on address spaces, which g++ does not know; MLX's other
// headers only need the type to exist.
template <class T>
struct complex_t {
  T real, imag;
  constexpr complex_t() : real(0), imag(0) {}
  constexpr complex_t(T real, T imag = 0) : real(real), imag(imag) {}
};
using complex64_t = complex_t<float>;

// ------------------------------------------------------------------------- limits

namespace metal {

template <class T>
struct numeric_limits : std::numeric_limits<T> {};

template <>
struct numeric_limits<half> {
  static constexpr half infinity() { return static_cast<half>(__builtin_inff()); }
  static constexpr half quiet_NaN() { return static_cast<half>(__builtin_nanf("")); }
  static constexpr half max() { return static_cast<half>(65504.0f); }
  static constexpr half min() { return static_cast<half>(6.103515625e-05f); }
  static constexpr half lowest() { return -max(); }
};

template <>
struct numeric_limits<bfloat> {
  static constexpr bfloat of_bits(uint16_t bits) { return std::bit_cast<bfloat>(bits); }
  static constexpr bfloat infinity() { return of_bits(0x7F80); }
  static constexpr bfloat quiet_NaN() { return of_bits(0x7FC0); }
  static constexpr bfloat max() { return of_bits(0x7F7F); }
  static constexpr bfloat min() { return of_bits(0x0080); }
  static constexpr bfloat lowest() { return of_bits(0xFF7F); }
};

using ::as_type;
using ::bfloat;
using ::half;
using ::vec;
using std::conditional_t;
using std::enable_if;
using std::enable_if_t;
using std::is_floating_point;
using std::is_floating_point_v;
using std::is_integral;
using std::is_integral_v;
using std::is_same;
using std::is_same_v;
using std::is_signed;
using std::is_signed_v;
using std::is_unsigned;
using std::is_unsigned_v;
using std::remove_cv_t;

}  // namespace metal
