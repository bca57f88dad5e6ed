// Metal's language and library for g++: enough to compile a kernel of MLX as C++.
#pragma once

#include "functions.hpp"

using namespace metal;

#define METAL_FUNC inline
#define __METAL_VERSION__ 310
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT __FLT_MAX__

// g++ has no address spaces; lint.py checks them with clang. Declarations of threadgroup
// storage have become SHIM_THREADGROUP before g++ sees the text.
#define device
#define constant
#define thread
#define threadgroup
#define SHIM_THREADGROUP(name, dimensions, ...)      \
  typedef __VA_ARGS__ name##_storage dimensions;     \
  name##_storage& name = *static_cast<name##_storage*>( \
      shim::threadgroup_memory(sizeof(name##_storage), #name, __LINE__))
