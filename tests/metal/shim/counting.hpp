// What stands in for float, for pointers to buffers and, where asked for, for uint in the
// text of a kernel that is counted. It computes what they compute.
//
// float2, float4 ... stay what they are: what is computed with them is not counted.
#pragma once

#include "counts.hpp"

namespace shim {

// Where a buffer is accessed: an index, and its place in the text.
struct Word;
struct Index {
  template <class T>
    requires std::is_integral_v<T>
  Index(T value, const Place& place = Place::current()) : value(value), place(place) {}
  Index(Word word, const Place& place = Place::current());

  int64_t value;
  Place place;
};

// -------------------------------------------------------------------------- uint

// A uint whose logic and shifts are counted; other arithmetic is that of addresses.
struct Word {
  uint value;

  Word() = default;
  template <class T>
    requires std::is_integral_v<T>
  constexpr Word(T value) : value(static_cast<uint>(value)) {}
  constexpr operator uint() const { return value; }

  Word operator~() const {
    count(logic);
    return Word(~value);
  }
  template <class T>
  Word& operator+=(T other) {
    return *this = Word(value + static_cast<uint>(other));
  }
  Word& operator++() { return *this += 1u; }
  Word operator++(int) {
    Word old = *this;
    *this += 1u;
    return old;
  }
};

inline Index::Index(Word word, const Place& place) : value(word.value), place(place) {}

template <class A, class B>
concept WordPair = (std::is_same_v<A, Word> && (std::is_integral_v<B> || std::is_same_v<B, Word>)) ||
                   (std::is_same_v<B, Word> && std::is_integral_v<A>);

#define SHIM_WORD_OPERATOR(op, operation)                                     \
  template <class A, class B>                                                 \
    requires WordPair<A, B>                                                   \
  Word operator op(A a, B b) {                                                \
    count(operation);                                                         \
    return Word(static_cast<uint>(a) op static_cast<uint>(b));                \
  }                                                                           \
  template <class B>                                                          \
  Word& operator op##=(Word& a, B b) {                                        \
    return a = a op b;                                                        \
  }
SHIM_WORD_OPERATOR(&, logic)
SHIM_WORD_OPERATOR(|, logic)
SHIM_WORD_OPERATOR(^, logic)
SHIM_WORD_OPERATOR(<<, shift)
SHIM_WORD_OPERATOR(>>, shift)
#undef SHIM_WORD_OPERATOR

// ------------------------------------------------------------------------- float

struct Real {
  float value;

  Real() = default;
  Real(float value) : value(value) {}
  Real(half other) : value(static_cast<float>(other)) { count(from_short); }
  Real(bfloat other) : value(static_cast<float>(other)) { count(from_short); }
  Real(Word other) : value(static_cast<float>(other.value)) { count(from_integer); }
  template <class T>
    requires std::is_integral_v<T>
  Real(T other) : value(static_cast<float>(other)) {
    count(from_integer);
  }

  template <class T>
    requires(std::is_integral_v<T> && !std::is_same_v<T, bool>)
  explicit operator T() const {
    count(to_integer);
    return static_cast<T>(value);
  }
  explicit operator bool() const { return value != 0; }
  explicit operator half() const {
    count(to_short);
    return static_cast<half>(value);
  }
  explicit operator bfloat() const {
    count(to_short);
    return bfloat(value);
  }

  Real operator-() const { return Real(-value); }  // part of what uses it

#define SHIM_REAL_OPERATOR(op, operation)   \
  friend Real operator op(Real a, Real b) { \
    count(operation);                       \
    return Real(a.value op b.value);        \
  }                                         \
  Real& operator op##=(Real other) { return *this = *this op other; }
  SHIM_REAL_OPERATOR(+, add)
  SHIM_REAL_OPERATOR(-, add)
  SHIM_REAL_OPERATOR(*, multiply)
  SHIM_REAL_OPERATOR(/, divide)
#undef SHIM_REAL_OPERATOR

#define SHIM_REAL_COMPARISON(op)            \
  friend bool operator op(Real a, Real b) { \
    count(compare);                         \
    return a.value op b.value;              \
  }
  SHIM_REAL_COMPARISON(<)
  SHIM_REAL_COMPARISON(>)
  SHIM_REAL_COMPARISON(<=)
  SHIM_REAL_COMPARISON(>=)
  SHIM_REAL_COMPARISON(==)
  SHIM_REAL_COMPARISON(!=)
#undef SHIM_REAL_COMPARISON
};

// ----------------------------------------------------------------------- buffers

template <class T>
class Element;

// A pointer into a buffer. Casts and sums stay in that buffer.
template <class T>
class Pointer {
 public:
  Pointer(T* data, uint buffer, const Thread& lane)
      : data_(data), buffer_(buffer), lane_(&lane) {}
  template <class U>
  explicit Pointer(const Pointer<U>& other)
      : data_((T*)other.data_), buffer_(other.buffer_), lane_(other.lane_) {}

  Pointer operator+(Index index) const {
    return Pointer(data_ + index.value, buffer_, *lane_);
  }
  auto operator[](Index index) const {
    if constexpr (std::is_const_v<T>) {
      return load(index);
    } else {
      return Element<T>(*this, index);
    }
  }

 private:
  template <class U>
  friend class Pointer;
  friend class Element<T>;

  std::remove_const_t<T> load(const Index& index) const {
    tell(index, false);
    return data_[index.value];
  }
  void store(const Index& index, T value) const {
    tell(index, true);
    data_[index.value] = value;
  }
  void tell(const Index& index, bool is_store) const {
    auto base = static_cast<const char*>(lane_->buffers[buffer_]);
    auto offset = reinterpret_cast<const char*>(data_ + index.value) - base;
    count_access(*lane_, buffer_, offset, sizeof(T), is_store, index.place);
  }

  T* data_;
  uint buffer_;
  const Thread* lane_;
};

// A place of an output: a value when it is read, a store when it is written.
template <class T>
class Element {
 public:
  Element(const Pointer<T>& pointer, const Index& index)
      : pointer_(pointer), index_(index) {}
  void operator=(T value) const { pointer_.store(index_, value); }
  operator T() const { return pointer_.load(index_); }

 private:
  Pointer<T> pointer_;
  Index index_;
};

}  // namespace shim

// ----------------------------------------------------------------- Metal's library

namespace metal {

#define SHIM_COUNTED_FUNCTION(name)                \
  inline shim::Real name(shim::Real x) {           \
    shim::count(shim::function);                   \
    return shim::Real(name(x.value));              \
  }
#define SHIM_COUNTED_FUNCTIONS \
  SHIM_COUNTED_FUNCTION(exp)   \
  SHIM_COUNTED_FUNCTION(exp2)  \
  SHIM_COUNTED_FUNCTION(log)   \
  SHIM_COUNTED_FUNCTION(log2)  \
  SHIM_COUNTED_FUNCTION(sqrt)  \
  SHIM_COUNTED_FUNCTION(rsqrt) \
  SHIM_COUNTED_FUNCTION(sin)   \
  SHIM_COUNTED_FUNCTION(cos)   \
  SHIM_COUNTED_FUNCTION(tanh)
SHIM_COUNTED_FUNCTIONS
namespace fast {
SHIM_COUNTED_FUNCTIONS
}
namespace precise {
SHIM_COUNTED_FUNCTIONS
}
SHIM_COUNTED_FUNCTION(floor)
SHIM_COUNTED_FUNCTION(ceil)
SHIM_COUNTED_FUNCTION(rint)
#undef SHIM_COUNTED_FUNCTIONS
#undef SHIM_COUNTED_FUNCTION

inline shim::Real fma(shim::Real a, shim::Real b, shim::Real c) {
  shim::count(shim::fused_multiply_add);
  return shim::Real(fma(a.value, b.value, c.value));
}
inline shim::Real max(shim::Real a, shim::Real b) {
  shim::count(shim::compare);
  return shim::Real(fmax(a.value, b.value));
}
inline shim::Real min(shim::Real a, shim::Real b) {
  shim::count(shim::compare);
  return shim::Real(fmin(a.value, b.value));
}
inline bool isnan(shim::Real x) { return isnan(x.value); }
inline bool isinf(shim::Real x) { return isinf(x.value); }
inline shim::Word min(shim::Word a, uint b) { return shim::Word(b < a ? b : a.value); }
inline shim::Word max(shim::Word a, uint b) { return shim::Word(a < b ? b : a.value); }

// What the lanes of a simdgroup add up is one call, not arithmetic of the text.
#define SHIM_COUNTED_REDUCTION(name)                                                   \
  inline shim::Real name(                                                              \
      shim::Real value, const shim::Place& place = shim::Place::current()) {           \
    return shim::Real(name(value.value, place));                                       \
  }
SHIM_COUNTED_REDUCTION(simd_sum)
SHIM_COUNTED_REDUCTION(simd_product)
SHIM_COUNTED_REDUCTION(simd_max)
SHIM_COUNTED_REDUCTION(simd_min)
SHIM_COUNTED_REDUCTION(simd_prefix_inclusive_sum)
SHIM_COUNTED_REDUCTION(simd_prefix_exclusive_sum)
#undef SHIM_COUNTED_REDUCTION

}  // namespace metal

// A float made of two halves of a word.
template <class To>
  requires std::is_same_v<To, shim::Real>
To as_type(vec<ushort, 2> halves) {
  shim::count(shim::pack);
  return std::bit_cast<shim::Real>(halves);
}

#define float shim::Real
#if defined(SHIM_COUNTS_WORDS)
#define uint shim::Word
#define uint2 vec<shim::Word, 2>
#define uint4 vec<shim::Word, 4>
#endif
